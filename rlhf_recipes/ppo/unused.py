"""Fields of TRL's and transformers' configurations that have no effect on PPO, each with what to do instead.

A field is either honoured or refused: changing it is an error, so that nobody believes that it was heeded.
`tests/ppo/test_fields.py` fails when TRL adds one that nobody decided about.
"""

from __future__ import annotations

from typing import Any

from trl import GRPOConfig

from rlhf_recipes.models.generation import NEUTRAL
from rlhf_recipes.ppo.vllm.settings import check_vllm

_NO_REFERENCE_SYNC = "the reference is frozen"
_NO_SUCH_LOSS = "it belongs to a `loss_type` of GRPO: PPO clips by `epsilon`, `epsilon_high` and `delta`"

UNUSED = {
    "vllm_importance_sampling_cap": "use `vllm_importance_sampling_clip_max`",  # to which TRL copies it: found first
    **dict.fromkeys(("vllm_server_host", "vllm_server_port"), "give the whole address in `vllm_server_base_url`"),
    "vllm_group_port": "only the adapter is sent, by its folder",
    "vllm_tensor_parallel_size": "start a server with `--tensor-parallel-size`, and set `vllm_mode: server`",
    "vllm_enable_sleep_mode": "vLLM stays awake: with little memory, start a server on another device",
    "vllm_structured_outputs_regex": "completions must be sampled from the policy itself",
    **dict.fromkeys(("ref_model_mixup_alpha", "ref_model_sync_steps"), _NO_REFERENCE_SYNC),
    **dict.fromkeys(
        (
            *("sapo_temperature_neg", "sapo_temperature_pos"),
            *("vespo_k_pos", "vespo_lambda_pos", "vespo_k_neg", "vespo_lambda_neg"),
        ),
        _NO_SUCH_LOSS,
    ),
    "use_bias_correction_kl": "the KL has fields of its own: `kl_estimator`, `kl_placement`, `kl_anchor`",
    "use_transformers_paged": "it would cast the trained weights to 16 bits",
    "transformers_continuous_batching_config": "completions are generated without continuous batching",
    "max_tool_calling_iterations": "completions call no tools",
    "log_multimodal": "prompts are text",
    "ds3_gather_for_generation": "ZeRO-3 is not supported",
    "liger_kernel_config": "the roles share one model, without Liger's kernels",
    "parallelism_config": "a run has one process, or several under DDP, FSDP2 or ZeRO-2, as it is launched",
    "torch_compile": "one model computes as several roles, between which a compiled graph could not switch",
    "data_seed": "the order of the prompts follows `seed`",
    "train_sampling_strategy": "prompts come in a random order, or in their own with `shuffle_dataset: false`",
    "length_column_name": "prompts are not grouped by length",
    "average_tokens_across_devices": "means are over the tokens of all processes: see `loss_aggregation`",
    "label_smoothing_factor": "the loss has no labels",
    "bf16_full_eval": "an evaluation would round the weights that are trained: use `bf16`",
    "fp16_full_eval": "an evaluation would round the weights that are trained: use `fp16`",
}

# GRPO's knobs that PPO does not honour, each with the field to use instead.
NOT_HONOURED = {
    **UNUSED,
    "beta": "the KL penalty has fields of its own: use `kl_coef` and `kl_placement`",
    "loss_type": "use `loss_aggregation`",
    "scale_rewards": "advantages come from the critic: use `whiten_advantages`, or `score_scaling`",
    "multi_objective_aggregation": "reward functions are summed with `reward_weights`",
    "off_policy_mask_threshold": "use `ratio_threshold` or `target_kl`",
    "top_entropy_quantile": "every completion token counts",
    "sync_ref_model": "the reference is frozen",
    "top_p": "completions must be sampled from the policy itself: only `temperature` changes it",
    "top_k": "completions must be sampled from the policy itself: only `temperature` changes it",
    "min_p": "completions must be sampled from the policy itself: only `temperature` changes it",
    "repetition_penalty": "completions must be sampled from the policy itself: only `temperature` changes it",
    "neftune_noise_alpha": "old and new log-probabilities must come from one network, without noise",
    "use_transformers_continuous_batching": "it would cast the trained weights to 16 bits",
    "use_liger_kernel": "the roles share one model",
}

# What `generation_kwargs` may say: how memory is used, not what is sampled.
_GENERATION_KWARGS = ("cache_config", "prefill_chunk_size", "use_cache")
# For what else stands there, the field to use instead.
_FIELDS_OF_GENERATION = {
    "cache_implementation": "use the field `cache_implementation`",
    "eos_token_id": "completions end at the tokenizer's end token and at those of the model's generation_config.json",
    "max_length": "use `max_completion_length`",
    "max_new_tokens": "use `max_completion_length`",
    "num_return_sequences": "use `num_generations`",
    "stop_strings": "completions end at end tokens; with `truncate_tokens` they are judged up to another token",
    "temperature": "use the field `temperature`, which the log-probabilities follow",
}


def check_unused(config: GRPOConfig) -> None:
    """Refuse fields of GRPO that were changed but have no effect here.

    Raises:
        ValueError: With the field's name and what to use instead. Those about vLLM too, where it is not used.
    """
    for name, instead in NOT_HONOURED.items():
        value = getattr(config, name)
        if value != GRPOConfig.__dataclass_fields__[name].default:
            raise ValueError(f"`{name}` is {value!r}, but PPO does not use it: {instead}. Remove it.")
    check_vllm(config)
    generation_kwargs: Any = config.generation_kwargs or {}
    neutral = NEUTRAL | {"temperature": config.temperature}
    for name, value in generation_kwargs.items():
        if name not in _GENERATION_KWARGS and (name not in neutral or value != neutral[name]):
            instead = _FIELDS_OF_GENERATION.get(
                name, "completions must be sampled from the policy itself: only the field `temperature` changes it"
            )
            raise ValueError(
                f"`generation_kwargs` sets `{name}` to {value!r}, which PPO cannot honour: {instead}. Remove it. "
                f"Allowed are {', '.join(map(repr, _GENERATION_KWARGS))}."
            )
