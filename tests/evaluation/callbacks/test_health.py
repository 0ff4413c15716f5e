"""Warnings about the critic and the updates, and what is measured of a training."""

import json
import logging
import time

import pytest
import torch
from transformers import Trainer
from trl import SFTConfig, SFTTrainer

from rlhf_recipes.evaluation.callbacks import CriticHealth, FrontierTracker, PolicyEvaluation, TrainingHealth
from rlhf_recipes.models.roles import is_critic_parameter
from rlhf_recipes.statistics.frontier import frontier
from tests.ppo.support import trained


def play(trainer, hook, logs):
    trainer.callback_handler.callbacks = [hook]
    hook.on_train_begin(trainer.args, trainer.state, trainer.control)
    for number, entry in enumerate(logs, start=1):
        trainer.state.global_step = number
        Trainer.log(trainer, {"loss": 0.0, **entry})
    return json.loads(hook._file().read_text())


def test_a_critic_is_warned_of_once_for_as_long_as_it_fails(make_trainer, caplog):
    trainer = make_trainer()
    values = [-0.5, -0.5, -0.5, -0.5, 0.9, 0.9, 0.9, -0.5, -0.5, -0.5]
    logs = [{"critic/explained_variance": value, "critic/clip_fraction": 0.1} for value in values]
    with caplog.at_level(logging.WARNING, logger="rlhf_recipes.evaluation"):
        warnings = play(trainer, CriticHealth(trainer), logs)
    assert [(row["kind"], row["step"]) for row in warnings] == [
        ("critic_explains_nothing", 3),
        ("critic_explains_nothing", 10),
    ]
    assert "`critic/explained_variance` is -0.5: the critic predicts the returns worse" in caplog.text
    assert warnings[0]["numbers"] == {"value": -0.5, "limit": -0.1}


def test_a_healthy_critic_leaves_an_empty_list(make_trainer):
    trainer = make_trainer()
    assert play(trainer, CriticHealth(trainer), [{"critic/explained_variance": 0.5}] * 5) == []


@pytest.mark.parametrize(
    ("key", "value", "kind"),
    [
        ("ppo/clip_fraction", 0.5, "policy_clipped"),
        ("clip_ratio/region_mean", 0.5, "policy_clipped"),
        ("ppo/approx_kl", 0.2, "large_updates"),
        ("ppo/ratio_max", 200.0, "extreme_ratio"),
        ("ppo/updates_made", 0.2, "updates_dropped"),
        ("completions/clipped_ratio", 1.0, "all_truncated"),
    ],
)
def test_updates_that_are_not_well_are_warned_of(make_trainer, key, value, kind):
    trainer = make_trainer()
    assert [row["kind"] for row in play(trainer, TrainingHealth(trainer), [{key: value}] * 4)] == [kind]


class Norms(TrainingHealth):
    """Keeps the norms of each step, counted in another way."""

    seen = {}

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        super().on_pre_optimizer_step(args, state, control, **kwargs)
        for role in ("policy", "critic"):
            squares = [
                parameter.grad.square().sum()
                for name, parameter in self._trainer.model.named_parameters()
                if parameter.grad is not None and is_critic_parameter(name) == (role == "critic")
            ]
            self.seen.setdefault(role, []).append(torch.stack(squares).sum().sqrt().item())


def test_norms_times_speed_and_memory_are_measured(make_trainer):
    def slow(completion_ids, **kwargs):
        time.sleep(0.2)
        return [1.0] * len(completion_ids)

    trainer = make_trainer(reward_funcs=[slow], critic_init="policy", max_steps=4, num_iterations=2, logging_steps=2)
    hook = Norms(trainer)
    hook.seen = {}
    trainer.add_callback(hook)
    start = time.perf_counter()
    trainer.train()
    whole = time.perf_counter() - start
    rows = [entry for entry in trainer.state.log_history if "health/seconds_train" in entry]
    assert [row["step"] for row in rows] == [2, 4]
    for number, row in enumerate(rows):
        for role in ("policy", "critic"):
            mean = sum(hook.seen[role][2 * number : 2 * number + 2]) / 2
            assert row[f"health/grad_norm_{role}"] == pytest.approx(mean, rel=1e-4)
        assert row["health/seconds_score"] > 0.1, "one of two steps waits 0.2 s for the reward"
        assert row["health/seconds_generate"] > 0
        assert row["health/seconds_train"] > 0
        assert row["health/peak_memory_gb"] > 0.1
    phases = sum(2 * row[f"health/seconds_{phase}"] for row in rows for phase in ("generate", "score", "train"))
    assert phases <= whole
    tokens = [entry["num_tokens"] for entry in trainer.state.log_history if "num_tokens" in entry]
    assert "health/tokens_per_second" not in rows[0]
    assert 0 < rows[1]["health/tokens_per_second"] < (tokens[1] - tokens[0]) / 0.2
    assert not hook._hooks, "it no longer listens"


def test_the_evaluation_at_the_end_of_a_step_is_no_part_of_it(make_trainer, prompts):
    def slow(completion_ids, **kwargs):
        time.sleep(0.0 if trainer.model.training else 1.5)
        return [1.0] * len(completion_ids)

    trainer = make_trainer(reward_funcs=[slow], critic_init="policy", max_steps=2, num_iterations=2)
    trainer.add_callback(PolicyEvaluation(trainer, prompts, every=1, rows=8))
    trainer.add_callback(TrainingHealth(trainer))
    trainer.train()
    rows = [entry for entry in trainer.state.log_history if "health/seconds_train" in entry]
    assert len(rows) == 2
    for row in rows:
        seconds = [row[f"health/seconds_{phase}"] for phase in ("generate", "score", "train")]
        assert all(0 <= one < 1.5 for one in seconds), seconds
    assert rows[1]["health/seconds_generate"] == 0.0, "the second step reuses the rollout"


def test_measuring_changes_nothing(make_trainer, tmp_path):
    weights = []
    for hook in (False, True):
        trainer = make_trainer(output_dir=str(tmp_path / str(hook)))
        if hook:
            for kind in (TrainingHealth, CriticHealth, FrontierTracker):
                trainer.add_callback(kind(trainer))
        trainer.train()
        weights.append(trained(trainer))
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


def test_sft_has_a_policy_and_no_rollout(tiny_model_path, prompts, tmp_path):
    trainer = SFTTrainer(
        model=tiny_model_path,
        args=SFTConfig(
            str(tmp_path / "run"),
            use_cpu=True,
            bf16=False,
            report_to="none",
            max_steps=2,
            logging_steps=1,
            save_strategy="no",
        ),
        train_dataset=prompts.map(lambda row: {"completion": " is good"}),
    )
    trainer.add_callback(TrainingHealth(trainer))
    trainer.train()
    rows = [entry for entry in trainer.state.log_history if "health/seconds_train" in entry]
    assert len(rows) == 2
    assert all(row["health/seconds_generate"] == 0.0 and row["health/grad_norm_policy"] > 0 for row in rows)
    assert not any("health/grad_norm_critic" in row for row in rows)


def test_no_norm_is_told_of_gradients_that_deepspeed_has_cleared(make_trainer):
    trainer = make_trainer()
    trainer.is_deepspeed_enabled = True
    health = TrainingHealth(trainer)
    of_a_step = (trainer.args, trainer.state, trainer.control)
    trainer.callback_handler.callbacks = [health]
    for event in (health.on_train_begin, health.on_pre_optimizer_step, health.on_optimizer_step):
        event(*of_a_step)
    Trainer.log(trainer, {"loss": 0.0})
    logged = {name for entry in trainer.state.log_history for name in entry}
    assert "health/seconds_train" in logged
    assert not any(name.startswith("health/grad_norm") for name in logged)


def test_the_frontier_is_the_history_in_a_file(make_trainer, reward_adapter):
    def gold(completion_ids, **kwargs):
        return [float(len(ids)) for ids in completion_ids]

    trainer = make_trainer(
        reward_funcs=[str(reward_adapter), gold], reward_weights=[1.0, 0.0], num_iterations=1, max_steps=9
    )
    trainer.add_callback(FrontierTracker(trainer, gold="gold"))
    trainer.train()
    with open(f"{trainer.args.output_dir}/frontier.json", encoding="utf-8") as file:
        written = json.load(file)
    keys = {"reward": "reward", "gold": "rewards/gold/mean"}
    assert written["training"] == json.loads(json.dumps(frontier(trainer.state.log_history, "kl", keys)))
    assert [point["step"] for point in written["training"]["points"]] == list(range(1, 10))
    assert set(written["training"]["fits"]) == {"reward", "gold"}
    assert written["evaluation"] == {"points": [], "fits": {}}
