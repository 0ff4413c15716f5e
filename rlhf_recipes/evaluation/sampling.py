"""Sampling held-out completions from any TRL trainer: the same with any number of processes, and beside the training.

`PPOTrainer` has a way of its own (`evaluation.policy`), because its roles share one model.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import numpy as np
import torch
from accelerate.utils import gather_object
from datasets import Dataset
from peft import PeftModel
from torch import Tensor
from tqdm.auto import tqdm
from transformers import GenerationConfig, Trainer
from trl import GRPOTrainer, RLOOTrainer, is_conversational
from trl.trainer.utils import use_adapter

from rlhf_recipes.data.chat_templates import encode_prompt, end_token_ids, options_of
from rlhf_recipes.models.generation import sample_with_transformers
from rlhf_recipes.models.plain_lora import changes_base
from rlhf_recipes.ppo._trl import rewards, tokenized_prompts

Row = dict[str, Any]


@contextmanager
def own_randomness(seed: int) -> Iterator[None]:
    """Seed Python, NumPy and torch, and give them back their states at the end: training goes on as without it."""
    states = random.getstate(), np.random.get_state()
    with torch.random.fork_rng():
        random.seed(seed)
        np.random.seed(seed % 2**32)
        torch.manual_seed(seed)
        try:
            yield
        finally:
            random.setstate(states[0])
            np.random.set_state(states[1])


@contextmanager
def untimed(trainer: Any) -> Iterator[None]:
    """Let TRL send no times of its parts to trackers: those of an evaluation are not those of the training.

    It would even raise at the end of a training, where trackio's run is over.
    """
    report_to, trainer.args.report_to = trainer.args.report_to, []
    try:
        yield
    finally:
        trainer.args.report_to = report_to


def in_batches(
    trainer: Trainer,
    dataset: Dataset,
    indices: list[int],
    sample: Callable[[list[Row]], list[Row]],
    seed: int,
    title: str = "sampling",
) -> list[Row]:
    """Spread rows over the processes, batch by batch, and collect the results on all of them.

    Every batch has its own seed, so the number of processes changes nothing.

    Args:
        trainer: The trainer, with its batch size for evaluations.
        dataset: Rows with a column `prompt`.
        indices: The rows to take, `N` of them.
        sample: Makes one result from each row of a batch. All processes call it equally often, with equally many rows.
        seed: Seed of the sampling.
        title: What the progress bar says.

    Returns:
        `N` results, in the order of the indices.
    """
    size, processes = trainer.args.per_device_eval_batch_size, trainer.accelerator.num_processes
    padded = indices + indices[: -len(indices) % size]  # whole batches only: processes exchange equal shapes
    batches = [padded[start : start + size] for start in range(0, len(padded), size)]
    rank, results = trainer.accelerator.process_index, []
    rounds = range(0, len(batches), processes)
    for start in tqdm(rounds, desc=title, leave=False, disable=not trainer.is_world_process_zero()):
        number = min(start + rank, len(batches) - 1)  # a process without a batch repeats the last one
        with own_randomness(seed * 1_000_003 + number), untimed(trainer):
            results.append((number, sample([dataset[index] for index in batches[number]])))
    gathered = dict(gather_object(results))
    return [row for number in range(len(batches)) for row in gathered[number]][: len(indices)]


def measured(completion: Any, ids: list[int], eos_token_ids: Sequence[int], kl: float | None, entropy: float) -> Row:
    """What is known of one completion without a reward: `kl` and `entropy` are sums over its tokens, in nats."""
    return {
        "completion": completion,
        "completion_ids": ids,
        "kl": kl,
        "entropy": entropy,
        "length": len(ids),
        "eos_rate": float(bool(ids) and ids[-1] in eos_token_ids),
    }


def with_scores(columns: Tensor, trainer: Any, gold: str | None) -> list[Row]:
    """Weigh the results of all reward functions, shape `(B, functions)`, and pick the judge's."""
    totals = (columns * trainer.reward_weights.to(columns.device)).nansum(dim=1)
    golds = None if gold is None else columns[:, trainer.reward_func_names.index(gold)].tolist()
    return [
        {"gold_score": None if golds is None else golds[i], "reward_score": total}
        for i, total in enumerate(totals.tolist())
    ]


def has_reference(trainer: Any) -> bool:
    """Whether the model that the training started from is still there: beside an adapter, or as a copy.

    An adapter that took a part of the base with it (PiSSA) leaves another model beside it.
    """
    model = trainer.accelerator.unwrap_model(trainer.model)
    if isinstance(model, PeftModel) and "ref" not in model.peft_config:
        return not changes_base(model.peft_config[model.active_adapter])
    return isinstance(model, PeftModel) or getattr(trainer, "ref_model", None) is not None


@contextmanager
def _as_reference(trainer: Any) -> Iterator[Any]:
    model = trainer.accelerator.unwrap_model(trainer.model)
    if isinstance(model, PeftModel):
        with use_adapter(model, "ref" if "ref" in model.peft_config else None):
            yield model
    else:
        yield trainer.accelerator.unwrap_model(trainer.ref_model)


@torch.no_grad()
def sample_batch(
    trainer: Any, rows: list[Row], *, of_reference: bool, gold: str | None, max_new_tokens: int = 128
) -> list[Row]:
    """Sample one completion per row, and measure it, in the way that fits any trainer.

    The tokens are drawn from the model itself at the trainer's temperature (1 where it has none): settings of the
    model's `generation_config`, or of a GRPO run, that shape what is drawn have no effect, since the KL is a mean over
    the model's own samples.

    Args:
        trainer: A trainer of a causal language model. GRPO and RLOO score with their reward functions; others do not.
        rows: Rows with a column `prompt`.
        of_reference: Sample from the reference, which must be there, in place of the policy.
        gold: Name of the reward function that measures the truth, if there is one.
        max_new_tokens: Longest completion, where the trainer has no generation settings of its own.

    Returns:
        As `policy.sample_rows`; `kl` is `None` without a reference, and the scores without reward functions.
    """
    tokenizer = trainer.processing_class
    temperature = getattr(trainer, "temperature", 1.0)
    ends = getattr(trainer, "eos_token_ids", None) or end_token_ids(
        trainer.accelerator.unwrap_model(trainer.model), tokenizer
    )
    config = GenerationConfig(
        do_sample=True,
        temperature=temperature,
        top_k=0,
        max_new_tokens=getattr(trainer, "max_completion_length", None) or max_new_tokens,
        eos_token_id=ends,
        pad_token_id=tokenizer.pad_token_id,
    )
    prompts = [row["prompt"] for row in rows]
    inputs = _padded(tokenizer, _prompt_ids(trainer, rows)).to(trainer.accelerator.device)
    policy = nullcontext(trainer.accelerator.unwrap_model(trainer.model))
    with _as_reference(trainer) if of_reference else policy as model:
        sequences = sample_with_transformers(model, config, temperature, **inputs)
        start = inputs["input_ids"].size(1)
        completion_ids = [_until_end(ids, ends) for ids in sequences[:, start:].tolist()]
        logps, entropies = _logps(model, inputs["attention_mask"], sequences, completion_ids, temperature)
    kl: list[float] | list[None] = [None] * len(rows)
    if has_reference(trainer):
        with _as_reference(trainer) as model:
            ref_logps, _ = _logps(model, inputs["attention_mask"], sequences, completion_ids, temperature)
        kl = (logps - ref_logps).sum(dim=1).tolist()
    completions: list[Any] = tokenizer.batch_decode(completion_ids, skip_special_tokens=True)
    if is_conversational({"prompt": prompts[0]}):
        completions = [[{"role": "assistant", "content": text}] for text in completions]
    scored: list[Row] = [{"gold_score": None, "reward_score": None} for _ in rows]
    if isinstance(trainer, GRPOTrainer | RLOOTrainer):
        columns = rewards(trainer, rows, completions, completion_ids)  # type: ignore[arg-type]
        first = trainer.accelerator.process_index * len(rows)
        scored = with_scores(columns[first : first + len(rows)], trainer, gold)
    sums = entropies.sum(dim=1).tolist()
    return [measured(completions[i], ids, ends, kl[i], sums[i]) | scored[i] for i, ids in enumerate(completion_ids)]


def _prompt_ids(trainer: Any, rows: list[Row]) -> list[list[int]]:
    """Token ids of the prompts as the training reads them."""
    if isinstance(trainer, GRPOTrainer | RLOOTrainer):
        return tokenized_prompts(trainer, [row["prompt"] for row in rows])
    return [encode_prompt(trainer.processing_class, row["prompt"], **options_of(row)) for row in rows]


def _padded(tokenizer: Any, prompt_ids: list[list[int]]) -> Any:
    return tokenizer.pad({"input_ids": prompt_ids}, padding_side="left", return_tensors="pt")


def _until_end(ids: list[int], eos_token_ids: Sequence[int]) -> list[int]:
    ends = [position for position, token in enumerate(ids) if token in eos_token_ids]
    return ids[: ends[0] + 1] if ends else ids


def _logps(
    model: Any, prompt_mask: Tensor, sequences: Tensor, completion_ids: list[list[int]], temperature: float
) -> tuple[Tensor, Tensor]:
    """Log-probabilities and entropies of the completions' tokens, 0 on padding, each shape `(B, T)`."""
    length = sequences.size(1) - prompt_mask.size(1)
    lengths = torch.tensor([len(ids) for ids in completion_ids], device=sequences.device)
    mask = torch.arange(length, device=sequences.device) < lengths[:, None]
    attention = torch.cat([prompt_mask, mask.to(prompt_mask.dtype)], dim=1)
    positions = (attention.cumsum(dim=1) - 1).clamp(min=0)  # left-padded prompts begin at 0
    logits = model(input_ids=sequences, attention_mask=attention, position_ids=positions).logits
    logps = (logits[:, -length - 1 : -1].float() / temperature).log_softmax(dim=-1)
    entropies = -(logps.exp() * logps).sum(dim=-1)
    chosen = logps.gather(2, sequences[:, -length:, None]).squeeze(2)
    return chosen.masked_fill(~mask, 0.0), entropies.masked_fill(~mask, 0.0)
