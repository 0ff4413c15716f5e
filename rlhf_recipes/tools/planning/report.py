"""The plan of a PPO run as text, and the command that writes it."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from trl import ModelConfig

from rlhf_recipes.config import DataArguments, parse_stage, read_setting
from rlhf_recipes.ppo.arguments import PPOArguments
from rlhf_recipes.ppo.config import PPOConfig
from rlhf_recipes.tools.columns import in_columns
from rlhf_recipes.tools.planning import add_arguments
from rlhf_recipes.tools.planning.fit import Setting, has_room_for_vllm, smallest_change
from rlhf_recipes.tools.planning.memory import CUDA_CONTEXT_BYTES, HEAP_FACTOR, MIB, PhaseMemory
from rlhf_recipes.tools.planning.phases import PHASES, largest_micro_batch, largest_rollout, peak, ppo_memory
from rlhf_recipes.tools.planning.run import longest_prompt, run_layout, run_sizes
from rlhf_recipes.tools.planning.serving import server_memory, sync_bytes
from rlhf_recipes.tools.planning.sizes import Layout, RunSizes
from rlhf_recipes.tools.planning.speed import (
    FAST,
    GPUS,
    SLOW,
    Gpu,
    Work,
    tokens_per_second,
    update_seconds,
)

ARGUMENTS = (PPOArguments, DataArguments, PPOConfig, ModelConfig)


def write_plan(words: Sequence[str]) -> str:
    """Plan a PPO run from its arguments.

    Args:
        words: `--config FILE` and fields of the stage, as its script takes them; and the options of `add_arguments`:
            what the run may take, on which GPUs it is, and how they share it.

    Returns:
        The plan as text.

    Raises:
        FileNotFoundError: If there is no such file or model.
        ValueError: If a field is unknown or wrong, the file is not one of a PPO stage, or options contradict each
            other.
    """
    parser = argparse.ArgumentParser(prog="rlhf-recipes plan", add_help=False, allow_abbrev=False, exit_on_error=False)
    add_arguments(parser)
    try:
        own, fields = parser.parse_known_args(list(words))
    except argparse.ArgumentError as error:
        raise ValueError(f"{error}.") from error
    for name, value in vars(own).items():
        if isinstance(value, int | float) and not isinstance(value, bool) and value <= 0:
            raise ValueError(f"`--{name}` must be above 0, got {value}.")
    arguments, device = _parse(fields, own.num_processes or 1)
    ppo_args, data_args, training_args, model_args = arguments
    if model_args.model_name_or_path is None:
        raise ValueError("No model is given. Set `model_name_or_path` to a hub id or a local folder.")
    if own.gpu is not None and device == "cpu":
        raise ValueError("`--gpu` plans for a GPU, and this run is on a CPU. Add `--use_cpu false`, or leave it out.")
    gpu = GPUS[own.gpu] if own.gpu is not None else None
    gib = own.budget_gib or (None if gpu is None else gpu.mib / 1024)
    layout = run_layout(own, training_args, model_args, None if gib is None else gib * 1024 * MIB)
    length = own.prompt_length or longest_prompt(ppo_args, data_args, training_args, model_args)
    sizes, notes = run_sizes(ppo_args, training_args, model_args, length, device)
    lines = [*describe(sizes, training_args, layout), "", *phase_table(ppo_memory(sizes, layout)), ""]
    setting: Setting | None = Setting(sizes, layout, 0.0, 1)
    if gib is not None:
        verdict, setting = fit_budget(sizes, gib, training_args, layout)
        lines += [*verdict, ""]
    if gpu is not None and setting is not None:
        lines += [describe_speed(setting, gpu, training_args), ""]
    notes += [*_caveats(sizes, layout), *([] if gpu is None else [_assumptions(gpu)])]
    return "\n".join([*lines, *(f"Note: {note}" for note in notes)]) + "\n"


def describe(sizes: RunSizes, args: PPOConfig, layout: Layout) -> list[str]:
    """Describe the plan in words: the model, the roles, lengths, batches, tokens per update, and the GPUs."""
    network, completions = sizes.network, sizes.rollout
    of_all = completions * layout.processes
    total = network.linear_parameters + network.other_parameters
    form = f"{sizes.quantized_bits}-bit weights" if sizes.quantized_bits else f"{8 * sizes.weight_bytes}-bit weights"
    compute = "16-bit autocast" if sizes.autocast else f"computes in {8 * sizes.weight_bytes} bits"
    critic = {"adapter": "an adapter", "head": "a head on the policy's trunk", "model": "a model of its own"}
    return [
        f"base       {total:,} parameters, {form}, {compute}, on {'a CPU' if sizes.device == 'cpu' else 'a GPU'}",
        f"roles      policy, reference, critic ({critic[args.critic]}), rewards; {sizes.trained:,} trained parameters",
        f"lengths    {sizes.prompt} + {sizes.completion} tokens (longest prompt, longest completion)",
        f"batches    {completions} completions per rollout, {sizes.micro_batch} in a micro-batch, "
        f"{sizes.evaluation_batch} in one of an evaluation{', each on every GPU' if layout.processes > 1 else ''}",
        f"per update {of_all * sizes.completion:,} completion tokens at most, {of_all * sizes.length:,} "
        f"with prompts; {args.num_iterations} epochs of them in {args.steps_per_rollout} optimizer steps",
        *_describe_layout(sizes, layout),
    ]


def _describe_layout(sizes: RunSizes, layout: Layout) -> list[str]:
    lines, part = [], f"1/{layout.processes}"
    if layout.processes > 1:
        sharing = {
            "none": "DDP: each holds everything",
            "zero2": f"ZeRO-2: each holds everything, but {part} of gradients and optimizer states",
            "zero3": f"ZeRO-3: each holds {part} of weights, gradients and optimizer states",
            "fsdp2": f"FSDP2: each holds {part} of weights, adapters, gradients and optimizer states",
        }[layout.sharding]
        machines = f" on {layout.machines} machines" if layout.machines > 1 else ""
        lines.append(f"processes  {layout.processes}{machines}, {sharing}")
    if layout.vllm != "none":
        server = server_memory(sizes, layout)
        gib = [f"{part / 1024 / MIB:.1f}" for part in (server.weights, server.working, max(0.0, server.cache))]
        place = "on GPUs of its own" if layout.vllm == "server" else "in the trainer's processes"
        lines += [
            f"vllm       {place}, {layout.tensor_parallel} for a copy of the model: on each {gib[0]} GiB of weights, "
            f"{gib[1]} to compute with, {gib[2]} of cache for {server.sequences:,} completions at a time",
            f"sync       {sync_bytes(sizes) / MIB:,.0f} MiB after each update: the policy's adapter",
        ]
    return lines


def phase_table(phases: dict[str, PhaseMemory]) -> list[str]:
    """Lay the phases out as a table of MiB; what only several GPUs or vLLM take is left out where it is nothing."""
    columns = [
        column
        for column in vars(phases["load"])
        if column not in ("buffers", "vllm") or any(getattr(memory, column) for memory in phases.values())
    ]
    rows = [["phase", *columns, "peak MiB"]]
    for name in PHASES:
        memory = phases[name]
        parts = [getattr(memory, column) for column in columns]
        rows.append([name, *(f"{part / MIB:,.0f}" for part in parts), f"{memory.total / MIB:,.0f}"])
    return in_columns(rows)


def fit_budget(
    sizes: RunSizes, budget_gib: float, args: PPOConfig, layout: Layout
) -> tuple[list[str], Setting | None]:
    """Find the largest micro-batch and the largest rollout that fit, or else the smallest change with which one does.

    Args:
        sizes: The run.
        budget_gib: What it may take of each GPU, in GiB.
        args: The stage's batches.
        layout: How it lies on GPUs.

    Returns:
        The finding in words, and what fits: the run, the changed run, or nothing.
    """
    budget = budget_gib * 1024 * MIB - (CUDA_CONTEXT_BYTES if sizes.device == "cuda" else 0)
    in_a_step = args.per_device_train_batch_size * args.gradient_accumulation_steps
    setting = Setting(sizes, layout, budget, in_a_step)
    micro_batch = largest_micro_batch(sizes, budget, setting.micro_batches, layout)
    if micro_batch is None or not has_room_for_vllm(setting):
        return _what_would_fit(setting, budget_gib)
    name, most = peak(replace(sizes, micro_batch=micro_batch), layout)
    lines = [
        f"{budget_gib:.3g} GiB: the largest micro-batch is `per_device_train_batch_size: {micro_batch}` with "
        f"`gradient_accumulation_steps: {in_a_step // micro_batch}` (peak {_gib(most, sizes):.2f} GiB, in {name!r})."
    ]
    if layout.vllm == "none":
        together = largest_rollout(sizes, budget, layout)
        lines.append(f"The most completions that can be generated together: {together}; now {sizes.rollout}.")
    return lines, setting


def _what_would_fit(setting: Setting, budget_gib: float) -> tuple[list[str], Setting | None]:
    if has_room_for_vllm(setting):
        name, least = peak(replace(setting.sizes, micro_batch=1), setting.layout)
        too_few = (
            f"{budget_gib:.3g} GiB are too few: with a micro-batch of 1, the phase {name!r} needs at least "
            f"{_gib(least, setting.sizes):.2f} GiB."
        )
    else:
        too_few = (
            f"{setting.layout.vllm_bytes / 1024 / MIB:.3g} GiB for vLLM are too few: they hold no completion of full "
            "length beside its weights. Raise `--vllm_gpu_memory_utilization`, or divide its model among more GPUs by "
            "`--vllm_tensor_parallel_size`."
        )
    found = smallest_change(setting)
    on_larger = None if found else _on_larger_gpus(setting)
    changed = found or on_larger
    if changed is None:
        return [too_few, "No change of a few fields makes it fit: take a smaller base or shorter texts."], None
    name, most = peak(changed.sizes, changed.layout)
    fits = f"What fits: {', and '.join(changed.changes)} (peak {_gib(most, changed.sizes):.2f} GiB, in {name!r})."
    return [too_few, fits], found


def _on_larger_gpus(setting: Setting) -> Setting | None:
    """The smallest change on the smallest kind of GPU on which one helps."""
    if setting.sizes.device == "cpu":
        return None
    budgets = {name: gpu.mib * MIB - CUDA_CONTEXT_BYTES for name, gpu in GPUS.items()}
    larger = (
        smallest_change(replace(setting, budget=budgets[name], changes=(f"`--gpu {name}`",)))
        for name in sorted(budgets, key=lambda name: budgets[name])
        if budgets[name] > setting.budget
    )
    return next((found for found in larger if found is not None), None)


def describe_speed(setting: Setting, gpu: Gpu, args: PPOConfig) -> str:
    """Say how many tokens a second and how many seconds an update are computed, from slow to fast."""
    sizes, layout = setting.sizes, setting.layout
    work = Work(args.num_iterations, args.steps_per_rollout)
    fast, slow = (update_seconds(sizes, layout, gpu, work, pace) for pace in (FAST, SLOW))
    low, high = (_two_digits(tokens_per_second(sizes, layout, seconds)) for seconds in (slow, fast))
    phases = ", ".join(
        f"{name} {_two_digits(value)} to {_two_digits(vars(slow)[name])}" for name, value in vars(fast).items()
    )
    return (
        f"{'With these changes ' if setting.changes else ''}{low} to {high} completion tokens per second: an update "
        f"takes {_two_digits(fast.total)} to {_two_digits(slow.total)} s ({phases}). Computed, not measured."
    )


def _two_digits(value: float) -> str:
    """A number with two digits that count.

    Example:
        >>> _two_digits(12345.6), _two_digits(0.123), _two_digits(0.0)
        ('12,000', '0.12', '0')
    """
    return f"{float(f'{value:.2g}'):,.10g}"


def _gib(memory: float, sizes: RunSizes) -> float:
    return (memory + (CUDA_CONTEXT_BYTES if sizes.device == "cuda" else 0)) / 1024 / MIB


def _parse(fields: list[str], processes: int) -> tuple[tuple[Any, ...], str]:
    """Parse the fields of the stage on any machine: a plan needs neither the GPU nor W&B."""
    try:
        arguments = parse_stage(ARGUMENTS, [*fields, "--use_cpu", "true", "--report_to", "none"])
    except ValueError as error:
        if "Unknown key" in str(error):
            raise ValueError(
                f"{error} Plans are for the PPO stage: give its YAML, recipes/<name>/ppo.yaml."
            ) from error
        raise
    if processes > 1 and read_setting("generation_batch_size", fields) is not None:
        raise ValueError(
            "`generation_batch_size` counts the completions of all processes, and a plan those of each: give "
            "`steps_per_generation` in its place."
        )
    return arguments, "cpu" if str(read_setting("use_cpu", fields)).lower() in ("true", "1", "yes") else "cuda"


def _caveats(sizes: RunSizes, layout: Layout) -> list[str]:
    notes = []
    if layout.divides_weights and sizes.quantized_bits and not layout.shards_quantized:
        notes.append(
            f"{sizes.quantized_bits}-bit weights in tensors of bytes stay whole on every GPU. To divide 4-bit "
            "weights, set `bnb_4bit_quant_storage: bfloat16`."
        )
    if layout.is_zero and layout.divides_weights:
        notes.append("`PPOTrainer` does not run under ZeRO-3: this is what it would take, for a comparison.")
    elif layout.is_zero:
        notes.append("`PPOTrainer` runs under ZeRO-2 with `bf16: false`; load the base with `dtype: bfloat16`.")
    if layout.divides_weights:
        notes.append(
            "while a rollout is sampled, and under FSDP2 scored, every GPU holds all weights (`buffers`): otherwise "
            "they would be gathered again for each token."
        )
    if sizes.device == "cuda":
        return [
            *notes,
            "planned for a GPU, as torch counts its memory; the CUDA context takes about 0.5 GiB besides, which is "
            "counted against the budget. Add `--use_cpu true` to plan for a CPU.",
        ]
    return [
        *notes,
        "on a CPU this is what tensors take. With glibc's default settings, blocks that were freed stay with the "
        f"process, which was measured to take up to {HEAP_FACTOR} times the peak of training; "
        "MALLOC_MMAP_THRESHOLD_=262144 in the run's environment gives them back, and costs time.",
    ]


def _assumptions(gpu: Gpu) -> str:
    return (
        f"{gpu.title} has {gpu.bandwidth / 1e9:,.0f} GB/s, {gpu.flops / 1e12:,.0f} TFLOP/s in bfloat16 and "
        f"{gpu.link / 1e9:,.0f} GB/s to another GPU, one way. Assumed for the range: passes reach {SLOW.passes:.0%} "
        f"to {FAST.passes:.0%} of the TFLOP/s, decoding {SLOW.reading:.0%} to {FAST.reading:.0%} of the GB/s, links "
        f"{SLOW.link:.0%} to {FAST.link:.0%}; a layer takes {SLOW.python_seconds * 1e3:g} to "
        f"{FAST.python_seconds * 1e3:g} ms a token to launch in transformers, {SLOW.graph_seconds * 1e3:g} to "
        f"{FAST.graph_seconds * 1e3:g} in vLLM; machines are joined by {SLOW.network * 8 / 1e9:.0f} to "
        f"{FAST.network * 8 / 1e9:.0f} Gb/s for each GPU; communication is hidden behind computation, or not. All "
        "texts have their full length."
    )
