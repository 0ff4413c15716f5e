"""An out-of-memory error that says which phase of PPO it was in, what the sizes were, and which knobs help."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import TYPE_CHECKING, Any, Protocol

import torch

from rlhf_recipes.ppo.rollout import texts_of

if TYPE_CHECKING:
    from rlhf_recipes.ppo.config import PPOConfig
    from rlhf_recipes.ppo.rollout import Batch

_LENGTHS = "shorter prompts, or a lower `max_completion_length`"
_BASE = "`load_in_4bit: true`, if the base is not quantized yet"
KNOBS = {
    "generate": (
        "a smaller rollout: lower `steps_per_generation` (all of its completions are generated together)",
        _LENGTHS,
        _BASE,
    ),
    "score": (
        "lower `per_device_train_batch_size` and raise `gradient_accumulation_steps` and `steps_per_generation` by "
        "the same factor (in evaluations: lower `per_device_eval_batch_size`)",
        _LENGTHS,
        _BASE,
    ),
    "train": (
        "lower `per_device_train_batch_size` and raise `gradient_accumulation_steps` and `steps_per_generation` by "
        "the same factor",
        "`activation_checkpointing: true`",
        _LENGTHS,
        _BASE,
        "`critic: head`, which has no adapter and no forward pass of its own",
    ),
}


@contextmanager
def explain_out_of_memory(phase: str, sizes: Callable[[], str]) -> Iterator[None]:
    """Add phase, sizes and knobs to an out-of-memory error that is raised inside; its type stays.

    Args:
        phase: `"generate"`, `"score"` or `"train"`. The innermost phase is the one that is named.
        sizes: Says, after the error, what the batch was.

    Example:
        >>> try:
        ...     with explain_out_of_memory("train", lambda: "2 sequences"):
        ...         raise torch.OutOfMemoryError("no memory")
        ... except torch.OutOfMemoryError as error:
        ...     print(error.__notes__[0].split(". ")[0])
        PPO ran out of memory in the phase 'train' (2 sequences)
    """
    try:
        yield
    except torch.OutOfMemoryError as error:
        if not any(note.startswith("PPO ran") for note in getattr(error, "__notes__", ())):
            knobs = "; ".join(f"{number}. {knob}" for number, knob in enumerate(KNOBS[phase], start=1))
            error.add_note(
                f"PPO ran out of memory in the phase '{phase}' ({sizes()}). What helps, in this order: {knobs}. "
                "`rlhf-recipes plan` computes what a phase takes before the run."
            )
        raise


class _Run(Protocol):
    args: PPOConfig
    model: Any
    _buffered_inputs: list[Batch] | None


def phase(name: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Mark a method of the trainer as a phase, for `explain_out_of_memory`."""

    def mark(method: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(method)
        def marked(self: _Run, *args: Any, **kwargs: Any) -> Any:
            with explain_out_of_memory(name, lambda: _sizes(self, name)):
                return method(self, *args, **kwargs)

        return marked

    return mark


def _sizes(run: _Run, phase: str) -> str:
    """What the batch of a phase was."""
    args, training, rollout = run.args, run.model.training, run._buffered_inputs
    micro_batch = args.per_device_train_batch_size if training else args.per_device_eval_batch_size
    if phase == "generate":
        rows = micro_batch * args.micro_batches_per_rollout if training else micro_batch
        return f"{rows} completions of up to {args.max_completion_length} tokens together"
    text = f"micro-batches of {micro_batch} sequences"
    if phase == "train" and rollout:
        texts = texts_of(rollout[0])
        width, longest = texts.ids.size(1), int(texts.lengths.max())
        text += f", {width} tokens wide with padding; the longest sequence of the first one has {longest}"
    return text
