"""The alarm in a training: what it writes and does, on made-up logs and in whole runs."""

import json
import logging
from types import SimpleNamespace

import pytest
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState

from rlhf_recipes.evaluation.callbacks import RewardHackingAlarm
from rlhf_recipes.evaluation.hacking_signs import AlarmLimits

GOLD = "rewards/gold/mean"
HACKED = [
    {"reward": 1.0 + step, GOLD: gold}
    for step, gold in enumerate([0.0, 1.0, 2.0, 2.0, 2.0, 1.5, 1.0, 0.5, 0.0, 0.0, 0.0, 0.0, 0.0])
]
FIRES_AT = 80  # the eighth log


@pytest.fixture
def play(make_trainer):
    """Train a real trainer for no step, and hand the alarm made-up logs of every tenth step."""

    def play(logs, gold="gold", trainer=None, **options):
        trainer = trainer or make_trainer()
        alarm = RewardHackingAlarm(trainer, gold=gold, **options)
        trainer.callback_handler.callbacks = [alarm]
        trainer.create_optimizer_and_scheduler(num_training_steps=100)
        alarm.on_train_begin(trainer.args, trainer.state, trainer.control)
        for number, entry in enumerate(logs, start=1):
            trainer.state.global_step = 10 * number
            Trainer.log(trainer, dict(entry))
        alarms = json.loads((alarm._file()).read_text())
        return SimpleNamespace(trainer=trainer, alarms=alarms, state=trainer.state, control=trainer.control)

    return play


def test_a_reason_is_logged_written_and_kept_in_the_history(play, caplog):
    with caplog.at_level(logging.WARNING, logger="rlhf_recipes.evaluation"):
        played = play(HACKED[:8])
    [alarm] = played.alarms
    assert (alarm["kind"], alarm["step"], alarm["action"]) == ("over_optimization", FIRES_AT, "warned")
    assert alarm["numbers"]["best_step"] == 50
    assert "`rewards/gold/mean` fell from 2.000 (steps up to 50)" in alarm["message"]
    assert alarm["message"] in caplog.text
    assert [entry["step"] for entry in played.state.log_history if "alarm/over_optimization" in entry] == [FIRES_AT]
    assert not played.control.should_training_stop


def test_a_sign_that_stays_counts_again_after_a_window(play):
    assert [alarm["step"] for alarm in play(HACKED).alarms] == [80, 110]


def test_a_run_without_a_sign_leaves_an_empty_list(play):
    assert (
        play([{"reward": float(step), GOLD: float(step), "kl": 1.0, "entropy": 2.0} for step in range(12)]).alarms
        == []
    )


def test_without_gold_the_other_signs_are_watched(play):
    logs = [
        {"reward": 1.0, "kl": 3.0 * step, "entropy": 3.0 * 0.8**step, "length": 10.0 + 8 * step} for step in range(8)
    ]
    played = play(logs, gold=None, limits=AlarmLimits(kl_budget=10.0), keys={"length": "length"})
    assert [(alarm["kind"], alarm["step"]) for alarm in played.alarms] == [
        ("kl_budget", 60),
        ("entropy_collapse", 70),
        ("length_drift", 80),
    ]


def test_what_the_evaluation_logs_is_watched(play):
    proxy = [{"eval_policy/reward_score": float(step)} for step in range(8)]
    falling = [entry[GOLD] for entry in HACKED[:8]]
    for key in ("eval_policy/gold_score", "eval_win_rate", "eval_length_controlled_reward", "eval_judge_win_rate"):
        played = play([{**entry, key: value} for entry, value in zip(proxy, falling, strict=True)], gold=None)
        assert {alarm["kind"] for alarm in played.alarms} == {"over_optimization"}, key
    shares = [{"eval_policy/top_ngram": 0.1 * step, "eval_reference/top_ngram": 0.15} for step in range(9)]
    assert [alarm["step"] for alarm in play(shares, gold=None).alarms] == [80]


def test_keys_of_ones_own_are_compared(play):
    logs = [{"mine": entry["reward"], "other": entry[GOLD]} for entry in HACKED[:8]]
    assert len(play(logs, gold=None, pairs=[("mine", "other")]).alarms) == 1


def test_lower_learning_rate_halves_what_the_schedule_gives(play, make_trainer):
    trainer = make_trainer(learning_rate=1e-3)
    before = trainer.args.learning_rate
    played = play(HACKED[:8], trainer=trainer, action="lower_learning_rate")
    scheduler = played.trainer.lr_scheduler
    assert [group["lr"] for group in trainer.optimizer.param_groups] == [before / 2, 10 * before / 2]
    scheduler.step()
    assert scheduler.get_last_lr()[0] == pytest.approx(before / 2 * 0.99)
    assert played.alarms[0]["action"] == "learning rate halved to 0.0005"
    assert scheduler.state_dict()["base_lrs"] == [before / 2, 10 * before / 2], "so that a checkpoint keeps it"


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"kl_coef": 0.1}, 0.2),
        ({"kl_coef": 0.0}, 0.05),
        ({"kl_coef": 0.1, "kl_controller": "adaptive", "kl_target": 6.0, "kl_horizon": 10_000}, 0.2),
    ],
    ids=["fixed", "none", "adaptive"],
)
def test_raise_kl_doubles_the_weight_of_ppo(play, make_trainer, fields, expected):
    played = play(HACKED[:8], trainer=make_trainer(**fields), action="raise_kl")
    assert played.trainer.kl_controller.value == expected
    [entry] = [entry for entry in played.state.log_history if "alarm/kl_coef" in entry]
    assert entry["alarm/kl_coef"] == expected


def test_raise_kl_raises_the_beta_of_grpo_or_says_that_there_is_none(tmp_path):
    for beta, expected in ((0.02, 0.04), (0.0, 0.0)):
        trainer = SimpleNamespace(
            beta=beta, args=SimpleNamespace(output_dir=str(tmp_path)), log_history=[], callback_handler=None
        )
        alarm = RewardHackingAlarm(trainer, action="raise_kl")
        raised = alarm._raise_kl()
        assert (trainer.beta, raised) == (expected, expected or None)


def test_stop_takes_the_last_checkpoint_from_before_the_fall(play, make_trainer, tmp_path):
    for step in (20, 40, 60):
        (tmp_path / "run" / f"checkpoint-{step}").mkdir(parents=True)
    played = play(HACKED[:8], action="stop")
    assert played.control.should_training_stop
    assert played.trainer.args.load_best_model_at_end
    assert (played.state.best_global_step, played.alarms[0]["action"]) == (
        40,
        "stopped; the weights are those of checkpoint-40",
    )


def test_stop_without_a_checkpoint_says_so(play):
    played = play(HACKED[:8], action="stop")
    assert played.control.should_training_stop
    assert played.alarms[0]["action"] == "stopped; no checkpoint from before was kept"
    assert not played.trainer.args.load_best_model_at_end


def test_a_resumed_run_keeps_its_alarms_and_its_penalty(make_trainer):
    trainer = make_trainer(kl_coef=0.1)
    alarm = RewardHackingAlarm(trainer)
    alarm._file().parent.mkdir(parents=True, exist_ok=True)
    alarm._file().write_text(json.dumps([{"step": 3, "kind": "a"}, {"step": 9, "kind": "b"}]))
    state = TrainerState(global_step=5, log_history=[{"step": 3, "alarm/kl_coef": 0.4}])
    alarm.on_train_begin(trainer.args, state, TrainerControl())
    assert [row["step"] for row in json.loads(alarm._file().read_text())] == [3]
    assert trainer.kl_controller.value == 0.4
    adaptive = make_trainer(kl_coef=0.1, kl_controller="adaptive", kl_target=6.0, kl_horizon=10_000)
    RewardHackingAlarm(adaptive).on_train_begin(adaptive.args, state, TrainerControl())
    assert adaptive.kl_controller.value == 0.1, "its checkpoint has the coefficient as it was last"


@pytest.mark.parametrize("damage", ["", "{", '[{"kind": "no step"}, 3]'])
def test_a_damaged_list_of_alarms_does_not_stop_the_training(make_trainer, damage):
    trainer = make_trainer()
    alarm = RewardHackingAlarm(trainer)
    alarm._file().parent.mkdir(parents=True, exist_ok=True)
    alarm._file().write_text(damage)
    alarm.on_train_begin(trainer.args, TrainerState(), TrainerControl())
    assert json.loads(alarm._file().read_text()) == []


def test_options_are_checked(make_trainer):
    trainer = make_trainer()
    with pytest.raises(ValueError, match="`action` must be one of warn, lower_learning_rate, raise_kl, stop; got 'x'"):
        RewardHackingAlarm(trainer, action="x")
    with pytest.raises(ValueError, match=r"`keys` names kl, entropy, length; got \['klx'\]"):
        RewardHackingAlarm(trainer, keys={"klx": "kl"})


class Fall(TrainerCallback):
    """Puts a made-up fall of the true score into what a real training logs."""

    def on_log(self, args, state, control, logs, **kwargs):
        if GOLD in logs:
            state.log_history[-1] |= HACKED[state.global_step - 1]


def test_in_a_whole_run_it_stops_and_the_weights_are_those_of_the_checkpoint(make_trainer, reward_adapter):
    from safetensors.torch import load_file

    def gold(completion_ids, **kwargs):
        return [0.0] * len(completion_ids)

    trainer = make_trainer(
        reward_funcs=[str(reward_adapter), gold],
        reward_weights=[1.0, 0.0],
        max_steps=12,
        num_iterations=1,
        save_strategy="steps",
        save_steps=2,
        callbacks=[Fall()],
    )
    trainer.add_callback(RewardHackingAlarm(trainer, gold="gold", action="stop"))
    trainer.train()
    assert trainer.state.global_step == 8
    trainer.save_model()
    folder = RewardHackingAlarm(trainer)._file().parent
    saved = load_file(folder / "adapter_model.safetensors")
    best = load_file(folder / "checkpoint-4" / "adapter_model.safetensors")
    last = load_file(folder / "checkpoint-8" / "adapter_model.safetensors")
    assert all((saved[name] == best[name]).all() for name in saved)
    assert any((saved[name] != last[name]).any() for name in saved)
    steps = [entry["step"] for entry in trainer.state.log_history if "loss" in entry]
    assert steps == list(range(1, 9)), "the alarm's own log adds no second entry of the step"
