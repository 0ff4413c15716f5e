"""What is refused, with the names and the fix; and how a run stops when its loss is no number any more."""

import dataclasses
import hashlib

import pytest
import torch
from accelerate.parallelism_config import ParallelismConfig
from datasets import Dataset
from peft import LoraConfig
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification, TrainerCallback

from rlhf_recipes import PPOTrainer
from rlhf_recipes.checkpoints import check_output_dir
from rlhf_recipes.models.loading import load_causal_lm
from rlhf_recipes.models.roles import CRITIC
from rlhf_recipes.ppo import config as ppo_config
from rlhf_recipes.ppo.unused import NOT_HONOURED
from tests.ppo.support import trained

BANDIT = {"advantage_estimator": "bandit", "loss_aggregation": "sequence"}

# Fields that contradict each other; the fields that the message must name; the fix that it must tell.
CONTRADICTIONS = [
    ({"kl_anchor": "old"}, ["kl_anchor"], "Set `kl_placement: loss`"),
    ({"kl_controller": "adaptive", "kl_coef": 0.0}, ["kl_controller", "kl_coef"], "Set a `kl_coef`"),
    (
        {"kl_controller": "adaptive", "kl_anchor": "old", "kl_placement": "loss"},
        ["kl_controller", "kl_anchor"],
        "Set it to `reference`",
    ),
    ({**BANDIT, "reward_placement": "uniform"}, ["advantage_estimator", "reward_placement"], "Set it to `terminal`"),
    ({**BANDIT, "gae_lambda_alpha": 0.1}, ["advantage_estimator", "gae_lambda_alpha"], "Remove it"),
    ({**BANDIT, "critic_lambda": 0.5}, ["advantage_estimator", "critic_lambda"], "Remove it"),
    ({**BANDIT, "gamma": 0.9}, ["advantage_estimator", "gamma"], "Remove it"),
    ({**BANDIT, "loss_aggregation": "token"}, ["advantage_estimator"], "Set `loss_aggregation: sequence`"),
    (
        {"reward_placement": "redistributed", "score_scaling": "batch"},
        ["reward_placement", "score_scaling"],
        "choose another placement",
    ),
    ({"reward_placement": "redistributed", "score_clip": 1.0}, ["reward_placement", "score_clip"], "Remove these"),
    ({"kl_controller": "adaptive", "kl_horizon": 1}, ["kl_horizon", "kl_coef"], "Raise it"),
    ({"missing_eos_mode": "replace"}, ["missing_eos_mode", "missing_eos_penalty"], "needs `missing_eos_penalty`"),
    (
        {"score_scaling": "batch", "subtract_reference_mean": True},
        ["score_scaling", "subtract_reference_mean"],
        "Remove `subtract_reference_mean`",
    ),
    ({"overlong_buffer": 9}, ["overlong_buffer", "max_completion_length"], "Lower it"),
    (
        {"critic_warmup_explained_variance": 0.3},
        ["critic_warmup_explained_variance", "critic_warmup_steps"],
        "Set `critic_warmup_steps`",
    ),
    (
        {"critic_warmup_steps": 1, "max_steps": 4, "num_iterations": 4},
        ["critic_warmup_steps", "max_steps"],
        "Raise `max_steps`",
    ),
    ({"delta": 1.2}, ["delta", "epsilon"], "larger than 1"),
    ({"delta": 1.35, "epsilon_high": 0.4}, ["delta", "epsilon_high"], "larger than 1"),
    ({"kl_target_per": "token"}, ["kl_target_per", "kl_controller"], "Set it to `adaptive`"),
    (
        {"kl_target_per": "token", "kl_controller": "adaptive"},
        ["kl_target", "kl_target_per"],
        "remove `kl_target_per`",
    ),
    ({"target_kl": 5.0}, ["target_kl", "max_completion_length"], "usual are 0.01 to 0.1"),
    (
        {"whiten_unbiased": True, "whiten_advantages": False},
        ["whiten_unbiased", "whiten_advantages", "whiten_rewards"],
        "Remove it",
    ),
    ({"truncate_tokens": []}, ["truncate_tokens"], "Name a token"),
    ({"truncate_after": 2}, ["truncate_after", "truncate_tokens"], "remove `truncate_after`"),
    (
        {"truncate_tokens": ["."], "truncate_after": 8},
        ["truncate_after", "max_completion_length"],
        "the last position of a completion is `max_completion_length` - 1 = 7",
    ),
    (
        {"truncate_tokens": ["."], "reward_placement": "attention"},
        ["truncate_tokens", "reward_placement: attention"],
        "Choose another placement",
    ),
    ({"tensorflow_adam": True, "optim": "adafactor"}, ["tensorflow_adam", "optim"], "Remove one of the two"),
    ({"ptx_batch_size": 2}, ["ptx_batch_size", "ptx_coef"], "remove `ptx_batch_size`"),
]


def ids_of(rows):
    return [",".join(row[0]) for row in rows]


@pytest.mark.parametrize(("fields", "names", "fix"), CONTRADICTIONS, ids=ids_of(CONTRADICTIONS))
def test_contradictions_are_refused(make_config, fields, names, fix):
    with pytest.raises(ValueError, match=".") as raised:
        make_config(**fields)
    assert all(f"`{name}" in str(raised.value) for name in names), raised.value
    assert fix in str(raised.value), raised.value


def test_no_contradiction_is_forgotten_here(make_config):
    """Each message that the source has comes up in the rows above, and at the edge of it a configuration is fine."""
    messages = ppo_config.contradictions(make_config())
    seen = set()
    for fields, _, _ in CONTRADICTIONS:
        with pytest.raises(ValueError, match=".") as raised:
            make_config(**fields)
        seen.add("".join(letter for letter in str(raised.value) if not letter.isdigit()))
    assert len(seen) == len(messages)
    for fields in (
        {"kl_anchor": "old", "kl_placement": "loss"},
        {**BANDIT},
        {"overlong_buffer": 8},
        {"critic_warmup_steps": 1, "max_steps": 5, "num_iterations": 4},
        {"critic_warmup_steps": 3, "max_steps": 4, "num_iterations": 4, "critic_warmup_explained_variance": 0.3},
        {"delta": 1.21},
        {"kl_controller": "adaptive", "kl_horizon": 2},
        {"missing_eos_mode": "replace", "missing_eos_penalty": 1.0},
        {"critic_warmup_explained_variance": 0.3, "critic_warmup_steps": 1},
        {"ptx_batch_size": 2, "ptx_coef": 0.1},
        {"truncate_tokens": ["."], "truncate_after": 7},
        {"tensorflow_adam": True},
    ):
        make_config(**fields)


OTHER_VALUES = {
    "beta": 0.04,
    "loss_type": "grpo",
    "scale_rewards": "none",
    "multi_objective_aggregation": "normalize_then_sum",
    "off_policy_mask_threshold": 0.5,
    "top_entropy_quantile": 0.5,
    "sync_ref_model": True,
    "top_p": 0.9,
    "top_k": 5,
    "min_p": 0.1,
    "repetition_penalty": 1.1,
    "neftune_noise_alpha": 5.0,
    "use_transformers_continuous_batching": True,
    "use_liger_kernel": True,
    "vllm_enable_sleep_mode": True,
    "vllm_structured_outputs_regex": "a+",
    "vllm_server_host": "127.0.0.1",
    "vllm_server_port": 8001,
    "vllm_group_port": 51217,
    "vllm_tensor_parallel_size": 2,
    "vllm_importance_sampling_cap": 2.0,
    "ref_model_mixup_alpha": 0.5,
    "ref_model_sync_steps": 8,
    "sapo_temperature_neg": 1.0,
    "sapo_temperature_pos": 1.1,
    "vespo_k_pos": 1.0,
    "vespo_lambda_pos": 1.0,
    "vespo_k_neg": 1.0,
    "vespo_lambda_neg": 1.0,
    "use_bias_correction_kl": False,
    "use_transformers_paged": True,
    "transformers_continuous_batching_config": {"max_memory_percent": 0.5},
    "max_tool_calling_iterations": 2,
    "log_multimodal": False,
    "ds3_gather_for_generation": False,
    "liger_kernel_config": {"rope": True},
    "parallelism_config": ParallelismConfig(),
    "torch_compile": True,
    "data_seed": 7,
    "train_sampling_strategy": "sequential",
    "length_column_name": "size",
    "average_tokens_across_devices": False,
    "label_smoothing_factor": 0.1,
    "bf16_full_eval": True,
    "fp16_full_eval": True,
}


@pytest.mark.parametrize("name", NOT_HONOURED)
def test_fields_of_grpo_that_ppo_does_not_use_are_refused(make_config, name):
    with pytest.raises(ValueError, match=f"(?s)`{name}` is .*, but PPO does not use it: .* Remove it"):
        make_config(**{name: OTHER_VALUES[name]})


@pytest.mark.parametrize("name", [*ppo_config._SHARES, *ppo_config._NOT_NEGATIVE, *ppo_config._POSITIVE])
def test_values_out_of_range_are_refused(make_config, name):
    with pytest.raises(ValueError, match=f"`{name}` must .*, got -1"):
        make_config(**{name: -1})


def test_arguments_of_the_trainer_that_contradict_the_configuration_are_refused(make_trainer, tiny_model_path):
    def potential(completion_ids, **kwargs):
        return [[0.0] * len(ids) for ids in completion_ids]

    def placed(scores, mask):
        return scores[:, None] * mask

    def count(completion_ids, **kwargs):
        return [float(len(ids)) for ids in completion_ids]

    texts = Dataset.from_list([{"text": "it was good"}])
    classifier = AutoModelForSequenceClassification.from_pretrained(tiny_model_path, num_labels=1)
    functions = {"reward_funcs": count, "critic_init": "policy"}
    bandit, other = "`advantage_estimator: bandit`", "`reward_placement: "
    cases = [
        ({**BANDIT, "placement": placed}, f"{bandit}.*no use for `placement` or `potential`. Remove them"),
        ({**BANDIT, "potential": potential}, f"{bandit}.*`potential`.*set the estimator to `gae`"),
        ({"placement": placed, "reward_placement": "uniform"}, f"Both `placement` and {other}uniform`.*only one"),
        ({"ptx_coef": 0.1}, "`ptx_coef` is 0.1, and `ptx_dataset` is missing"),
        ({"ptx_dataset": texts}, "`ptx_coef` is 0.0, and `ptx_dataset` is given"),
        ({"critic": "model"}, "`critic` is 'model', and `critic_model` is missing"),
        ({"critic_model": classifier}, "`critic: adapter`, `critic_model` is the folder `critic`"),
        ({**functions, "reward_placement": "redistributed"}, f"{other}redistributed` reads a reward adapter.*Add"),
        ({**functions, "reward_placement": "attention"}, f"{other}attention` reads a reward adapter.*`uniform`"),
        (
            {"reward_funcs": count, "critic_init": "reward"},
            "`critic_init` is 'reward', but no reward adapter.*leave `critic_init` out",
        ),
    ]
    for fields, message in cases:
        with pytest.raises(ValueError, match=message):
            make_trainer(**fields)


def test_attention_of_two_adapters_is_refused(make_trainer, reward_adapter):
    with pytest.raises(ValueError, match="follows one reward adapter, but there are several. Keep one"):
        make_trainer(reward_funcs=[str(reward_adapter)] * 2, reward_placement="attention")


def test_an_adapter_on_the_output_layer_is_refused(make_trainer, tiny_model_path):
    base = load_causal_lm(tiny_model_path)
    base.config.tie_word_embeddings = True
    base.tie_weights()
    config = LoraConfig(task_type="CAUSAL_LM", trainable_token_indices=[3, 4])
    fields = {"reward_funcs": lambda completion_ids, **kwargs: [0.0] * len(completion_ids), "critic_init": "policy"}
    with pytest.raises(ValueError, match=r"An adapter is on the output layer.*modules_to_save=\['lm_head'\]"):
        make_trainer(model=base, peft_config=config, **fields)


@pytest.mark.parametrize(
    ("potential", "message"),
    [
        (lambda completion_ids, **kwargs: [[0.0] * (len(ids) + 1) for ids in completion_ids], "finite numbers for"),
        (lambda completion_ids, **kwargs: [[float("nan")] * len(ids) for ids in completion_ids], "finite numbers for"),
        (lambda completion_ids, **kwargs: [[0.0] * len(ids) for ids in completion_ids[1:]], "must return 8 lists"),
        (lambda completion_ids, **kwargs: [0.5 for ids in completion_ids], "finite numbers for completion 0"),
        (lambda completion_ids, **kwargs: [None for ids in completion_ids], "finite numbers for completion 0"),
        (lambda completion_ids, **kwargs: [["good"] * len(ids) for ids in completion_ids], "finite numbers for"),
        (lambda completion_ids, **kwargs: None, "must return 8 lists, one per completion, got None"),
    ],
    ids=["too long", "nan", "too few", "one number each", "none", "texts", "nothing"],
)
def test_bad_potentials_are_refused(make_trainer, potential, message):
    with pytest.raises(ValueError, match=message):
        make_trainer(potential=potential).train()


@pytest.mark.parametrize(
    ("reward", "error", "message"),
    [
        (
            lambda completion_ids, **kwargs: [[0.1] * (len(ids) + 1) for ids in completion_ids],
            ValueError,
            r"token rewards for completion 0, which has \d+ tokens .* Return one number per token",
        ),
        (lambda completion_ids, **kwargs: [[float("inf")] * len(ids) for ids in completion_ids], ValueError, "inf"),
        (lambda completion_ids, **kwargs: [[None] * len(ids) for ids in completion_ids], TypeError, "Return 0.0"),
    ],
    ids=["length", "infinite", "none"],
)
def test_bad_rewards_per_token_are_refused(make_trainer, reward, error, message):
    with pytest.raises(error, match=message):
        make_trainer(reward_funcs=reward, critic_init="policy").train()


def test_rewards_per_token_for_a_bandit_are_refused(make_trainer):
    def dense(completion_ids, **kwargs):
        return [[0.1] * len(ids) for ids in completion_ids]

    trainer = make_trainer(reward_funcs=dense, critic_init="policy", **BANDIT)
    with pytest.raises(ValueError, match="'dense' returned rewards per token.*set the estimator to `gae`"):
        trainer.train()


class Poison(TrainerCallback):
    """Put NaN into the critic's head after an optimizer step."""

    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, model=None, **kwargs):
        if state.global_step == self.step:
            model.heads[CRITIC].weight.data.fill_(float("nan"))


def files(folder):
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in folder.rglob("*")
        if path.is_file()
    }


@pytest.mark.parametrize(
    ("step", "cause"),
    [
        (1, "The batch itself is finite"),  # within the first rollout, whose values were fine
        (2, r"The batch already holds such numbers in \['old_values', 'advantages', 'returns'\]"),
    ],
    ids=["within a rollout", "from the rollout on"],
)
def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_its_batch(make_trainer, tmp_path, step, cause):
    folder = tmp_path / "run"
    fields = {"save_strategy": "steps", "save_steps": 1, "output_dir": str(folder), "max_steps": 6}
    trainer = make_trainer(**fields, callbacks=[Poison(step)])
    seen = {}

    class Remember(TrainerCallback):
        def on_save(self, args, state, control, **kwargs):
            seen["files"], seen["weights"] = files(folder), trained(trainer)

    trainer.add_callback(Remember())
    with pytest.raises(FloatingPointError, match=rf"The loss is nan\. {cause}.*nonfinite_batch_0\.safetensors"):
        trainer.train()
    assert trainer.state.global_step == step
    for name, weight in trained(trainer).items():  # the bad step did not touch the weights
        if name != "heads.critic.weight":
            assert torch.equal(weight, seen["weights"][name])
    after = files(folder)
    assert after.pop("nonfinite_batch_0.safetensors")
    assert after == seen["files"]
    batch = load_file(folder / "nonfinite_batch_0.safetensors")
    expected = trainer._buffered_inputs[trainer._step % 2]
    assert batch.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(batch[name], tensor, equal_nan=True, atol=0, rtol=0)
    args = trainer.args
    args.resume_from_checkpoint = "true"
    assert check_output_dir(args) == str(folder / f"checkpoint-{step}")


def test_an_infinite_loss_stops_an_evaluation_too(make_trainer):
    trainer = make_trainer()
    trainer.roles.heads[CRITIC].weight.data.fill_(float("inf"))
    with pytest.raises(FloatingPointError, match="The loss is (nan|inf)"):
        trainer.evaluate()


def test_a_gradient_that_is_not_finite_stops_the_run_before_the_step(make_trainer, tmp_path, monkeypatch):
    """The loss is fine: an infinite derivative of a term that is 0."""
    trainer = make_trainer(output_dir=str(tmp_path), max_steps=6)
    before = trained(trainer)

    def steep(trainer, *arguments):
        outputs, *others = policy_outputs(trainer, *arguments)
        zero = (outputs.logps * 0).abs().sqrt()
        return dataclasses.replace(outputs, logps=outputs.logps + zero), *others

    policy_outputs = PPOTrainer._policy_outputs
    monkeypatch.setattr(PPOTrainer, "_policy_outputs", steep)
    with pytest.raises(FloatingPointError, match=r"The norm of the gradient is nan\. The batch itself is finite"):
        trainer.train()
    assert trainer.state.global_step == 0
    for name, weight in trained(trainer).items():
        assert torch.equal(weight, before[name]), name
    kept = load_file(tmp_path / "nonfinite_batch_0.safetensors")
    assert len(kept["completion_ids"]) == trainer.args.generation_batch_size
