"""Sampling held-out completions from any TRL trainer: the same with any number of processes, and beside the training.

`B` rows, `T` completion tokens.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
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
from rlhf_recipes.models.adapters import POLICY
from rlhf_recipes.models.generation import sample_after
from rlhf_recipes.models.image_embeddings import EmbeddedPrompt
from rlhf_recipes.models.padding import keeps_padding_out
from rlhf_recipes.models.plain_lora import changes_base
from rlhf_recipes.models.rows import Texts
from rlhf_recipes.models.sharding import gathered
from rlhf_recipes.models.states import completion_logps
from rlhf_recipes.ppo._trl import rewards, tokenized_prompts
from rlhf_recipes.ppo.passes import policy_pass, sample_from
from rlhf_recipes.ppo.trainer import PPOTrainer
from rlhf_recipes.rewards.encoding import which_ended

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
    for start in tqdm(rounds, desc=title, leave=False, disable=None if trainer.is_world_process_zero() else True):
        number = min(start + rank, len(batches) - 1)  # a process without a batch repeats the last one
        with own_randomness(seed * 1_000_003 + number), untimed(trainer):
            results.append((number, sample([dataset[index] for index in batches[number]])))
    gathered = dict(gather_object(results))
    return [row for number in range(len(batches)) for row in gathered[number]][: len(indices)]


def sample_rows(
    trainer: Any,
    dataset: Dataset,
    indices: list[int],
    *,
    of_reference: bool,
    gold: str | None,
    seed: int,
    max_new_tokens: int = 128,
) -> list[Row]:
    """Sample one completion per index from the policy of any trainer, or from its reference, and measure it.

    The tokens are drawn from the model itself at the trainer's temperature (1 where it has none): settings of the
    model's `generation_config`, or of a GRPO run, that shape what is drawn have no effect, since the KL is a mean over
    the model's own samples. A model whose generation does not keep padding out samples after prompts of one length at
    a time; `PPOTrainer` refuses such models.

    Args:
        trainer: A trainer of a causal language model, with its model in evaluation mode. PPO, GRPO and RLOO score with
            their reward functions; others do not.
        dataset: Rows with a column `prompt`.
        indices: The rows to take, `N` of them.
        of_reference: Sample from the reference, which must be there (`has_reference`), in place of the policy.
        gold: Name of the reward function that measures the truth, if there is one.
        seed: Seed of the sampling.
        max_new_tokens: Longest completion, where the trainer has no generation settings of its own.

    Returns:
        For each completion `completion` (text or messages), `completion_ids`, `kl` and `entropy` (sums over the
        tokens, in nats), `length`, `eos_rate`, `gold_score`, `reward_score` and `rewards` (what each reward function
        gave, by name); on all processes the same. `kl` is `None` without a reference, and the scores without reward
        functions.
    """
    model, args = trainer.accelerator.unwrap_model(trainer.model), trainer.args
    half_precision = args.bf16 or args.fp16 or model.dtype in (torch.bfloat16, torch.float16)
    title = f"sampling, {'reference' if of_reference else 'policy'}"
    with gathered(trainer.accelerator, trainer.model):
        mixed = isinstance(trainer, PPOTrainer) or keeps_padding_out(model, trainer.processing_class, half_precision)
        sample = partial(
            _sample_batch,
            trainer,
            of_reference=of_reference,
            gold=gold,
            max_new_tokens=max_new_tokens,
            mixed_lengths=mixed,
        )
        return in_batches(trainer, dataset, indices, sample, seed, title)


def has_reference(trainer: Any) -> bool:
    """Whether the model that the training started from is still there: beside an adapter, or as a copy.

    An adapter that took a part of the base with it (PiSSA) leaves another model beside it.
    """
    model = trainer.accelerator.unwrap_model(trainer.model)
    if isinstance(trainer, PPOTrainer):
        return True
    if isinstance(model, PeftModel) and "ref" not in model.peft_config:
        return not changes_base(model.peft_config[model.active_adapter])
    return isinstance(model, PeftModel) or getattr(trainer, "ref_model", None) is not None


@contextmanager
def network(trainer: Any, of_reference: bool) -> Iterator[Any]:
    """Make the policy of a trainer, or its reference, the one that computes within the block, and yield its model."""
    model = trainer.accelerator.unwrap_model(trainer.model)
    if isinstance(trainer, PPOTrainer):  # its roles share one base
        with trainer.roles.use(trainer.reference if of_reference else POLICY):
            yield trainer.roles.model if of_reference else model
    elif not of_reference:
        yield model
    elif isinstance(model, PeftModel):
        with use_adapter(model, "ref" if "ref" in model.peft_config else None):
            yield model
    else:
        yield trainer.accelerator.unwrap_model(trainer.ref_model)


@torch.no_grad()
def _sample_batch(
    trainer: Any, rows: list[Row], *, of_reference: bool, gold: str | None, max_new_tokens: int, mixed_lengths: bool
) -> list[Row]:
    tokenizer, device = trainer.processing_class, trainer.accelerator.device
    ends = getattr(trainer, "eos_token_ids", None) or end_token_ids(
        trainer.accelerator.unwrap_model(trainer.model), tokenizer
    )
    rows = trainer.chats_of(rows) if isinstance(trainer, PPOTrainer) else rows
    prompt_ids = _prompt_ids(trainer, rows)
    embedded = trainer.embedded_prompts(prompt_ids, rows) if isinstance(trainer, PPOTrainer) else None
    with network(trainer, of_reference) as model:
        completion_ids = _completion_ids(trainer, model, prompt_ids, embedded, ends, max_new_tokens, mixed_lengths)
        texts = Texts.padded(prompt_ids, completion_ids, tokenizer.pad_token_id, device, embedded)
        logps, entropies = _logps(trainer, model, texts)
    kl: list[float] | list[None] = [None] * len(rows)
    if has_reference(trainer):
        with network(trainer, of_reference=True) as model:
            ref_logps = logps if of_reference else _logps(trainer, model, texts)[0]
        kl = (logps - ref_logps).sum(dim=1).tolist()
    completions: list[Any] = tokenizer.batch_decode(completion_ids, skip_special_tokens=True)
    if is_conversational({"prompt": rows[0]["prompt"]}):
        completions = [[{"role": "assistant", "content": text}] for text in completions]
    finished = (
        trainer.truncation.finished(completion_ids)
        if isinstance(trainer, PPOTrainer)
        else which_ended(len(rows), completion_ids, ends, None)
    )
    scores, sums = _scores(trainer, rows, completions, completion_ids, gold), entropies.sum(dim=1).tolist()
    return [
        {
            "completion": completions[i],
            "completion_ids": ids,
            "kl": kl[i],
            "entropy": sums[i],
            "length": len(ids),
            "eos_rate": float(finished[i]),
            **scores[i],
        }
        for i, ids in enumerate(completion_ids)
    ]


def _prompt_ids(trainer: Any, rows: list[Row]) -> list[list[int]]:
    """Token ids of the prompts as the training reads them."""
    if isinstance(trainer, GRPOTrainer | RLOOTrainer):
        return tokenized_prompts(trainer, [row["prompt"] for row in rows])
    return [encode_prompt(trainer.processing_class, row["prompt"], **options_of(row)) for row in rows]


def _completion_ids(
    trainer: Any,
    model: Any,
    prompt_ids: list[list[int]],
    embedded: list[EmbeddedPrompt] | None,
    ends: Sequence[int],
    max_new_tokens: int,
    mixed_lengths: bool,
) -> list[list[int]]:
    if isinstance(trainer, PPOTrainer):  # as in its rollouts
        return sample_from(trainer, model, prompt_ids, embedded)
    temperature = getattr(trainer, "temperature", 1.0)
    config = GenerationConfig(
        do_sample=True,
        temperature=temperature,
        top_k=0,
        max_new_tokens=getattr(trainer, "max_completion_length", None) or max_new_tokens,
        eos_token_id=list(ends),
        pad_token_id=trainer.processing_class.pad_token_id,
    )
    if mixed_lengths:
        return sample_after(model, prompt_ids, config, temperature, ends)
    completion_ids: dict[int, list[int]] = {}
    for length in sorted(set(map(len, prompt_ids))):
        alike = [index for index, ids in enumerate(prompt_ids) if len(ids) == length]
        sampled = sample_after(model, [prompt_ids[index] for index in alike], config, temperature, ends)
        completion_ids |= zip(alike, sampled, strict=True)
    return [completion_ids[index] for index in range(len(prompt_ids))]


def _logps(trainer: Any, model: Any, texts: Texts) -> tuple[Tensor, Tensor]:
    """Log-probabilities and entropies of the completions' tokens in nats, 0 on padding, each `(B, T)`."""
    if isinstance(trainer, PPOTrainer):  # its numbers are those of the training
        outputs = policy_pass(trainer, model, texts)
        return outputs.logps, outputs.entropies
    return completion_logps(model, texts, getattr(trainer, "temperature", 1.0))


def _scores(
    trainer: Any, rows: list[Row], completions: list[Any], completion_ids: list[list[int]], gold: str | None
) -> list[Row]:
    """Weigh the results of all reward functions, and pick the judge's."""
    if not isinstance(trainer, GRPOTrainer | RLOOTrainer):
        return [{"gold_score": None, "reward_score": None, "rewards": {}} for _ in rows]
    rewards_per_func = rewards(trainer, rows, completions, completion_ids)  # type: ignore[arg-type]
    start = trainer.accelerator.process_index * len(rows)
    columns = rewards_per_func[start : start + len(rows)]
    totals = (columns * trainer.reward_weights.to(columns.device)).nansum(dim=1).tolist()
    index = None if gold is None else trainer.reward_func_names.index(gold)
    golds = [None] * len(rows) if index is None else columns[:, index].tolist()
    named = [dict(zip(trainer.reward_func_names, values, strict=True)) for values in columns.tolist()]
    return [
        {"gold_score": gold, "reward_score": total, "rewards": each}
        for gold, total, each in zip(golds, totals, named, strict=True)
    ]
