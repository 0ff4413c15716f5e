"""What PPOConfig accepts, what it refuses, and how it is stored."""

import json
import pickle

import pytest
from transformers import SchedulerType
from transformers.trainer_utils import IntervalStrategy
from transformers.training_args import OptimizerNames

from rlhf_recipes.models.roles import checkpoint_contexts


def test_one_completion_per_prompt_is_allowed(make_config):
    config = make_config(num_generations=1, per_device_train_batch_size=3, gradient_accumulation_steps=1)
    assert (config.num_generations, config.num_generations_eval, config.generation_batch_size) == (1, 1, 3)


def test_one_completion_per_prompt_with_evaluation_and_minibatches(make_config):
    config = make_config(eval_strategy="steps", eval_steps=1, steps_per_generation=6, per_device_eval_batch_size=5)
    assert (config.num_generations, config.steps_per_generation, config.generation_batch_size) == (1, 6, 24)


def test_groups_must_still_divide_the_rollout(make_config):
    with pytest.raises(ValueError, match="divisible by num_generations"):
        make_config(num_generations=3)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("gamma", 1.5, r"`gamma` must lie in \[0, 1\], got 1.5"),
        ("gae_lambda", -0.1, r"`gae_lambda` must lie in \[0, 1\]"),
        ("kl_coef", -0.1, "`kl_coef` must not be negative"),
        ("vf_coef", -1.0, "`vf_coef` must not be negative"),
        ("missing_eos_penalty", -1.0, "`missing_eos_penalty` must not be negative"),
        ("value_clip", 0.0, "`value_clip` must be positive"),
        ("beta", 0.1, "`beta` is 0.1, but PPO does not use it: .*`kl_coef`"),
        ("loss_type", "grpo", "`loss_type` is 'grpo', but PPO does not use it"),
        ("top_p", 0.9, "sampled from the policy itself"),
        ("repetition_penalty", 1.1, "sampled from the policy itself"),
        ("gae_lambda_alpha", 0.0, "`gae_lambda_alpha` must be positive, or null to turn it off"),
        ("max_completion_length", None, "`max_completion_length` must be at least 1, got None"),
        ("max_completion_length", 0, "`max_completion_length` must be at least 1, got 0"),
        ("placement_gamma", 1.2, r"`placement_gamma` must lie in \(0, 1\]"),
    ],
)
def test_values_that_are_refused(make_config, field, value, message):
    with pytest.raises(ValueError, match=message):
        make_config(**{field: value})


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"target_kl": 6.0, "max_completion_length": 60},
            r"6.0 nats for each token.*divided by .*\(60\) that is 0.1;",
        ),
        ({"target_kl": 6.0}, "`kl_target` and `kl_controller: adaptive`"),
        (
            {"kl_controller": "adaptive", "kl_target_per": "token"},
            r"`kl_target` is 6.0 nats for each token.* is 0.75\.",
        ),
        ({"kl_target_per": "token", "kl_target": 0.1}, "`kl_controller: fixed` does not read"),
        ({"whiten_unbiased": True, "whiten_advantages": False}, "`whiten_unbiased` is about whitening"),
    ],
)
def test_a_kl_in_the_unit_of_the_other_is_refused(make_config, fields, message):
    with pytest.raises(ValueError, match=message):
        make_config(**fields)


def test_usual_targets_are_accepted(make_config):
    assert make_config(target_kl=1.0, kl_controller="adaptive", kl_target_per="token", kl_target=1.0).target_kl == 1.0
    assert make_config(whiten_unbiased=True, whiten_rewards=True, whiten_advantages=False).whiten_unbiased


WRONG_KINDS = {
    "kl_placement": ("rewards", "'reward' or 'loss'"),
    "kl_anchor": ("ref", "'reference' or 'old'"),
    "kl_controller": ("Adaptive", "'fixed' or 'adaptive'"),
    "kl_estimator": ("k9", "'k1' or 'k2'"),
    "advantage_estimator": ("GAE", "'gae' or 'bandit'"),
    "critic_init": ("foo", "'reward' or 'policy'"),
    "whiten_advantages": ("no", "true or false"),
    "num_iterations": (2.5, "a whole number"),
    "max_completion_length": (6.5, "a whole number"),
    "critic_layers": (1.5, "a whole number"),
    "gamma": ("1", "a number"),
    "value_clip": (True, "a number"),
    "reward_weights": (1.0, "a list of items"),
    "generation_kwargs": ([1], "a mapping"),
    "chat_template_kwargs": ("x", "a mapping, or one as JSON, got 'x'"),
}


@pytest.mark.parametrize("field", WRONG_KINDS)
def test_words_and_kinds_that_a_field_does_not_know_are_refused(make_config, field):
    """Also from Python, where no parser has looked at them: a misspelt `kl_placement` would turn the penalty off."""
    value, allowed = WRONG_KINDS[field]
    with pytest.raises(ValueError, match=f"`{field}` must be .*{allowed}"):
        make_config(**{field: value})


@pytest.mark.parametrize(
    "field",
    ["temperature", "num_generations", "num_iterations", "per_device_train_batch_size", "steps_per_generation"],
)
def test_sizes_start_at_one(make_config, field):
    with pytest.raises(ValueError, match=f"`{field}` must be positive,.* got 0"):
        make_config(**{field: 0})


def test_what_transformers_takes_beside_plain_values_is_taken(make_config, tmp_path):
    """Members of its enumerations, paths, and mappings as JSON."""
    words = {"eval_strategy": IntervalStrategy.NO, "optim": OptimizerNames.ADAMW_TORCH, "warmup_steps": 1}
    words |= {"lr_scheduler_type": SchedulerType.CONSTANT, "generation_kwargs": '{"use_cache": true}'}
    config = make_config(output_dir=tmp_path, **words)
    assert (config.generation_kwargs, config.optim) == ({"use_cache": True}, "adamw_torch")


def test_a_rollout_of_one_completion_is_refused(make_config):
    with pytest.raises(ValueError, match="rollout of one completion"):
        make_config(per_device_train_batch_size=1, gradient_accumulation_steps=1)


def test_checkpointing_restores_the_adapter_and_is_stored_without_code(make_config):
    config = make_config(gradient_checkpointing=True)
    assert config.gradient_checkpointing_kwargs == {"use_reentrant": False, "context_fn": checkpoint_contexts}
    assert json.loads(config.to_json_string())["gradient_checkpointing_kwargs"] == {"use_reentrant": False}
    assert pickle.loads(pickle.dumps(config)).gradient_checkpointing_kwargs["context_fn"] is checkpoint_contexts


def test_reentrant_checkpointing_is_refused(make_config):
    with pytest.raises(ValueError, match="use_reentrant"):
        make_config(gradient_checkpointing=True, gradient_checkpointing_kwargs={"use_reentrant": True})


@pytest.mark.parametrize(
    ("name", "value", "instead"),
    [
        ("temperature", 0.2, "the field `temperature`"),
        ("do_sample", False, "sampled from the policy itself"),
        ("num_beams", 4, "sampled from the policy itself"),
        ("top_p", 0.9, "sampled from the policy itself"),
        ("top_k", None, "sampled from the policy itself"),  # for transformers 50
        ("top_h", 0.3, "sampled from the policy itself"),
        ("typical_p", 0.9, "sampled from the policy itself"),
        ("suppress_tokens", [5], "sampled from the policy itself"),
        ("bad_words_ids", [[5]], "sampled from the policy itself"),
        ("guidance_scale", 1.5, "sampled from the policy itself"),
        ("no_repeat_ngram_size", 2, "sampled from the policy itself"),
        ("exponential_decay_length_penalty", [2, 1.1], "sampled from the policy itself"),
        ("min_new_tokens", 3, "sampled from the policy itself"),
        ("a_setting_of_a_later_version", 1, "sampled from the policy itself"),
        ("num_return_sequences", 2, "`num_generations`"),
        ("max_new_tokens", 5, "`max_completion_length`"),
        ("stop_strings", ["."], "`truncate_tokens`"),
        ("eos_token_id", 7, "generation_config.json"),
        ("cache_implementation", "static", "the field `cache_implementation`"),
    ],
)
def test_generation_kwargs_that_change_what_is_sampled_are_refused(make_config, name, value, instead):
    with pytest.raises(ValueError, match=rf"`generation_kwargs` sets `{name}` to .*{instead}"):
        make_config(generation_kwargs={"use_cache": True, name: value})


def test_generation_kwargs_may_say_how_memory_is_used_and_what_holds_anyway(make_config):
    given = {"use_cache": True, "prefill_chunk_size": 4, "top_p": 1.0, "top_k": 0, "num_beams": 1, "temperature": 0.7}
    assert make_config(generation_kwargs=given, temperature=0.7).generation_kwargs == given


@pytest.mark.parametrize(("inherited", "fields"), [("bf16", {}), ("fp16", {}), ("bf16", {"fp16": True})])
def test_the_precision_in_force_is_the_one_that_is_kept(make_config, monkeypatch, caplog, inherited, fields):
    """An environment variable of accelerate holds where the configuration asks for nothing."""
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", inherited)
    config = make_config(**fields)
    in_force = "fp16" if fields else inherited
    assert config.mixed_precision == in_force
    assert {name: getattr(config, name) for name in ("bf16", "fp16")} == {
        "bf16": in_force == "bf16",
        "fp16": in_force == "fp16",
    }
    assert ("ACCELERATE_MIXED_PRECISION sets" in caplog.text) == (not fields)
