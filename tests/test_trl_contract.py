"""The seams of TRL, PEFT and bitsandbytes that the library leans on: a new version that moves one fails here first."""

import ast
import inspect
import re
import textwrap
from dataclasses import fields
from pathlib import Path

import pytest
import torch
import trl
from transformers import AutoModelForCausalLM, Trainer
from trl import GRPOConfig, GRPOTrainer, RewardTrainer, RLOOTrainer
from trl.trainer import grpo_trainer
from trl.trainer.utils import add_fused_lm_head

from rlhf_recipes.models.states import states_at, states_given

PPO = Path(__file__).resolve().parents[1] / "rlhf_recipes" / "ppo"

# Methods that PPOTrainer overrides or calls, with their parameters.
METHODS = {
    "__init__": (
        "self model reward_funcs args train_dataset eval_dataset processing_class reward_processing_classes callbacks "
        "optimizers quantization_config peft_config tools rollout_func environment_factory"
    ),
    "_calculate_rewards": "self inputs prompts completions completion_ids_list",
    "_compute_loss": "self model inputs",
    "_generate": "self prompts",
    "_generate_and_score_completions": "self inputs",
    "_generate_single_turn": "self prompt_ids images multimodal_fields num_generations has_tool_images",
    "_get_train_sampler": "self dataset",
    "_load_best_model": "self",
    "_load_from_checkpoint": "self resume_from_checkpoint model",
    "_load_optimizer_and_scheduler": "self checkpoint",
    "_prepare_for_training": "self max_steps train_dataloader resume_from_checkpoint",
    "_prepare_inputs": "self generation_batch",
    "_save": "self output_dir state_dict",
    "_save_checkpoint": "self model trial",
    "_save_optimizer_and_scheduler": "self output_dir",
    "_save_rng_state": "self output_dir",
    "_tokenize_prompts": "self prompts",
    "create_optimizer": "self model",
    "training_step": "self model inputs num_items_in_batch",
}
ATTRIBUTES = (
    "_buffered_inputs _logs _metrics _pending_extra_logs _pending_metrics _step eos_token_ids generation_config "
    "generation_kwargs num_completions_to_print "
    "reward_func_names reward_funcs reward_weights temperature"
)
CLASS_ATTRIBUTES = "_name _paper _tag_names loss_is_scaled_for_ga"
BATCH_KEYS = "prompt_ids prompt_mask completion_ids completion_mask advantages"
CONFIG_FIELDS = (
    "beta entropy_coef epsilon epsilon_high generation_batch_size log_completions loss_type max_completion_length "
    "mask_truncated_completions num_generations num_generations_eval num_iterations reward_weights "
    "steps_per_generation temperature"
)


def moved(what, reread):
    return f"TRL {trl.__version__}: {what}. Re-read {reread} against the new GRPOTrainer, then update this test."


def returned_lengths(method):
    """Lengths of the tuples that a method returns, from its source."""
    tree = ast.parse(textwrap.dedent(inspect.getsource(method)))
    returns = [node.value for node in ast.walk(tree) if isinstance(node, ast.Return)]
    return {len(value.elts) if isinstance(value, ast.Tuple) else 1 for value in returns}


@pytest.mark.parametrize("name", METHODS)
def test_methods_keep_their_parameters(name):
    parameters = " ".join(inspect.signature(getattr(GRPOTrainer, name)).parameters)
    assert parameters == METHODS[name], moved(f"`{name}` takes other parameters", "rlhf_recipes/ppo/trainer.py")


def test_per_token_logps_return_as_many_things_as_the_override():
    found = returned_lengths(GRPOTrainer._get_per_token_logps_and_entropies)
    assert found == {3}, moved("it no longer returns (logps, entropies, aux_loss)", "rlhf_recipes/ppo/trainer.py")


def test_the_output_layer_scores_the_labels_of_the_states_that_it_gets(tiny_model_path):
    """Labels of some states, with a hook that takes these, and of others that are given."""
    model = AutoModelForCausalLM.from_pretrained(tiny_model_path)
    ids = torch.tensor([[6, 7, 8, 9, 10]])
    add_fused_lm_head(model, temperature=0.7, outputs=("log_probs", "entropy"))
    with torch.no_grad():
        logps = (model(input_ids=ids).logits[0].double() / 0.7).log_softmax(-1)
        with states_at(model, torch.tensor([2, 3])) as states:
            found = model(input_ids=ids, shift_labels=ids[:, 3:], fused_lm_head=True)
        with states_given(model, states[0][:, 1:]):
            second = model(shift_labels=ids[:, 4:], fused_lm_head=True)
    assert torch.equal(second.log_probs, found.log_probs[:, 1:])
    message = moved("`fused_lm_head` scores other positions", "rlhf_recipes/ppo/passes.py")
    expected = logps[[2, 3], ids[0, 3:]].float()
    torch.testing.assert_close(found.log_probs[0], expected, atol=1e-5, rtol=1e-5, msg=message)
    entropy = -(logps.exp() * logps).sum(-1)[2:4].float()
    torch.testing.assert_close(found.entropy[0], entropy, atol=1e-5, rtol=1e-5, msg=message)
    assert states[0].shape == (1, 2, model.config.hidden_size)


def test_a_checkpoint_is_complete_when_its_trainer_state_is_written():
    source = inspect.getsource(Trainer._save_checkpoint)
    order = [
        "self.save_model(",
        "self._save_optimizer_and_scheduler(",
        "self._save_rng_state(",
        "self.state.save_to_json(",
        "rotate_checkpoints(",
    ]
    places = [source.find(call) for call in order]
    assert -1 not in places, moved("a checkpoint is written by other calls", "rlhf_recipes/checkpoints.py")
    assert places == sorted(places), moved("a checkpoint is written in another order", "rlhf_recipes/checkpoints.py")


def test_a_rollout_is_kept_for_the_steps_that_the_counter_says():
    source = inspect.getsource(GRPOTrainer._prepare_inputs)
    for line in (
        "self._step % generate_every == 0",
        "self._buffered_inputs[self._step % self.args.steps_per_generation]",
    ):
        assert line in source, moved("rollouts are kept differently", "rlhf_recipes/ppo/trainer.py")
    assert "self._step += 1" in inspect.getsource(GRPOTrainer.training_step), moved(
        "`_step`", "PPOTrainer.training_step"
    )


def test_a_turn_of_generation_returns_ids_and_logps():
    message = moved("`_generate_single_turn` no longer returns (ids, logps)", "PPOTrainer._generate_single_turn")
    assert returned_lengths(GRPOTrainer._generate_single_turn) == {2}, message


def test_tokenize_prompts_returns_three_values():
    message = moved("`_tokenize_prompts` no longer returns (ids, images, fields)", "PPOTrainer._calculate_rewards")
    assert returned_lengths(GRPOTrainer._tokenize_prompts) == {3}, message


@pytest.mark.parametrize("name", ATTRIBUTES.split())
def test_trainer_sets_the_attributes_that_are_read(name):
    found = re.search(rf"self\.{name}\b.*=", inspect.getsource(GRPOTrainer.__init__))
    assert found, moved(f"`__init__` no longer sets `{name}`", "rlhf_recipes/ppo/trainer.py")


@pytest.mark.parametrize("name", CLASS_ATTRIBUTES.split())
def test_trainer_has_the_class_attributes(name):
    assert hasattr(GRPOTrainer, name), moved(f"`{name}` is gone", "rlhf_recipes/ppo/trainer.py")


def test_loss_is_scaled_for_gradient_accumulation():
    message = moved("the trainer divides the loss by the accumulation steps", "share_of_step")
    assert GRPOTrainer.loss_is_scaled_for_ga is True, message


@pytest.mark.parametrize("key", BATCH_KEYS.split())
def test_rollout_has_the_keys_that_are_read(key):
    source = inspect.getsource(GRPOTrainer._generate_and_score_completions)
    assert f'"{key}": ' in source, moved(f"a rollout has no `{key}`", "PPOTrainer._generate_and_score_completions")


def test_log_probs_of_another_sampler_are_handed_on_without_an_engine_of_trl():
    source = inspect.getsource(GRPOTrainer._generate_and_score_completions)
    message = moved("`sampling_per_token_logps` is handed on differently", "`follow_sampler` in ppo/off_policy.py")
    assert 'if sampling_per_token_logps is not None:\n            output["sampling_per_token_logps"]' in source, (
        message
    )
    source = inspect.getsource(GRPOTrainer.__init__)
    message = moved(
        "`use_vllm` is read in another way", "PPOTrainer.__init__, which keeps TRL from an engine of its own"
    )
    assert source.count("args.use_vllm") == source.count("self.use_vllm = args.use_vllm") == 1, message


def test_old_logps_may_be_left_out_of_the_rollout():
    source = inspect.getsource(GRPOTrainer._generate_and_score_completions)
    message = moved("`old_per_token_logps` is handed on differently", "PPOTrainer._generate_and_score_completions")
    assert "if old_per_token_logps is not None:" in source, message


@pytest.mark.parametrize("name", CONFIG_FIELDS.split())
def test_config_has_the_fields_that_are_read(name):
    names = {field.name for field in fields(GRPOConfig)}
    assert name in names, moved(f"GRPOConfig has no `{name}`", "rlhf_recipes/ppo/config.py")


def test_every_seam_in_use_is_pinned():
    pinned = {*METHODS, *ATTRIBUTES.split(), *CLASS_ATTRIBUTES.split(), "_get_per_token_logps_and_entropies"}
    of_trl = {*dir(GRPOTrainer), *re.findall(r"self\.(_\w+)", inspect.getsource(grpo_trainer))}
    used = set()
    for path in PPO.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            used |= {node.attr} if isinstance(node, ast.Attribute) else set()
            used |= {node.name} if isinstance(node, ast.FunctionDef) else set()
    private = {name for name in used & of_trl if re.match(r"_[a-z]", name)}
    assert private <= pinned, f"pin {sorted(private - pinned)} in this test: they are internals of TRL"


# Methods that PreferenceTrainer overrides or calls, with their parameters.
# What `rlhf_recipes/ppo/group.py` overrides or calls of RLOO's trainer, which is no GRPO trainer.
RLOO_METHODS = {
    "__init__": METHODS["__init__"].removesuffix(" tools rollout_func environment_factory"),
    **{name: METHODS[name] for name in ("_calculate_rewards", "_load_best_model", "_load_from_checkpoint", "_save")},
    "_tokenize_prompts": "self prompts",
    "log": "self logs start_time",
}


@pytest.mark.parametrize("name", RLOO_METHODS)
def test_rloos_methods_keep_their_parameters(name):
    parameters = " ".join(inspect.signature(getattr(RLOOTrainer, name)).parameters)
    assert parameters == RLOO_METHODS[name], moved(f"`RLOOTrainer.{name}` changed", "rlhf_recipes/ppo/group.py")


@pytest.mark.parametrize("trainer", [GRPOTrainer, RLOOTrainer])
def test_adapters_get_a_reference_of_their_name_and_kl_is_a_mean_over_tokens(trainer):
    source, reread = inspect.getsource(trainer), "rlhf_recipes/ppo/group.py"
    assert 'model.add_adapter("ref", default_config)' in source, moved("the reference has another name", reread)
    assert re.search(r'_metrics\[mode\]\["kl"\]\.append', source), moved("the KL is logged elsewhere", reread)
    assert re.search(r"self\._metrics\b.*=", source), moved("`_metrics` is gone", reread)
    assert returned_lengths(trainer._tokenize_prompts) == {3}, moved("prompts come with other things", reread)


REWARD_METHODS = {
    "_prepare_dataset": "self dataset processing_class args dataset_name",
    "_save": "self output_dir state_dict",
    "_set_signature_columns_if_needed": "self",
    "compute_loss": "self model inputs return_outputs num_items_in_batch",
    "get_batch_samples": "self epoch_iterator num_batches device",
    "evaluation_loop": "self dataloader description prediction_loss_only ignore_keys metric_key_prefix",
}


@pytest.mark.parametrize("name", REWARD_METHODS)
def test_methods_of_the_reward_trainer_keep_their_parameters(name):
    parameters = " ".join(inspect.signature(getattr(RewardTrainer, name)).parameters)
    reread = "rlhf_recipes/reward_modeling/trainer.py"
    assert parameters == REWARD_METHODS[name], moved(f"`RewardTrainer.{name}` takes other parameters", reread)


def test_the_reward_trainer_has_what_is_read():
    source = inspect.getsource(RewardTrainer)
    reread = "rlhf_recipes/reward_modeling/trainer.py"
    for name in ("_metrics", "_total_train_tokens"):
        assert f"self.{name} = " in source, moved(f"`RewardTrainer` no longer sets `{name}`", reread)
    assert RewardTrainer.loss_is_scaled_for_ga is False, moved("the loss is scaled by the trainer itself", reread)
    assert "self.current_gradient_accumulation_steps" in inspect.getsource(Trainer), moved("gone", reread)


def test_seq_cls_trains_and_saves_the_score_head(tiny_model_path):
    from peft import LoraConfig, get_peft_model, get_peft_model_state_dict
    from transformers import AutoModelForSequenceClassification

    model = AutoModelForSequenceClassification.from_pretrained(tiny_model_path, num_labels=1)
    model = get_peft_model(model, LoraConfig(task_type="SEQ_CLS", target_modules="all-linear"))
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    message = "PEFT treats the head of a `SEQ_CLS` model otherwise. Re-read rlhf_recipes/models/{loading,roles}.py."
    assert "base_model.model.score.modules_to_save.default.weight" in trained, message
    assert "base_model.model.score.weight" in get_peft_model_state_dict(model), message


def test_peft_layers_keep_the_active_adapter_in_one_attribute():
    from peft.tuners.tuners_utils import BaseTunerLayer

    message = (
        "PEFT no longer has `BaseTunerLayer._active_adapter`. Re-read rlhf_recipes/models/roles.py (`Roles.use`)."
    )
    assert hasattr(BaseTunerLayer, "_active_adapter"), message


def test_bitsandbytes_repacking_has_its_switch():
    from bitsandbytes.nn import Linear4bit

    message = (
        "bitsandbytes no longer has `support_avx512bf16_for_cpu`. Re-read rlhf_recipes/models/loading.py: may a 4-bit "
        "layer still be trained on a CPU after an evaluation?"
    )
    assert hasattr(Linear4bit(64, 64), "support_avx512bf16_for_cpu"), message
