"""Every field of TRL's configuration is decided about: honoured, refused, or without anything to do."""

from dataclasses import fields

from trl import GRPOConfig

from rlhf_recipes import PPOConfig
from rlhf_recipes.ppo.unused import NOT_HONOURED

GENERATION = """
    num_generations num_generations_eval max_completion_length shuffle_dataset pad_to_multiple_of generation_batch_size
    steps_per_generation temperature generation_kwargs chat_template_kwargs cache_implementation
"""
VLLM = """
    use_vllm vllm_mode vllm_model_impl vllm_server_base_url vllm_server_timeout vllm_gpu_memory_utilization
    vllm_max_model_length vllm_importance_sampling_correction vllm_importance_sampling_mode
    vllm_importance_sampling_clip_max vllm_importance_sampling_clip_min
"""
LOSS = """
    num_iterations epsilon epsilon_high delta importance_sampling_level reward_weights mask_truncated_completions
    entropy_coef use_adaptive_entropy entropy_coef_min entropy_coef_max entropy_coef_delta entropy_target
    cast_lm_head_to_fp32 disable_dropout router_aux_loss_coef
"""
OPTIMIZER = """
    learning_rate lr_scheduler_type lr_scheduler_kwargs warmup_steps optim optim_args optim_target_modules weight_decay
    adam_beta1 adam_beta2 adam_epsilon max_grad_norm per_device_train_batch_size gradient_accumulation_steps
    num_train_epochs max_steps
"""
MACHINE = """
    bf16 fp16 tf32 activation_checkpointing activation_checkpointing_kwargs gradient_checkpointing
    gradient_checkpointing_kwargs use_cache
    torch_empty_cache_steps use_cpu accelerator_config full_determinism seed debug skip_memory_metrics ddp_backend
    ddp_timeout ddp_find_unused_parameters ddp_bucket_cap_mb ddp_broadcast_buffers ddp_static_graph
    dataloader_num_workers dataloader_pin_memory dataloader_persistent_workers dataloader_prefetch_factor
    dataloader_multiprocessing_context dataloader_in_order remove_unused_columns model_init_kwargs trust_remote_code
"""
LOGS_AND_CHECKPOINTS = """
    output_dir logging_strategy logging_steps logging_first_step log_on_each_node logging_nan_inf_filter log_level
    log_level_replica disable_tqdm report_to run_name project trackio_space_id trackio_bucket_id
    trackio_static_space_id log_completions num_completions_to_print log_unique_prompts log_completions_hub_repo
    eval_strategy eval_steps eval_delay eval_on_start per_device_eval_batch_size save_only_model save_strategy
    save_steps save_on_each_node save_total_limit enable_jit_checkpoint push_to_hub hub_token hub_private_repo
    hub_model_id hub_strategy hub_always_push hub_revision load_best_model_at_end metric_for_best_model
    greater_is_better ignore_data_skip restore_callback_states_from_checkpoint resume_from_checkpoint
    include_num_input_tokens_seen
"""
# Refused by PPOTrainer, which sees what they lead to, by TRL's own checks, or because they turn on what is refused.
REFUSED_ELSEWHERE = "deepspeed fsdp fsdp_config auto_find_batch_size torch_compile_backend torch_compile_mode"
# About predictions, labels and commands, of which a PPO run has none; or incomplete batches, which TRL leaves out.
NOTHING_TO_DO = """
    prediction_loss_only eval_do_concat_batches eval_use_gather_object eval_accumulation_steps include_for_metrics
    batch_eval_metrics label_names do_train do_eval do_predict local_rank dataloader_drop_last
"""


def test_every_field_is_decided_about():
    """When this fails, TRL or transformers has a new field: find out what PPO does with it, then add it here."""
    groups = (GENERATION, VLLM, LOSS, OPTIMIZER, MACHINE, LOGS_AND_CHECKPOINTS, REFUSED_ELSEWHERE, NOTHING_TO_DO)
    decided = [*" ".join(groups).split(), *NOT_HONOURED]
    assert len(decided) == len(set(decided))
    assert set(decided) == {field.name for field in fields(GRPOConfig)}
    assert NOT_HONOURED.keys() <= {field.name for field in fields(PPOConfig)}
