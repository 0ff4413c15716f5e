"""The training arguments that PPO shares with every other trainer do what they say."""

import math

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from safetensors.torch import load_file
from torch.testing import assert_close
from transformers import TrainerCallback

from rlhf_recipes.models import load_causal_lm, load_policy
from rlhf_recipes.models.roles import is_critic_parameter
from rlhf_recipes.models.top_layers import decoder_layers
from rlhf_recipes.ppo.rollout import texts_of
from rlhf_recipes.ppo.tensorflow_adam import TensorFlowAdamW
from rlhf_recipes.shaping import transforms_state
from tests.ppo.support import logged, rollout, slow_but, trained, without_chance

ONE_STEP = {"per_device_train_batch_size": 8, "gradient_accumulation_steps": 1, "num_iterations": 1, "max_steps": 1}
DESCENT = {"optim": "sgd", "learning_rate": 0.5, "critic_learning_rate": 0.5, "lr_scheduler_type": "constant"}


def moved(trainer):
    before = trained(trainer)
    trainer.train()
    return {name: after - before[name] for name, after in trained(trainer).items()}


def norm(tensors):
    return math.sqrt(sum(float(tensor.double().square().sum()) for tensor in tensors))


def test_max_grad_norm(make_trainer):
    """Plain descent moves the weights by learning rate x gradient, clipped (0: not clipped); the log has its norm."""
    free = without_chance(make_trainer(**ONE_STEP, **DESCENT, max_grad_norm=0.0))
    gradient = norm(moved(free).values()) / 0.5
    assert gradient > 0.2
    assert logged(free, "grad_norm")[0] == pytest.approx(gradient, rel=1e-4)
    for limit in (1e-9, 0.1):
        trainer = without_chance(make_trainer(**ONE_STEP, **DESCENT, max_grad_norm=limit))
        moves = moved(trainer)
        assert logged(trainer, "grad_norm")[0] == pytest.approx(gradient, rel=1e-4)
        assert norm(moves.values()) == pytest.approx(0.5 * limit, rel=1e-3, abs=1e-7)


def test_a_tiny_max_grad_norm_leaves_the_weights_still(make_trainer):
    """Also with Adam, whose epsilon is 1e-5."""
    still = moved(make_trainer(max_grad_norm=1e-9, max_steps=2))
    assert max(float(move.abs().max()) for move in still.values()) < 1e-6
    free = moved(make_trainer(max_steps=2))
    assert max(float(move.abs().max()) for move in free.values()) > 1e-3


def states(trainer):
    return {
        "transforms": transforms_state(trainer.token_rewards.transforms),
        "kl": (trainer.kl_coef, trainer.kl_controller.state_dict()),
        "updates": trainer.updates.state_dict(),
        "step": trainer._step,
        "seen": trainer.state.num_input_tokens_seen,
    }


def test_evaluation_is_logged_and_changes_nothing(make_trainer):
    fields = {"score_scaling": "running", "kl_controller": "adaptive", "kl_target": 0.01, "kl_horizon": 16}
    fields |= {"use_adaptive_entropy": True, "entropy_coef": 0.01, "entropy_target": 9.0, "target_kl": 0.1}
    fields |= {"gradient_accumulation_steps": 1, "per_device_train_batch_size": 8, "max_steps": 6}
    trainer = without_chance(make_trainer(**fields, eval_strategy="steps", eval_steps=1, eval_on_start=True))
    trainer.train()
    for name in ("loss", "reward", "kl", "rlhf_reward", "critic/explained_variance", "ppo/policy_loss", "entropy"):
        found = logged(trainer, f"eval_{name}")
        assert len(found) == 7, name
        assert all(math.isfinite(value) for value in found), name
    assert "eval_ppo/updates_made" not in trainer.state.log_history[0]

    before, weights = states(trainer), trained(trainer)
    metrics = trainer.evaluate()
    assert metrics["eval_reward"] == pytest.approx(logged(trainer, "eval_reward")[-1])
    assert states(trainer) == before
    assert all(torch.equal(weight, weights[name]) for name, weight in trained(trainer).items())

    undisturbed = without_chance(make_trainer(**fields))
    undisturbed.train()
    found = states(undisturbed)
    assert [found[name] for name in ("updates", "step", "seen")] == [before[n] for n in ("updates", "step", "seen")]
    assert found["kl"][1] == pytest.approx(before["kl"][1], rel=1e-6)
    assert found["transforms"]["scale_scores"] == pytest.approx(before["transforms"]["scale_scores"], rel=1e-6)
    assert logged(trainer, "loss") == pytest.approx(logged(undisturbed, "loss"), abs=1e-5)
    for name, weight in trained(undisturbed).items():
        assert_close(weights[name], weight, atol=1e-5, rtol=1e-5)


def test_save_total_limit(make_trainer, tmp_path):
    make_trainer(save_strategy="steps", save_steps=1, save_total_limit=2, output_dir=str(tmp_path / "run")).train()
    assert {path.name for path in (tmp_path / "run").glob("checkpoint-*")} == {"checkpoint-3", "checkpoint-4"}


class Diary(TrainerCallback):
    def __init__(self):
        self.events, self.rates = [], []

    def _note(name):
        def note(self, args, state, control, **kwargs):
            self.events.append(name)

        return note

    on_train_begin, on_train_end = _note("train_begin"), _note("train_end")
    on_substep_end, on_save = _note("substep"), _note("save")
    on_evaluate, on_log = _note("evaluate"), _note("log")

    def on_step_end(self, args, state, control, **kwargs):
        self.events.append("step")

    def on_pre_optimizer_step(self, args, state, control, optimizer=None, **kwargs):
        self.rates.append([group["lr"] for group in optimizer.param_groups])


def test_callbacks_are_called(make_trainer, tmp_path):
    diary = Diary()
    fields = {"save_strategy": "steps", "save_steps": 2, "eval_strategy": "steps", "eval_steps": 4}
    make_trainer(callbacks=[diary], output_dir=str(tmp_path / "run"), **fields).train()
    events = diary.events
    assert (events[0], events[-1]) == ("train_begin", "train_end")
    expected = {"substep": 4, "step": 4, "save": 2, "evaluate": 1, "log": 4 + 1 + 1}  # one log each, and the summary
    assert {name: events.count(name) for name in expected} == expected


def test_a_callback_can_stop_the_run(make_trainer):
    class Stop(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            control.should_training_stop = state.global_step == 3

    trainer = make_trainer(callbacks=[Stop()], max_steps=8)
    trainer.train()
    assert trainer.state.global_step == 3


def test_a_linear_schedule_ends_at_exactly_0_for_policy_and_critic(make_trainer):
    """C48: at optimizer step s of 5 the rates are (5 - s) / 5 of their peaks, and 0 after the last."""
    diary = Diary()
    fields = {"learning_rate": 1e-3, "critic_learning_rate": 4e-3, "lr_scheduler_type": "linear", "max_steps": 5}
    trainer = make_trainer(callbacks=[diary], **fields)
    trainer.train()
    peaks = [group["initial_lr"] for group in trainer.optimizer.param_groups]
    assert {0.001, 0.004} == set(peaks)
    for step, rates in enumerate(diary.rates):
        assert rates == pytest.approx([peak * (5 - step) / 5 for peak in peaks], rel=1e-12)
    assert trainer.lr_scheduler.get_last_lr() == [0.0] * len(peaks)
    assert [group["lr"] for group in trainer.optimizer.param_groups] == [0.0] * len(peaks)


def groups_of(trainer):
    names = {parameter: name for name, parameter in trainer.model.named_parameters()}
    rates = {}
    for group in trainer.create_optimizer().param_groups:
        for parameter in group["params"]:
            rates[names[parameter]] = group["lr"]
    return rates


@pytest.mark.parametrize("critic", ["adapter", "head"])
@pytest.mark.parametrize(("given", "rate"), [(None, 1e-2), (3e-3, 3e-3)])
def test_the_critic_has_its_own_learning_rate(make_trainer, critic, given, rate):
    trainer = make_trainer(critic=critic, critic_learning_rate=given)
    rates = groups_of(trainer)
    assert rates.keys() == trained(trainer).keys(), "every trained weight is in one group"
    for name, found in rates.items():
        assert found == (rate if is_critic_parameter(name) else 1e-3), name
    head_only = [name for name in rates if is_critic_parameter(name)] == ["heads.critic.weight"]
    assert head_only == (critic == "head")


def test_weight_decay(make_trainer):
    """With a gradient clipped to nothing only the decay is left: each step takes `lr x weight_decay` of a weight."""
    fields = {"weight_decay": 0.5, "max_grad_norm": 1e-12, "lr_scheduler_type": "constant", "max_steps": 2}
    trainer = make_trainer(**fields, learning_rate=1e-2, critic_learning_rate=4e-2)
    before = trained(trainer)
    trainer.train()
    for name, after in trained(trainer).items():
        share = (1 - (4e-2 if is_critic_parameter(name) else 1e-2) * 0.5) ** 2
        assert_close(after, before[name] * share, atol=1e-6, rtol=1e-5)


def test_adams_settings(make_trainer):
    trainer = make_trainer(adam_beta1=0.8, adam_beta2=0.7, max_steps=1)
    for group in trainer.create_optimizer().param_groups:
        assert (group["betas"], group["eps"]) == ((0.8, 0.7), 1e-5)  # epsilon is PPO's default
    assert type(make_trainer(optim="sgd").create_optimizer()) is torch.optim.SGD


def test_num_train_epochs(make_trainer):
    """16 prompts in rollouts of 8, each in 2 epochs of 2 steps: 8 optimizer steps for each pass over the prompts."""
    fields = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 1, "steps_per_generation": 2}
    trainer = make_trainer(**fields, num_train_epochs=2, max_steps=-1)
    seen = []
    generate = trainer._generate_single_turn
    trainer._generate_single_turn = lambda ids, *args: seen.append([tuple(row) for row in ids]) or generate(ids, *args)
    trainer.train()
    assert trainer.state.global_step == 16
    assert [len(rows) for rows in seen] == [8] * 4
    for one, other in ((0, 1), (2, 3)):  # each pass has every prompt once
        assert len(set(seen[one] + seen[other])) == len(set(seen[0] + seen[1]))
    assert seen[:2] != seen[2:], "the second pass has an order of its own"


def test_the_seed_decides_everything(make_trainer):
    """C47: the same seed repeats bit for bit; another one samples other completions, which argmax would not."""
    found = []
    for seed in (1, 1, 2):
        trainer = make_trainer(seed=seed, shuffle_dataset=False)
        found.append((rollout(make_trainer(seed=seed))["completion_ids"].tolist(), moved(trainer), trainer))
    assert found[0][0] == found[1][0] != found[2][0]
    assert all(torch.equal(move, found[1][1][name]) for name, move in found[0][1].items())
    assert not any(torch.equal(move, found[2][1][name]) for name, move in found[0][1].items())
    assert logged(found[0][2], "loss") == logged(found[1][2], "loss") != logged(found[2][2], "loss")


def by_step(steps_to_scores):
    """A reward that depends on when it is asked, to make one evaluation the best."""

    def reward(prompts, **kwargs):
        return [steps_to_scores.get(reward.trainer.state.global_step, 0.0) + 0.01 * i for i in range(len(prompts))]

    return reward


@pytest.mark.parametrize("critic", slow_but(["adapter", "head"], "adapter"))
def test_the_best_checkpoint_is_loaded_for_policy_and_critic(make_trainer, tmp_path, critic):
    reward = by_step({2: 1.0, 4: 5.0, 6: 2.0})
    trainer = reward.trainer = make_trainer(
        reward_funcs=reward,
        critic=critic,
        critic_init="policy",
        max_steps=6,
        eval_strategy="steps",
        eval_steps=2,
        save_strategy="steps",
        save_steps=2,
        save_total_limit=2,
        load_best_model_at_end=True,
        metric_for_best_model="eval_reward",
        output_dir=str(tmp_path / "run"),
    )
    trainer.train()
    assert trainer.state.best_model_checkpoint == str(tmp_path / "run" / "checkpoint-4")
    assert trainer.state.best_metric == pytest.approx(5.0, abs=0.1)
    assert {path.name for path in (tmp_path / "run").glob("checkpoint-*")} == {"checkpoint-4", "checkpoint-6"}
    trainer.save_model(str(tmp_path / "final"))
    for file in ("adapter_model.safetensors", "critic/adapter_model.safetensors"):
        final = load_file(tmp_path / "final" / file)
        best, last = (load_file(tmp_path / "run" / f"checkpoint-{step}" / file) for step in (4, 6))
        assert all(torch.equal(weight, best[name]) for name, weight in final.items()), file
        assert any(not torch.equal(weight, last[name]) for name, weight in final.items()), file


def test_a_given_optimizer_is_used(make_trainer):
    """C49 in the trainer: with TensorFlow's epsilon the first steps are smaller than with torch's."""
    fields = {"max_steps": 1, "lr_scheduler_type": "constant"}
    largest = []
    for optimizer_class in (torch.optim.AdamW, TensorFlowAdamW):
        trainer = without_chance(make_trainer(**fields))
        parameters = [p for p in trainer.model.parameters() if p.requires_grad]
        trainer.optimizer = optimizer_class(parameters, lr=1e-3, eps=1e-2, weight_decay=0.0)
        moves = moved(trainer)
        assert isinstance(trainer.optimizer.optimizer, optimizer_class)
        assert all(move.any() for name, move in moves.items() if "lora_B" in name)
        largest.append(max(float(move.abs().max()) for move in moves.values()))
    assert 0 < largest[1] < largest[0] / 2


def test_a_given_optimizer_has_its_own_learning_rates(make_trainer):
    trainer = make_trainer(critic_learning_rate=1e-3)
    trainer.optimizer = torch.optim.SGD(trainer.model.parameters(), lr=1e-3)
    with pytest.raises(ValueError, match="`critic_learning_rate` has no effect on an optimizer that is given"):
        trainer.train()


def test_a_given_optimizer_that_leaves_the_critic_out_is_refused(make_trainer, tiny_model_path, sft_adapter):
    policy = load_policy(load_causal_lm(tiny_model_path), sft_adapter)
    optimizer = torch.optim.AdamW([p for p in policy.parameters() if p.requires_grad])
    trainer = make_trainer(model=policy, optimizers=(optimizer, None))
    with pytest.raises(ValueError, match=r"leaves out .* 'heads\.critic\.weight' among them.*trainer\.optimizer = "):
        trainer.train()


@pytest.mark.parametrize("critic", ["adapter", "head"])
def test_disable_dropout(make_trainer, tiny_model_path, critic):
    """Dropout of an adapter is off in policy and critic, unless the critic's copy would bring it back."""
    config = LoraConfig(task_type="CAUSAL_LM", r=4, target_modules="all-linear", lora_dropout=0.5)
    count = lambda completion_ids, **kwargs: [0.1 * len(ids) for ids in completion_ids]  # noqa: E731
    fields = {"model": tiny_model_path, "peft_config": config, "reward_funcs": count, "critic_init": "policy"}
    trainer = make_trainer(critic=critic, num_iterations=1, max_steps=2, **fields)
    trainer.train()
    assert logged(trainer, "ppo/ratio_max") == pytest.approx([1.0, 1.0], abs=1e-5)
    batch = rollout(trainer)
    trainer.model.train()
    again = trainer.critic.rollout(texts_of(batch), 8).values
    mask = batch["completion_mask"].bool()
    assert batch["old_values"][mask].abs().max() > 1e-4
    assert_close(again[mask], batch["old_values"][mask], atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize(
    "variant",
    [
        pytest.param({}, marks=pytest.mark.slow),
        {"critic": "head"},
        {"kl_estimator": "full", "kl_placement": "loss"},
    ],
)
def test_gradient_checkpointing_changes_no_number(make_trainer, variant):
    found = []
    for checkpointing in (False, True):
        trainer = without_chance(make_trainer(gradient_checkpointing=checkpointing, max_steps=3, **variant))
        found.append((moved(trainer), logged(trainer, "loss")))
    assert found[1][1] == pytest.approx(found[0][1], abs=1e-6)
    for name, move in found[0][0].items():
        assert_close(found[1][0][name], move, atol=1e-5, rtol=1e-3)


def test_a_checkpoint_without_its_state_is_refused(make_trainer, tmp_path):
    fields = {"save_strategy": "steps", "save_steps": 2, "output_dir": str(tmp_path / "run")}
    make_trainer(**fields, save_only_model=True).train()
    with pytest.raises(FileNotFoundError, match=r"has no ppo_state\.json: it is not a complete checkpoint"):
        make_trainer(**fields).train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-2"))


def test_logging_steps_average(make_trainer):
    """Every second step: the mean over the two, of the loss as of the metrics."""
    each = without_chance(make_trainer())
    each.train()
    every_second = without_chance(make_trainer(logging_steps=2))
    every_second.train()
    for name in ("loss", "ppo/approx_kl", "critic/value_loss"):
        single = logged(each, name)
        expected = [(single[0] + single[1]) / 2, (single[2] + single[3]) / 2]
        assert logged(every_second, name) == pytest.approx(expected, rel=1e-4, abs=1e-6), name


def test_prompts_that_the_run_does_not_need_are_no_harm(make_trainer, prompts):
    """Seventeen prompts in rollouts of 8: the last one has to wait for the next pass."""
    more = Dataset.from_list([*prompts, {"prompt": "it was not so good"}])
    trainer = make_trainer(dataset=more, num_train_epochs=1, max_steps=-1)
    trainer.train()
    assert trainer.state.global_step == 4


def test_training_twice_goes_on(make_trainer):
    """The second call uses the optimizer of the first, with its two learning rates."""
    trainer = make_trainer(critic_learning_rate=1e-2, lr_scheduler_type="constant", max_steps=2)
    trainer.train()
    optimizer, middle = trainer.optimizer, trained(trainer)
    trainer.train()
    assert {group["lr"] for group in trainer.optimizer.param_groups} == {1e-3, 1e-2}
    assert trainer.optimizer is optimizer
    assert all(not torch.equal(weight, middle[name]) for name, weight in trained(trainer).items())


def test_only_every_nth_layer_recomputes_after_a_rollout_too(make_trainer):
    """TRL turns recomputing off while it generates, and then on for every layer."""
    losses = []
    for kwargs in (None, {"every_n_layers": 2}):
        trainer = without_chance(
            make_trainer(gradient_checkpointing=kwargs is not None, gradient_checkpointing_kwargs=kwargs, max_steps=3)
        )
        trainer.train()
        losses.append([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
        layers = decoder_layers(trainer.roles.model.get_base_model())
        wanted = [False] * len(layers) if kwargs is None else [index % 2 == 0 for index in range(len(layers))]
        assert [layer.gradient_checkpointing for layer in layers] == wanted
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    assert len(losses[0]) > 0
