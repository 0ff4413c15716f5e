"""Runs that are resumed with other settings: each is honoured, or refused by its name; and runs that are over."""

import json
import logging
import shutil
from dataclasses import fields

import pytest
import torch
from peft import LoraConfig
from safetensors.torch import load_file, save_file
from torch.testing import assert_close
from trl import GRPOConfig

from rlhf_recipes import PPOConfig
from rlhf_recipes.models.roles import is_critic_parameter
from rlhf_recipes.ppo import resume
from tests.ppo.support import logged, slow_but, trained, without_chance

# Two micro-batches to a step, two minibatches, two epochs: four steps to a rollout.
SIZES = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2, "steps_per_generation": 4}
SIZES |= {"num_iterations": 2, "max_steps": 6}
SAVING = {"save_strategy": "steps", "save_steps": 1}


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    return tmp_path_factory.mktemp("settings")


@pytest.fixture
def saved(make_trainer, checkpoints):
    """A whole run of six steps with a checkpoint after each, trained once for all tests, and its logs."""
    folder = checkpoints / "run"
    if not (folder / "checkpoint-6").is_dir():
        without_chance(make_trainer(**SIZES, **SAVING, output_dir=str(folder))).train()
    return folder


def resumed(make_trainer, saved, step, **changes):
    trainer = without_chance(make_trainer(**SIZES | {"output_dir": str(saved.parent / "resumed")} | changes))
    trainer.train(resume_from_checkpoint=str(saved / f"checkpoint-{step}"))
    return trainer


def len_of(completion_ids, **kwargs):
    return [float(len(ids)) for ids in completion_ids]


def peaks(trainer):
    """Peak rates of the schedule, of the policy (False) and the critic (True)."""
    names = {parameter: name for name, parameter in trainer.model.named_parameters()}
    of_critic = [is_critic_parameter(names[group["params"][0]]) for group in trainer.optimizer.param_groups]
    return dict(zip(of_critic, trainer.lr_scheduler.base_lrs, strict=True))


@pytest.mark.parametrize("step", slow_but([2, 3, 4], 3, 4))
def test_other_micro_batches_go_on_with_the_same_steps(make_trainer, saved, step):
    """From 4 x 2 to 2 x 4, within a rollout and between two: the same losses, up to the order of their sums."""
    whole = resumed(make_trainer, saved, step)
    sizes = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4, "steps_per_generation": 8}
    other = resumed(make_trainer, saved, step, **sizes)
    assert other.state.global_step == 6
    assert len(logged(other, "loss")) == 6
    for name in ("loss", "kl", "ppo/approx_kl", "critic/value_loss"):
        # a fresh shuffle in each epoch permutes all rows, whatever the micro-batches
        assert logged(other, name) == pytest.approx(logged(whole, name), abs=2e-5), name
    for name, weight in trained(other).items():
        assert_close(weight, trained(whole)[name], atol=1e-4, rtol=1e-4)


REFUSED = [
    ({"num_iterations": 4}, 4, "`num_iterations` 4 .the checkpoint's: 2.: rollouts, and the steps on them"),
    ({"num_generations": 2}, 4, "`num_generations` 2 .the checkpoint's: 1."),
    ({"gradient_accumulation_steps": 4}, 4, "`gradient_accumulation_steps` 4 .the checkpoint's: 2."),
    ({"per_device_train_batch_size": 2}, 3, "`per_device_train_batch_size` 2 .the checkpoint's: 4."),
    ({"seed": 7}, 4, "`seed` 7 .the checkpoint's: 42.: the prompts would come in another order"),
    ({"shuffle_dataset": False}, 4, "`shuffle_dataset` False"),
    ({"optim": "sgd"}, 4, "`optim` sgd .*the state of another optimizer"),
    ({"critic": "head"}, 4, "`critic` head .*another critic"),
    ({"critic_layers": 1}, 4, "`critic_layers` 1 .*another critic"),
    ({"score_scaling": "running"}, 4, "`score_scaling` running .*moments of other scores"),
    (
        {"lr_scheduler_type": "reduce_lr_on_plateau", "eval_strategy": "steps"},
        4,
        "`lr_scheduler_type` .*another sched",
    ),
    ({"kl_placement": "loss"}, 3, "`kl_placement` loss .*lies within a rollout .*take one between two rollouts"),
    ({"loss_aggregation": "sequence"}, 3, "`loss_aggregation` sequence .*lies within a rollout"),
]


@pytest.mark.parametrize(("changes", "step", "message"), REFUSED, ids=[next(iter(row[0])) for row in REFUSED])
def test_settings_that_cannot_go_on_are_refused_before_anything_is_loaded(make_trainer, saved, changes, step, message):
    trainer = make_trainer(**SIZES | changes)
    before = trained(trainer)
    with pytest.raises(ValueError, match=f"This run cannot be resumed with {message}"):
        trainer.train(resume_from_checkpoint=str(saved / f"checkpoint-{step}"))
    assert all(torch.equal(weight, before[name]) for name, weight in trained(trainer).items())


def test_other_rates_hold_from_the_next_step_on(make_trainer, saved, caplog):
    """On the linear schedule of six steps: after step 4, (6 - 4) / 6 of the new peaks."""
    with caplog.at_level(logging.WARNING):
        trainer = resumed(make_trainer, saved, 4, learning_rate=3e-4, critic_learning_rate=6e-3, weight_decay=0.1)
    assert logged(trainer, "learning_rate")[4:] == pytest.approx([3e-4 * 2 / 6, 3e-4 * 1 / 6])
    assert {group["weight_decay"] for group in trainer.optimizer.param_groups} <= {0.1, 0.0}
    assert 0.1 in {group["weight_decay"] for group in trainer.optimizer.param_groups}
    assert peaks(trainer) == pytest.approx({False: 3e-4, True: 6e-3})
    (line,) = [record.message for record in caplog.records if "resumed with" in record.message]
    for part in ("`learning_rate` 0.0003 (the checkpoint's: 0.001)", "`critic_learning_rate` 0.006", "`weight_decay`"):
        assert part in line
    assert "from the next step on" in line


def test_another_schedule_and_more_steps(make_trainer, saved):
    trainer = resumed(make_trainer, saved, 6, lr_scheduler_type="constant", max_steps=7, adam_beta1=0.5)
    assert logged(trainer, "learning_rate")[-1] == pytest.approx(1e-3)
    assert {group["betas"] for group in trainer.optimizer.param_groups} == {(0.5, 0.999)}
    longer = resumed(make_trainer, saved, 6, max_steps=8)
    assert logged(longer, "learning_rate")[6:] == pytest.approx([1e-3 * 2 / 8, 1e-3 * 1 / 8])


def test_what_was_done_to_the_rates_meanwhile_stays(make_trainer, saved, tmp_path):
    """The alarm halves all rates: a resume with another peak keeps the half."""
    state = torch.load(saved / "checkpoint-4" / "scheduler.pt")
    optimizer = torch.load(saved / "checkpoint-4" / "optimizer.pt")
    folder = shutil.copytree(saved, tmp_path / "halved")
    state["base_lrs"] = [rate / 2 for rate in state["base_lrs"]]
    for group in optimizer["param_groups"]:
        group["lr"] /= 2
    torch.save(state, folder / "checkpoint-4" / "scheduler.pt")
    torch.save(optimizer, folder / "checkpoint-4" / "optimizer.pt")
    trainer = resumed(make_trainer, folder, 4, learning_rate=4e-4)
    assert logged(trainer, "learning_rate")[4:] == pytest.approx([2e-4 * 2 / 6, 2e-4 * 1 / 6])


def test_the_next_rollout_has_the_other_settings(make_trainer, saved, caplog):
    with caplog.at_level(logging.WARNING):
        trainer = resumed(make_trainer, saved, 3, kl_coef=0.3, temperature=0.5, critic_init="policy", entropy_coef=0.1)
    lines = [record.message for record in caplog.records if "resumed with" in record.message]
    assert len(lines) == 3
    assert "`entropy_coef` 0.1" in lines[0]
    assert "`temperature` 0.5" in lines[1]
    assert "`kl_coef` 0.3" in lines[1]
    assert "`critic_init` policy (the checkpoint's: None), without effect" in lines[2]
    assert logged(trainer, "kl_coef")[-1] == pytest.approx(0.3)
    assert logged(trainer, "ppo/entropy_coef")[-1] == 0.1


def test_every_tracked_setting_is_one(make_config):
    config = make_config()
    assert set(resume.settings_of(config, 1)) - {"processes"} <= {field.name for field in fields(PPOConfig)}
    own = {field.name for field in fields(PPOConfig)} - {field.name for field in fields(GRPOConfig)}
    assert own <= set(resume._TRACKED), "a field of PPO's own: say in resume.py what a resumed run does with it"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lora_alpha": 32}, "is not this run's policy, which has `lora_alpha` 32 .the checkpoint's: 8."),
        ({"use_rslora": True}, "`use_rslora` True .the checkpoint's: None."),
        ({"r": 4}, "`r` 4 .the checkpoint's: 8."),
        ({"target_modules": ["q_proj"]}, r"`target_modules` \['q_proj'\] .the checkpoint's: "),
        ({"alpha_pattern": {"q_proj": 32}}, "`alpha_pattern` {'q_proj': 32} .the checkpoint's: None."),
        (None, "holds an adapter .*, but this run trains a whole model"),
    ],
)
def test_another_adapter_than_that_of_the_checkpoint_is_refused(
    make_trainer, saved, tiny_model_path, changes, message
):
    """The same weights would be another policy."""
    fields = {"task_type": "CAUSAL_LM", "r": 8, "lora_alpha": 8, "target_modules": "all-linear"}
    peft_config = None if changes is None else LoraConfig(**fields | changes)
    trainer = make_trainer(model=tiny_model_path, peft_config=peft_config, **SIZES)
    with pytest.raises(ValueError, match=message):
        trainer.train(resume_from_checkpoint=str(saved / "checkpoint-4"))


def test_another_start_base_or_critic_is_refused(make_trainer, saved, tiny_model_path, sft_adapter, tmp_path):
    """The reference is what the run started from: with another one the KL would be another."""
    other = shutil.copytree(sft_adapter, tmp_path / "other")
    weights = load_file(other / "adapter_model.safetensors")
    save_file({name: -value for name, value in weights.items()}, other / "adapter_model.safetensors")
    checkpoint = str(saved / "checkpoint-4")
    with pytest.raises(ValueError, match="started from another `model` than this one, which is its reference"):
        make_trainer(model=str(other), **SIZES).train(resume_from_checkpoint=checkpoint)
    fields = {"task_type": "CAUSAL_LM", "r": 8, "lora_alpha": 8, "target_modules": "all-linear"}
    base = shutil.copytree(tiny_model_path, tmp_path / "base")
    elsewhere = make_trainer(model=str(base), peft_config=LoraConfig(**fields), reward_funcs=len_of, **SIZES)
    with pytest.raises(ValueError, match="but the base of `model` is '.*/base'. Resume with the base"):
        elsewhere.train(resume_from_checkpoint=checkpoint)
    folder = shutil.copytree(saved / "checkpoint-4", tmp_path / "checkpoint-4")
    config = json.loads((folder / "critic" / "adapter_config.json").read_text())
    (folder / "critic" / "adapter_config.json").write_text(json.dumps(config | {"lora_alpha": 16}))
    with pytest.raises(ValueError, match="is not this run's critic, which has `lora_alpha` 8 .the checkpoint's: 16."):
        make_trainer(**SIZES).train(resume_from_checkpoint=str(folder))


def test_a_checkpoint_of_weights_alone_is_refused(make_trainer, tmp_path):
    folder = tmp_path / "run"
    make_trainer(**SIZES | {"max_steps": 1}, **SAVING, save_only_model=True, output_dir=str(folder)).train()
    with pytest.raises(FileNotFoundError, match="`save_only_model` it lacks optimizer, schedule and rollout. Give"):
        make_trainer(**SIZES).train(resume_from_checkpoint=str(folder / "checkpoint-1"))


@pytest.mark.parametrize("how", ["path", "True"])
def test_a_run_that_is_over_makes_no_further_step(make_trainer, saved, how):
    """Six steps end within a pass over the prompts, where transformers would make a seventh."""
    trainer = make_trainer(**SIZES, output_dir=str(saved))
    output = trainer.train(resume_from_checkpoint=str(saved / "checkpoint-6") if how == "path" else True)
    assert (output.global_step, trainer.state.global_step, len(logged(trainer, "loss"))) == (6, 6, 6)
    again = make_trainer(**SIZES)
    again._load_from_checkpoint(str(saved / "checkpoint-6"))
    for name, weight in trained(trainer).items():
        assert torch.equal(weight, trained(again)[name]), name
    assert trainer._step == 12
