"""Whether a run fits on its GPUs, and the smallest change with which it does."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import combinations
from typing import Any

from rlhf_recipes.tools.planning.phases import largest_micro_batch
from rlhf_recipes.tools.planning.serving import server_memory
from rlhf_recipes.tools.planning.sizes import Layout, RunSizes

MOST_GPUS = 64


@dataclass(frozen=True)
class Setting:
    """A run, what it may take, and what was changed of it.

    Attributes:
        sizes: The run.
        layout: How it lies on GPUs.
        budget: Bytes of each GPU that it may take.
        in_a_step: Completions of one optimizer step of a process.
        changes: What was changed, as a user writes it.
    """

    sizes: RunSizes
    layout: Layout
    budget: float
    in_a_step: int
    changes: tuple[str, ...] = ()

    @property
    def micro_batches(self) -> list[int]:
        """Those that leave an optimizer step what it is."""
        return [size for size in range(1, self.in_a_step + 1) if self.in_a_step % size == 0]


def smallest_change(setting: Setting) -> Setting | None:
    """Find what to change so that all phases fit: as little as possible, and then with the largest micro-batch.

    A smaller micro-batch comes first, which leaves an optimizer step what it was; then single changes of `_CHANGES`,
    pairs of them and so on, in their order; then the same on twice as many GPUs, up to 64.

    Args:
        setting: The run.

    Returns:
        The changed run (without changes, if it fits), or `None` if nothing here helps.
    """
    found = next((changed for candidate in _candidates(setting) if (changed := _fitting(candidate))), None)
    divided = found is not None and found.sizes.quantized_bits == 4 and found.layout.divides_weights
    if found is None or not divided or setting.layout.shards_quantized:
        return found
    return _with(found, "`bnb_4bit_quant_storage: bfloat16`")


def has_room_for_vllm(setting: Setting) -> bool:
    """Whether vLLM, if it generates, has room for a completion of full length beside its weights."""
    return setting.layout.vllm == "none" or server_memory(setting.sizes, setting.layout).sequences > 0


def _fitting(setting: Setting) -> Setting | None:
    """The setting with the largest micro-batch, up to its own, with which it fits."""
    smaller = [size for size in setting.micro_batches if size <= setting.sizes.micro_batch]
    size = largest_micro_batch(setting.sizes, setting.budget, smaller, setting.layout)
    if size is None or not has_room_for_vllm(setting):
        return None
    if size == setting.sizes.micro_batch:
        return setting
    words = f"`per_device_train_batch_size: {size}` with `gradient_accumulation_steps: {setting.in_a_step // size}`"
    return _with(setting, words, micro_batch=size)


def _candidates(setting: Setting) -> Iterator[Setting]:
    gpus = setting.layout.processes
    while gpus == setting.layout.processes or gpus <= MOST_GPUS:
        start = setting if gpus == setting.layout.processes else _spread(setting, gpus)
        for number in range(len(_CHANGES) + 1):
            for changes in combinations(_CHANGES, number):
                changed: Setting | None = start
                for change in changes:
                    changed = changed and change(changed)
                if changed is not None:
                    yield changed
        if setting.sizes.device == "cpu":
            return
        gpus *= 2


def _with(setting: Setting, words: str, layout: Layout | None = None, **sizes: Any) -> Setting:
    changes = (*setting.changes, words)
    return replace(setting, sizes=replace(setting.sizes, **sizes), layout=layout or setting.layout, changes=changes)


def _spread(setting: Setting, gpus: int) -> Setting:
    layout = replace(setting.layout, processes=gpus, sharding="fsdp2", shards_quantized=True)
    return _with(setting, f"`--num_processes {gpus} --sharding fsdp2`", layout)


def _recomputed(setting: Setting) -> Setting | None:
    if setting.sizes.checkpointing == 1:
        return None
    return _with(setting, "`activation_checkpointing: true`", checkpointing=1)


def _evaluated_in_turn(setting: Setting) -> Setting | None:
    if setting.sizes.evaluation_batch == 1:
        return None
    return _with(setting, "`per_device_eval_batch_size: 1`", evaluation_batch=1)


def _short_rollout(setting: Setting) -> Setting | None:
    if setting.sizes.rollout <= setting.in_a_step:
        return None
    words = "a rollout of one optimizer step (`steps_per_generation` as `gradient_accumulation_steps`)"
    return _with(setting, words, rollout=setting.in_a_step)


def _sharded(setting: Setting) -> Setting | None:
    if setting.layout.processes == 1 or setting.layout.divides_weights:
        return None
    return _spread(setting, setting.layout.processes)


def _in_4_bits(setting: Setting) -> Setting | None:
    if setting.sizes.quantized_bits:
        return None
    layout = replace(setting.layout, shards_quantized=True)
    return _with(setting, "`load_in_4bit: true`", layout, quantized_bits=4)


def _in_floats(setting: Setting) -> Setting | None:
    if setting.sizes.quantized_bits != 4 or not setting.layout.divides_weights or setting.layout.shards_quantized:
        return None
    return replace(setting, layout=replace(setting.layout, shards_quantized=True))  # `smallest_change` says it


def _in_16_bits(setting: Setting) -> Setting | None:
    if not setting.sizes.quantized_bits or not setting.layout.divides_weights:
        return None  # whole on each GPU, they take more; divided, each GPU reads its part
    return _with(setting, "`load_in_4bit: false` with `dtype: bfloat16`", quantized_bits=0, weight_bytes=2)


_CHANGES: tuple[Callable[[Setting], Setting | None], ...] = (
    _recomputed,
    _evaluated_in_turn,
    _short_rollout,
    _sharded,
    _in_floats,
    _in_4_bits,
    _in_16_bits,
)
