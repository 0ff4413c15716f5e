"""The one place that calls what is inside TRL: its output layer, its generation settings, its reward functions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from peft import PeftModel
from torch import Tensor
from trl import GRPOTrainer, is_conversational
from trl.models import unwrap_model_for_generation
from trl.trainer.utils import add_fused_lm_head, pad

from rlhf_recipes.models.generation import sample, sample_with_transformers
from rlhf_recipes.models.packing import is_packed
from rlhf_recipes.models.rows import spread
from rlhf_recipes.models.states import states_at
from rlhf_recipes.ppo.padding import by_length, join_columns, positions_before, put_together, sequences, text_rows


def add_log_probs(trainer: GRPOTrainer, model: Any) -> None:
    """Give a second base model the output layer that `completion_logps` needs; the trainer's own has it."""
    args: Any = trainer.args
    add_fused_lm_head(model, trainer.temperature, args.cast_lm_head_to_fp32, ("log_probs", "entropy"))


def completion_logps(
    trainer: GRPOTrainer, model: Any, batch: dict[str, Tensor], batch_size: int | None = None
) -> tuple[Tensor, Tensor]:
    """Compute the log-probability of every completion token, and the entropy where it was sampled.

    Args:
        trainer: The trainer whose engine is used.
        model: The model to run, possibly wrapped for distributed training.
        batch: `prompt_ids`, `prompt_mask` (B, P), `completion_ids`, `completion_mask` (B, T).
        batch_size: Sequences per forward pass; all at once by default.

    Returns:
        `(per_token_logps, entropies)`, each `(B, T)`, in nats; 0 on padding.
    """
    return policy_pass(trainer, model, batch, batch_size)[:2]


class PolicyPass(NamedTuple):
    """What a pass of a policy over a batch tells of its completions.

    Attributes:
        logps: Log-probabilities of the tokens in nats, shape `(B, T)`; 0 on padding.
        entropies: Entropies of the distributions that they were drawn from, in nats, shape `(B, T)`.
        kept: What `read` kept, `(B, T, ...)`, or `None`.
        router_loss: How unevenly the routers of a mixture of experts use them, of all tokens, a scalar, or `None`.
    """

    logps: Tensor
    entropies: Tensor
    kept: Any
    router_loss: Tensor | None


def policy_pass(
    trainer: GRPOTrainer,
    model: Any,
    batch: dict[str, Tensor],
    batch_size: int | None = None,
    read: Callable[[Tensor], Tensor] | None = None,
    router_loss: bool = False,
) -> PolicyPass:
    """Compute log-probabilities and entropies as `completion_logps` does, and what the same pass tells besides.

    They come from TRL's fused output layer, at the sampling temperature, without a tensor of (B, T, vocabulary).

    Args:
        trainer: The trainer whose engine is used.
        model: The model to run, possibly wrapped for distributed training.
        batch: `prompt_ids`, `prompt_mask` (B, P), `completion_ids`, `completion_mask` (B, T).
        batch_size: Sequences per forward pass; all at once by default.
        read: What to keep of the last hidden states `(1, n, H)` from which the `n` tokens were drawn: `(1, n, ...)`.
        router_loss: Whether to compute the routers' loss, in one pass over all sequences.
    """
    routers = {"output_router_logits": True} if router_loss else {}
    parts: list[tuple[Tensor, list[Tensor]]] = []
    length, inner = batch["completion_ids"].size(1), trainer.accelerator.unwrap_model(model)
    for rows, part in by_length(sequences(batch), batch_size or len(batch["prompt_ids"])):
        texts, mask = text_rows(part, is_packed(inner)), part["completion_mask"]
        drawn = mask.flatten().nonzero().squeeze(1)
        places = texts.places(positions_before(part)).flatten()[drawn]
        labels = part["completion_ids"].flatten()[drawn]
        labels = torch.nn.functional.pad(labels, (1, 0), value=-100)  # TRL scores labels by the state before them
        with trainer.accelerator.autocast(), states_at(inner, places) as states:
            input_ids = texts.join(join_columns(part, "ids"))
            outputs = model(input_ids=input_ids, **texts.arguments, **routers, labels=labels[None], fused_lm_head=True)
            more = [] if read is None else [read(states[0])]
        tokens = [values[0] for values in (outputs.log_probs, outputs.entropy, *more)]
        parts.append((rows, [spread(each, drawn, *mask.shape) for each in tokens]))
    found = [put_together([(rows, values[i]) for rows, values in parts], length) for i in range(len(parts[0][1]))]
    kept = found[2] if read is not None else None
    return PolicyPass(found[0], found[1], kept, outputs.aux_loss if router_loss else None)


def generate(
    trainer: GRPOTrainer, model: Any, prompts: list[Any]
) -> tuple[dict[str, Tensor], list[Any], list[list[int]]]:
    """Sample one completion per prompt from a model, with the adapter in use and the trainer's generation settings.

    Args:
        trainer: The trainer.
        model: The model to sample from.
        prompts: Plain texts or lists of messages, `B` of them.

    Returns:
        `(batch, completions, completion_ids)`: the padded tensors that `completion_logps` takes, the texts (or
        messages) and the unpadded token ids, with the end token where it was sampled.
    """
    tokenizer: Any = trainer.processing_class
    prompt_ids, _, _ = trainer._tokenize_prompts(prompts)
    batch = _padded(trainer, "prompt", prompt_ids, "left")
    completion_ids = _sample(trainer, model, batch)
    completions = tokenizer.batch_decode(completion_ids, skip_special_tokens=True)
    if is_conversational({"prompt": prompts[0]}):
        completions = [[{"role": "assistant", "content": text}] for text in completions]
    return batch | _padded(trainer, "completion", completion_ids, "right"), completions, completion_ids


def sample_rollout(trainer: GRPOTrainer, prompt_ids: list[list[int]]) -> list[list[int]]:
    """Sample one completion per prompt from the policy: token ids, with the end token where it was sampled."""
    args: Any = trainer.args
    with unwrap_model_for_generation(
        trainer.model_wrapped,
        trainer.accelerator,
        generation_kwargs=trainer.generation_kwargs,
        gradient_checkpointing_kwargs=args.gradient_checkpointing_kwargs,
    ) as model:
        return _sample(trainer, model, _padded(trainer, "prompt", prompt_ids, "left"))


def _sample(trainer: GRPOTrainer, model: Any, batch: dict[str, Tensor]) -> list[list[int]]:
    inner: Any = model.get_base_model() if isinstance(model, PeftModel) else model
    args: Any = trainer.args
    ids, mask = batch["prompt_ids"], batch["prompt_mask"]
    config, ends = trainer.generation_config, trainer.eos_token_ids
    if is_packed(inner) and not args.generation_kwargs and not args.cache_implementation:
        sequences = sample(inner, ids, mask, config, trainer.temperature, ends)
    else:
        sequences = sample_with_transformers(model, config, trainer.temperature, input_ids=ids, attention_mask=mask)
    rows = sequences[:, ids.size(1) :].tolist()
    first_ends = [next((i for i, token in enumerate(row) if token in ends), len(row)) for row in rows]
    return [row[: end + 1] for row, end in zip(rows, first_ends, strict=True)]


def _padded(trainer: GRPOTrainer, name: str, rows: list[list[int]], side: str) -> dict[str, Tensor]:
    ids = [torch.tensor(row, device=trainer.accelerator.device) for row in rows]
    tokenizer: Any = trainer.processing_class
    return {
        f"{name}_ids": pad(ids, padding_value=tokenizer.pad_token_id, padding_side=side),
        f"{name}_mask": pad([torch.ones_like(row) for row in ids], padding_value=0, padding_side=side),
    }


def tokenized_prompts(trainer: Any, prompts: list[Any]) -> list[list[int]]:
    """Token ids of prompts as a GRPO, RLOO or PPO trainer makes them, with its template, tools and their options."""
    prompt_ids, *_ = trainer._tokenize_prompts(prompts)
    return [list(ids) for ids in prompt_ids]


def rewards(
    trainer: GRPOTrainer, rows: list[dict[str, Any]], completions: list[Any], completion_ids: list[list[int]]
) -> Tensor:
    """Call all reward functions of a trainer: rewards of all processes, shape `(processes * B, functions)`."""
    prompts = [row["prompt"] for row in rows]
    found: Tensor = trainer._calculate_rewards(rows, prompts, completions, completion_ids)
    # What a function logs of these completions is not of the next rollout, to which TRL would add it
    trainer._pending_extra_logs.clear()
    trainer._pending_metrics.clear()
    return found


def last_rollout(trainer: Any) -> list[dict[str, Any]]:
    """What a GRPO, RLOO or PPO trainer keeps of its last rollout for its table of completions, from all processes.

    Returns:
        For each completion `prompt`, `completion` and `scores`, which has the score by each reward function (nan where
        it gave none); at most as many as a rollout has, the newest.
    """
    logs = trainer._logs
    return [
        {"prompt": prompt, "completion": completion, "scores": dict(zip(logs["rewards"], scores, strict=True))}
        for prompt, completion, *scores in zip(
            logs["prompt"], logs["completion"], *logs["rewards"].values(), strict=True
        )
    ]
