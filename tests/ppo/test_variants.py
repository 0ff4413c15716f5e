"""Every way to set PPO up trains, keeps what must not move, and continues from its checkpoint exactly."""

import itertools
import math

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from torch.testing import assert_close
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    BitsAndBytesConfig,
)

from rlhf_recipes.models import load_causal_lm
from rlhf_recipes.models.roles import is_critic_parameter
from tests.ppo.support import slow_but

FOUR_BIT = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)


def count(completion_ids, **kwargs):
    return [0.1 * len(ids) for ids in completion_ids]


def dense(completion_ids, **kwargs):
    return [[0.1 * (token % 3) for token in ids] for ids in completion_ids]


def potential(completion_ids, **kwargs):
    return [[0.5 * position for position in range(len(ids))] for ids in completion_ids]


VARIANTS = {
    "terminal": {},
    "discounted": {"reward_placement": "discounted"},
    "every_token": {"reward_placement": "every_token"},
    "redistributed": {"reward_placement": "redistributed"},
    "attention": {"reward_placement": "attention"},
    "placement": {"placement": lambda scores, mask: scores[:, None] * mask / 5},
    "potential": {"potential": potential},
    "full_kl_in_reward": {"kl_estimator": "full"},
    "full_kl_in_loss": {"kl_estimator": "full", "kl_placement": "loss"},
    "full_kl_to_old": {"kl_estimator": "full", "kl_placement": "loss", "kl_anchor": "old"},
    "k1_in_loss": {"kl_placement": "loss"},
    "k2_in_loss": {"kl_placement": "loss", "kl_estimator": "k2"},
    "k3_to_old": {"kl_estimator": "k3", "kl_placement": "loss", "kl_anchor": "old"},
    "adaptive": {"kl_controller": "adaptive", "kl_target": 0.01, "kl_horizon": 16},
    "bandit": {
        "advantage_estimator": "bandit",
        "loss_aggregation": "sequence",
        "importance_sampling_level": "sequence_product",
    },
    "gspo": {"importance_sampling_level": "sequence", "loss_aggregation": "sequence"},
    "vapo": {"gae_lambda_alpha": 0.5, "critic_lambda": 1.0},
    "fixed_length": {"loss_aggregation": "fixed", "delta": 3.0, "epsilon_high": 0.3},
    "whitened": {"whiten_rewards": True, "score_scaling": "running"},
    "penalties": {
        "score_scaling": "batch",
        "score_clip": 1.0,
        "missing_eos_penalty": 1.0,
        "missing_eos_mode": "replace",
        "length_penalty": 0.01,
        "overlong_buffer": 4,
        "ngram_penalty": 0.5,
    },
    "reference_mean": {"subtract_reference_mean": True},
    "entropy": {"use_adaptive_entropy": True, "entropy_target": 9.0, "entropy_coef": 0.01},
    "stops": {"target_kl": 1e-6, "ratio_threshold": 1.5},
    "warm_up": {"critic_warmup_steps": 3, "critic_learning_rate": 1e-2},
    "head": {"critic": "head"},
    "zero_head": {"critic_init": "policy"},
    "ptx": {"ptx_coef": 0.5, "ptx_max_length": 12, "ptx_batch_size": 2},
}


@pytest.fixture
def texts(tiny_texts):
    return Dataset.from_list([{"text": text} for text in tiny_texts[:5]])


def trained(trainer):
    return {name: p.detach().clone() for name, p in trainer.model.named_parameters() if p.requires_grad}


# Those that every run of the suite tries: of each part of a step the one that is furthest from the default
FAST = "redistributed full_kl_in_loss adaptive bandit penalties head ptx".split()


@pytest.mark.parametrize("name", slow_but(VARIANTS, *FAST))
def test_it_trains_and_resumes_exactly_in_the_middle_of_a_rollout(make_trainer, texts, tmp_path, name):
    fields = {"steps_per_generation": 4, "per_device_train_batch_size": 2, "max_steps": 5, **VARIANTS[name]}
    fields |= {"save_strategy": "steps", "save_steps": 3, "output_dir": str(tmp_path / "run")}
    if name == "ptx":
        fields["ptx_dataset"] = texts
    whole = make_trainer(**fields)
    before = trained(whole)
    whole.train()
    after = trained(whole)
    for critic in (False, True):
        assert any(not torch.equal(after[n], before[n]) for n in before if is_critic_parameter(n) == critic), critic
    losses = [entry["loss"] for entry in whole.state.log_history if "loss" in entry]
    assert len(losses) == 5
    assert all(math.isfinite(loss) for loss in losses)

    resumed = make_trainer(**fields | {"output_dir": str(tmp_path / "resumed")})
    resumed.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-3"))
    for n, parameter in trained(resumed).items():
        assert torch.equal(parameter, after[n]), n
    assert [e["loss"] for e in resumed.state.log_history if "loss" in e] == losses
    assert resumed.kl_coef == whole.kl_coef


@pytest.mark.parametrize("rewards", [dense, [dense, count]], ids=["tokens", "tokens_and_score"])
def test_rewards_per_token_are_paid_where_they_were_given(make_trainer, rewards):
    trainer = make_trainer(
        reward_funcs=rewards,
        critic_init="policy",
        kl_coef=0.0,
        gae_lambda=1.0,
        whiten_advantages=False,
        missing_eos_penalty=2.0,
    )
    trainer.model.train()
    batch = trainer._generate_and_score_completions([trainer.train_dataset[i] for i in range(8)])
    for row in range(8):
        ids = batch["completion_ids"][row][batch["completion_mask"][row].bool()].tolist()
        tokens = dense([ids])[0]
        tokens[-1] += (0.1 * len(ids) if isinstance(rewards, list) else 0.0) - 2.0 * (ids[-1] != 1)
        returns = [sum(tokens[t:]) for t in range(len(ids))]
        assert_close(batch["returns"][row, : len(ids)], torch.tensor(returns), atol=1e-5, rtol=1e-5)


def test_a_completion_as_one_action_takes_no_rewards_per_token(make_trainer):
    trainer = make_trainer(reward_funcs=dense, critic_init="policy", **VARIANTS["bandit"])
    with pytest.raises(ValueError, match="'dense' returned rewards per token, but `advantage_estimator: bandit`"):
        trainer.train()


def test_a_checkpoint_without_its_rollout_is_not_resumed(make_trainer, tmp_path):
    fields = {"save_strategy": "steps", "save_steps": 1, "output_dir": str(tmp_path / "run"), "max_steps": 2}
    make_trainer(**fields).train()
    (tmp_path / "run" / "checkpoint-1" / "rollout_0.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="saved within a rollout, but the rollout of process 0 is not in it"):
        make_trainer(**fields).train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-1"))


# Every run of the suite has each pair of two choices
PAIRWISE = {("llama", True, "adapter"), ("llama", False, "head"), ("llama", True, "model")}
PAIRWISE |= {("gpt2", False, "adapter"), ("gpt2", True, "head"), ("gpt2", False, "model")}
CHOICES = [
    pytest.param(*choice, id="-".join([choice[0], "lora" if choice[1] else "whole", choice[2]]), marks=marks)
    for choice in itertools.product(["llama", "gpt2"], [True, False], ["adapter", "head", "model"])
    for marks in [[] if choice in PAIRWISE else pytest.mark.slow]
]


@pytest.mark.parametrize(("architecture", "lora", "critic"), CHOICES)
def test_with_and_without_an_adapter(make_trainer, tiny_model_path, gpt2_path, tmp_path, architecture, lora, critic):
    path = tiny_model_path if architecture == "llama" else gpt2_path
    fields = {
        "model": path,
        "peft_config": LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear") if lora else None,
        "reward_funcs": count,
        "critic": critic,
        "critic_init": "policy",
        "steps_per_generation": 2,
        "save_strategy": "steps",
        "save_steps": 3,
        "max_steps": 4,
        "output_dir": str(tmp_path / "run"),
    }
    if critic == "model":
        fields["critic_model"] = AutoModelForSequenceClassification.from_pretrained(path, num_labels=1)
    whole = make_trainer(**fields)
    whole.train()
    after = trained(whole)
    first = next(entry for entry in whole.state.log_history if "kl" in entry)
    assert first["kl"] == pytest.approx(0.0, abs=1e-5)
    assert first["critic/value_mean"] == pytest.approx(0.0, abs=1e-6)  # the head starts at zero

    whole.save_model(str(tmp_path / "saved"))
    if not lora:
        saved = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
        for name, parameter in saved.named_parameters():
            assert torch.equal(parameter, dict(whole.model.named_parameters())[name]), name
        assert not any("critic" in name or "frozen" in name for name in saved.state_dict())
        reference = load_causal_lm(path)
        for name, parameter in reference.named_parameters():  # the reference stayed what the policy was
            frozen = dict(whole.roles.model.get_base_model().named_parameters())
            match = name if name in frozen else name.replace(".weight", ".base_layer.weight")
            match = match if match in frozen else name.replace(".bias", ".base_layer.bias")
            assert torch.equal(frozen[match], parameter), name

    if critic == "model":
        fields["critic_model"] = AutoModelForSequenceClassification.from_pretrained(path, num_labels=1)
    resumed = make_trainer(**fields | {"output_dir": str(tmp_path / "resumed")})
    resumed.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-3"))
    for name, parameter in trained(resumed).items():
        assert torch.equal(parameter, after[name]), name


IN_4_BITS = ["full_kl_in_loss", "ptx", "redistributed", "attention", "k1_in_loss"]


@pytest.mark.parametrize("name", slow_but(IN_4_BITS, "full_kl_in_loss", "ptx", "redistributed"))
def test_on_a_4_bit_base_with_checkpointing(make_trainer, texts, name):
    fields = {"ptx_dataset": texts} if name == "ptx" else {}
    trainer = make_trainer(
        quantization_config=FOUR_BIT, gradient_checkpointing=True, max_steps=2, **fields, **VARIANTS[name]
    )
    before = trained(trainer)
    trainer.train()
    assert any(not torch.equal(p, before[n]) for n, p in trained(trainer).items())
