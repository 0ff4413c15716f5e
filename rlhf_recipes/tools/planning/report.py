"""The plan of a PPO run as text, and the command that writes it."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml
from trl import ModelConfig

from rlhf_recipes.config import DataArguments, parse_stage
from rlhf_recipes.ppo.arguments import PPOArguments
from rlhf_recipes.ppo.config import PPOConfig
from rlhf_recipes.tools.columns import in_columns
from rlhf_recipes.tools.planning import add_arguments
from rlhf_recipes.tools.planning.memory import CUDA_CONTEXT_BYTES, HEAP_FACTOR, MIB, PhaseMemory
from rlhf_recipes.tools.planning.phases import PHASES, largest_micro_batch, largest_rollout, peak, ppo_memory
from rlhf_recipes.tools.planning.run import longest_prompt, run_sizes
from rlhf_recipes.tools.planning.sizes import RunSizes

ARGUMENTS = (PPOArguments, DataArguments, PPOConfig, ModelConfig)


def write_plan(words: Sequence[str]) -> str:
    """Plan a PPO run from its arguments.

    Args:
        words: `--config FILE` and fields of the stage, as its script takes them; `--budget_gib` (memory that it may
            take) and `--prompt_length` (tokens of the longest prompt; by default the rows are read).

    Returns:
        The plan as text.

    Raises:
        FileNotFoundError: If there is no such file or model.
        ValueError: If a field is unknown or wrong, the file is not one of a PPO stage, or the budget is too small.
    """
    parser = argparse.ArgumentParser(prog="rlhf-recipes plan", add_help=False, allow_abbrev=False, exit_on_error=False)
    add_arguments(parser)
    try:
        own, fields = parser.parse_known_args(list(words))
    except argparse.ArgumentError as error:
        raise ValueError(f"{error}.") from error
    for name, value in vars(own).items():
        if value is not None and value <= 0:
            raise ValueError(f"`--{name}` must be above 0, got {value}.")
    arguments, device = _parse(fields)
    ppo_args, data_args, training_args, model_args = arguments
    if model_args.model_name_or_path is None:
        raise ValueError("No model is given. Set `model_name_or_path` to a hub id or a local folder.")
    length = own.prompt_length or longest_prompt(ppo_args, data_args, training_args, model_args)
    sizes, notes = run_sizes(ppo_args, training_args, model_args, length, device)
    lines = [*describe(sizes, training_args), "", *phase_table(ppo_memory(sizes)), ""]
    if own.budget_gib is not None:
        lines += [*fit_budget(sizes, own.budget_gib, training_args), ""]
    return "\n".join([*lines, *(f"Note: {note}" for note in [*notes, *_caveats(sizes)])]) + "\n"


def describe(sizes: RunSizes, args: PPOConfig) -> list[str]:
    """Describe the plan in words: the model, the roles, lengths, batches, and tokens per update."""
    network, completions = sizes.network, sizes.rollout
    total = network.linear_parameters + network.other_parameters
    form = f"{sizes.quantized_bits}-bit weights" if sizes.quantized_bits else f"{8 * sizes.weight_bytes}-bit weights"
    compute = "16-bit autocast" if sizes.autocast else f"computes in {8 * sizes.weight_bytes} bits"
    critic = {"adapter": "an adapter", "head": "a head on the policy's trunk", "model": "a model of its own"}
    return [
        f"base       {total:,} parameters, {form}, {compute}, on {'a CPU' if sizes.device == 'cpu' else 'a GPU'}",
        f"roles      policy, reference, critic ({critic[args.critic]}), rewards; {sizes.trained:,} trained parameters",
        f"lengths    {sizes.prompt} + {sizes.completion} tokens (longest prompt, longest completion)",
        f"batches    {completions} completions per rollout, {sizes.micro_batch} in a micro-batch, "
        f"{sizes.evaluation_batch} in one of an evaluation",
        f"per update {completions * sizes.completion:,} completion tokens at most, {completions * sizes.length:,} "
        f"with prompts; {args.num_iterations} epochs of them in {args.steps_per_rollout} optimizer steps",
    ]


def phase_table(phases: dict[str, PhaseMemory]) -> list[str]:
    """Lay the phases out as a table of MiB."""
    columns = list(vars(phases["load"]))
    rows = [["phase", *columns, "peak MiB"]]
    for name in PHASES:
        memory = phases[name]
        parts = [getattr(memory, column) for column in columns]
        rows.append([name, *(f"{part / MIB:,.0f}" for part in parts), f"{memory.total / MIB:,.0f}"])
    return in_columns(rows)


def fit_budget(sizes: RunSizes, budget_gib: float, args: PPOConfig) -> list[str]:
    """Find the largest micro-batch and the largest rollout that fit, and write them out.

    Raises:
        ValueError: If nothing fits; it names the phase and the least that it needs.
    """
    budget = budget_gib * 1024 * MIB - (CUDA_CONTEXT_BYTES if sizes.device == "cuda" else 0)
    in_a_step = args.per_device_train_batch_size * args.gradient_accumulation_steps
    candidates = [size for size in range(1, in_a_step + 1) if in_a_step % size == 0]
    micro_batch = largest_micro_batch(sizes, budget, candidates)
    if micro_batch is None:
        smallest = replace(sizes, micro_batch=1)
        name, least = peak(smallest)
        knobs = {
            "load": "`load_in_4bit: true`, or a smaller base",
            "generate": f"a smaller rollout (`steps_per_generation`; {largest_rollout(sizes, budget)} completions "
            "fit), or a shorter `max_completion_length`",
            "score": "a smaller `per_device_eval_batch_size`, or shorter prompts and completions",
            "train": "`activation_checkpointing: true`, `critic: head`, `load_in_4bit: true`, or shorter prompts and "
            "completions",
        }
        raise ValueError(
            f"{budget_gib:g} GiB are too few: with a micro-batch of 1, the phase {name!r} needs at least "
            f"{_gib(least, sizes):.2f} GiB. What helps: {knobs[name]}."
        )
    name, most = peak(replace(sizes, micro_batch=micro_batch))
    return [
        f"{budget_gib:g} GiB: the largest micro-batch is `per_device_train_batch_size: {micro_batch}` with "
        f"`gradient_accumulation_steps: {in_a_step // micro_batch}` (peak {_gib(most, sizes):.2f} GiB, in {name!r}).",
        f"The most completions that can be generated together: {largest_rollout(sizes, budget)}; now {sizes.rollout}.",
    ]


def _gib(memory: float, sizes: RunSizes) -> float:
    return (memory + (CUDA_CONTEXT_BYTES if sizes.device == "cuda" else 0)) / 1024 / MIB


def _parse(fields: list[str]) -> tuple[tuple[Any, ...], str]:
    """Parse the fields of the stage on any machine: a plan needs neither the GPU nor W&B."""
    try:
        arguments = parse_stage(ARGUMENTS, [*fields, "--use_cpu", "true", "--report_to", "none"])
    except ValueError as error:
        if "Unknown key" in str(error):
            raise ValueError(
                f"{error} Plans are for the PPO stage: give its YAML, recipes/<name>/ppo.yaml."
            ) from error
        raise
    before = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    before.add_argument("--config")
    before.add_argument("--use_cpu")
    args, _ = before.parse_known_args(fields)
    use_cpu = args.use_cpu
    if use_cpu is None and args.config is not None:
        use_cpu = yaml.safe_load(Path(args.config).read_text(encoding="utf-8")).get("use_cpu")
    return arguments, "cpu" if str(use_cpu).lower() in ("true", "1", "yes") else "cuda"


def _caveats(sizes: RunSizes) -> list[str]:
    if sizes.device == "cuda":
        return [
            "planned for a GPU, as torch counts its memory; the CUDA context takes about 0.5 GiB besides, which is "
            "counted against the budget. Add `--use_cpu true` to plan for a CPU."
        ]
    return [
        "on a CPU this is what tensors take. With glibc's default settings, blocks that were freed stay with the "
        f"process, which was measured to take up to {HEAP_FACTOR} times the peak of training; "
        "MALLOC_MMAP_THRESHOLD_=262144 in the run's environment gives them back, and costs time."
    ]
