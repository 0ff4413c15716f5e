"""Sizes that the memory of a PPO stage depends on, from its arguments."""

from __future__ import annotations

import argparse
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from peft import LoraConfig, PeftConfig
from trl import ModelConfig

from rlhf_recipes.config import DataArguments
from rlhf_recipes.data import to_prompts
from rlhf_recipes.data.splits import load_splits
from rlhf_recipes.models import load_tokenizer, lora_config
from rlhf_recipes.models.adapters import is_adapter
from rlhf_recipes.ppo.arguments import PPOArguments
from rlhf_recipes.ppo.config import PPOConfig
from rlhf_recipes.tools.planning.network import adapter_sizes, empty_model, network_sizes, whole_model_sizes
from rlhf_recipes.tools.planning.serving import SERVER_SHARE
from rlhf_recipes.tools.planning.sizes import AdapterSizes, Layout, NetworkSizes, RunSizes

_FLOATS = ("bfloat16", "float16", "float32")  # of `bnb_4bit_quant_storage`; by default it is uint8


def run_sizes(
    ppo_args: PPOArguments, training_args: PPOConfig, model_args: ModelConfig, prompt_length: int, device: str
) -> tuple[RunSizes, list[str]]:
    """Find the sizes that the memory of a PPO run depends on, without loading weights.

    Args:
        ppo_args: What it starts from.
        training_args: Batches, lengths, number formats.
        model_args: The base.
        prompt_length: Tokens of the longest prompt.
        device: `"cpu"` or `"cuda"`.

    Returns:
        The sizes, and what had to be assumed, as sentences.

    Raises:
        FileNotFoundError: If there is no such model.
        ValueError: If the model is no dense decoder, or the critic's model is missing.
    """
    source: Any = {"revision": model_args.model_revision, "trust_remote_code": training_args.trust_remote_code}
    base, notes = str(model_args.model_name_or_path), list[str]()
    model = empty_model(base, attn_implementation=model_args.attn_implementation, **source)
    config: Any = model.config
    network = network_sizes(model)

    def adapter(folder: str | None, role: str) -> AdapterSizes:
        return adapter_sizes(empty_model(base, **source), _lora(folder, role, model_args, notes))

    start = "policy_adapter" if ppo_args.policy_adapter is not None else "sft_adapter"
    policy = adapter(getattr(ppo_args, start), start)
    rewards, others = _rewards(ppo_args, adapter)
    like = rewards[0] if rewards and training_args.critic_init != "policy" else policy
    critic, critic_network = _critic(training_args.critic, ppo_args.critic_model, like)
    weight_bytes = _bytes_of(model_args.dtype, config)
    bits: Literal[0, 4, 8] = 4 if model_args.load_in_4bit else 8 if model_args.load_in_8bit else 0
    # Copies of the policy's adapter: the reference, and the average of its weights
    copies = (ppo_args.sft_adapter is not None) + (training_args.ema_decay is not None)
    sizes = RunSizes(
        network=network,
        policy=policy,
        critic=critic,
        critic_network=critic_network,
        frozen=copies * policy.parameters + sum(reward.parameters for reward in rewards),
        others=others,
        heads=len(rewards) + 1,
        weight_bytes=weight_bytes,
        quantized_bits=bits,
        autocast=training_args.bf16 or training_args.fp16,
        checkpointing=_checkpointed(training_args),
        eager=config._attn_implementation == "eager",
        exact_kl=training_args.kl_estimator == "full",
        optimizer_bytes=optimizer_bytes(training_args.optim),
        micro_batch=training_args.per_device_train_batch_size,
        evaluation_batch=training_args.per_device_eval_batch_size,
        rollout=training_args.per_device_train_batch_size * training_args.micro_batches_per_rollout,
        prompt=prompt_length,
        completion=training_args.max_completion_length or 0,
        device="cpu" if device == "cpu" else "cuda",
        file_bytes=_file_bytes(network, config, weight_bytes, bits) if device == "cpu" else 0,
    )
    return sizes, notes


def run_layout(
    own: argparse.Namespace, training_args: PPOConfig, model_args: ModelConfig, gpu_bytes: float | None
) -> Layout:
    """Find how a run lies on GPUs, from the options of the plan and, where they are not given, fields of the stage.

    Args:
        own: Options, as `add_arguments` names them; `None` where one is not given.
        training_args: Fields of the stage.
        model_args: The base.
        gpu_bytes: Memory of a GPU, of which vLLM takes a share.

    Raises:
        ValueError: If they contradict each other.
    """
    processes, machines = own.num_processes or 1, own.num_machines or 1
    sharding: Any = own.sharding or "none"
    if processes % machines:
        raise ValueError(f"`--num_processes` {processes} cannot be spread over `--num_machines` {machines} evenly.")
    if sharding != "none" and processes == 1:
        raise ValueError(f"`--sharding {sharding}` divides a run among GPUs: give `--num_processes`, 2 or more.")
    layout = Layout(processes, machines, sharding, model_args.bnb_4bit_quant_storage in _FLOATS)
    if not (training_args.use_vllm if own.use_vllm is None else own.use_vllm):
        given = [name for name in vars(own) if name.startswith("vllm_") and getattr(own, name) is not None]
        if given:
            raise ValueError(f"`--{given[0]}` is an option of vLLM: add `--use_vllm`, or leave it out.")
        return layout
    if gpu_bytes is None:
        raise ValueError("vLLM takes a share of a GPU: say which by `--gpu`, or its memory by `--budget_gib`.")
    mode: Any = own.vllm_mode or training_args.vllm_mode
    share = own.vllm_gpu_memory_utilization
    if share is None:
        share = SERVER_SHARE if mode == "server" else training_args.vllm_gpu_memory_utilization
    if share > 1:
        raise ValueError(f"`--vllm_gpu_memory_utilization` is a share of a GPU, above 0 and at most 1, got {share}.")
    parallel = own.vllm_tensor_parallel_size or training_args.vllm_tensor_parallel_size
    if mode == "colocate" and processes % parallel:
        raise ValueError(
            f"`--vllm_tensor_parallel_size` {parallel} does not divide `--num_processes` {processes}, in whose "
            "processes vLLM is."
        )
    sleeps = training_args.vllm_enable_sleep_mode if own.vllm_enable_sleep_mode is None else own.vllm_enable_sleep_mode
    return replace(layout, vllm=mode, tensor_parallel=parallel, vllm_bytes=share * gpu_bytes, sleeps=sleeps)


def _checkpointed(training_args: PPOConfig) -> int:
    settings: Any = training_args.activation_checkpointing_kwargs or {}
    return int(settings.get("every_n_layers", 1)) if training_args.activation_checkpointing else 0


def optimizer_bytes(optim: Any) -> float:
    """Bytes of optimizer state for a trained number: two float32 moments, two bytes and scales, or none.

    Example:
        >>> optimizer_bytes("adamw_torch"), optimizer_bytes("paged_adamw_8bit"), optimizer_bytes("sgd")
        (8.0, 2.03125, 0.0)
    """
    name = str(getattr(optim, "value", optim))
    if "8bit" in name:
        return 2 + 2 * 4 / 256  # a float32 for each block of 256
    return 0.0 if name == "sgd" else 8.0


def longest_prompt(
    ppo_args: PPOArguments, data_args: DataArguments, training_args: PPOConfig, model_args: ModelConfig
) -> int:
    """Tokens of the longest prompt of a stage's rows, training and test.

    Raises:
        ValueError: If the rows or the tokenizer cannot be read; it names the option that gives the length instead.
    """
    try:
        tokenizer = load_tokenizer(
            model_args.model_name_or_path,
            revision=model_args.model_revision,
            trust_remote_code=training_args.trust_remote_code,
        )
        rows = load_splits(data_args, partial(to_prompts, prompt_words=ppo_args.prompt_words))
    except (OSError, ValueError, ConnectionError) as error:
        raise ValueError(f"The prompts cannot be read, so give `--prompt_length` in tokens: {error}") from error
    longest = 0
    for split in rows.values():
        for prompt in split["prompt"]:
            chat = isinstance(prompt, list)
            text = (
                tokenizer.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True) if chat else prompt
            )
            longest = max(longest, len(tokenizer(text).input_ids))
    return longest


def _rewards(ppo_args: PPOArguments, adapter: Any) -> tuple[list[AdapterSizes], int]:
    """Adapters on the base, and the bytes of reward models beside it."""
    given = [ppo_args.reward_adapter, ppo_args.gate_adapter, *(ppo_args.reward_adapters or [])]
    folders = [folder for folder in given if folder]
    adapters, others = [], 0
    for folder in folders:
        if (Path(folder) / "config.json").is_file():  # a whole classifier
            others += 4 * _parameters(empty_model(folder))
        else:
            adapters.append(adapter(folder, "reward adapter"))
    return adapters, others


def _critic(
    kind: str, critic_model: str | None, like: AdapterSizes
) -> tuple[AdapterSizes | None, NetworkSizes | None]:
    """The critic's adapter, which is like another role's, and the network of a critic of its own."""
    if kind != "model":
        return (like if kind == "adapter" else None), None
    if critic_model is None:
        raise ValueError("`critic: model` needs `critic_model`, the classifier that the critic starts from.")
    own = empty_model(critic_model)
    return whole_model_sizes(own), network_sizes(own)


def _parameters(model: Any) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def _lora(folder: str | None, role: str, model_args: ModelConfig, notes: list[str]) -> LoraConfig:
    if folder is not None and is_adapter(folder):
        return _saved_lora(folder)
    if folder is not None:
        notes.append(f"{role} {folder!r} is not there yet: taken as an adapter with this stage's LoRA settings.")
    return lora_config(model_args, "CAUSAL_LM")


def _saved_lora(folder: str) -> LoraConfig:
    config = PeftConfig.from_pretrained(folder)
    if not isinstance(config, LoraConfig):
        raise TypeError(f"The adapter in {folder!r} is a {config.peft_type}; only LoRA adapters can share a base.")
    config.task_type, config.modules_to_save, config.inference_mode = "CAUSAL_LM", None, False
    return config


def _bytes_of(dtype: str | None, config: Any) -> int:
    if dtype == "auto":
        return int(torch.empty(0, dtype=config.dtype or torch.float32).element_size())
    return 2 if dtype in ("bfloat16", "float16") else 4


def _file_bytes(network: NetworkSizes, config: Any, weight_bytes: int, bits: int) -> int:
    """Bytes of the weights' file where it is converted or quantized, and 0 where it is used as it is."""
    stored = torch.empty(0, dtype=config.dtype or torch.float32).element_size()
    if bits == 0 and stored == weight_bytes:
        return 0
    return int(stored * (network.linear_parameters + network.other_parameters))
