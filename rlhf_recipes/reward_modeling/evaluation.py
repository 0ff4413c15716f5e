"""Measure a reward model on held-out pairs: how often, and by how much, it prefers the chosen completion."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from accelerate import PartialState
from torch import Tensor
from tqdm.auto import trange

from rlhf_recipes.evaluation.metrics import proportion_interval

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel
    from trl import RewardTrainer


def evaluate_pairs(trainer: RewardTrainer) -> dict[str, Any]:
    """Score the held-out pairs of a trainer with the model as it is now, and summarise the scores.

    Every process scores all pairs, in the precision that the trainer trains in.

    Args:
        trainer: The trainer; its `eval_dataset` holds the pairs.

    Returns:
        The summary of `pairwise_evaluation`.

    Raises:
        ValueError: If there is no pair, or the model diverged.
    """
    model: Any = trainer.model  # TRL types what a trainer holds only in part
    pairs: Any = trainer.eval_dataset
    batch_size = trainer.args.per_device_eval_batch_size
    with trainer.accelerator.autocast():
        chosen = score_sequences(model, pairs["chosen_ids"], batch_size)
        rejected = score_sequences(model, pairs["rejected_ids"], batch_size)
    return pairwise_evaluation(chosen, rejected)


@torch.no_grad()
def score_sequences(
    model: PreTrainedModel | PeftModel, sequences: Sequence[Sequence[int]], batch_size: int = 32
) -> Tensor:
    """Score token sequences with a reward model in evaluation mode (and leave it in the mode it was in).

    Args:
        model: A model for sequence classification with one output, whose configuration knows the padding token: it
            reads the score at the last token that is not padding.
        sequences: `N` lists of token ids, prompt and completion together, without padding.
        batch_size: Sequences per forward pass.

    Returns:
        Scores in float32 on the CPU, shape `(N,)`.

    Raises:
        ValueError: If there is no sequence, or one is empty.

    Example:
        >>> from transformers import LlamaConfig, LlamaForSequenceClassification
        >>> sizes = dict(hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1)
        >>> model = LlamaForSequenceClassification(LlamaConfig(vocab_size=9, num_labels=1, pad_token_id=0, **sizes))
        >>> score_sequences(model, [[4, 2, 7], [5]]).shape
        torch.Size([2])
    """
    if not sequences or not all(sequences):
        raise ValueError(
            f"Expected sequences of at least one token, got {len(sequences)} sequences, some of them empty."
        )
    padding: int = model.config.get_text_config().pad_token_id
    was_training, scores = model.training, []
    model.eval()
    progress = trange(0, len(sequences), batch_size, desc="scoring", disable=not PartialState().is_local_main_process)
    for start in progress:
        rows = [torch.tensor(ids, device=model.device) for ids in sequences[start : start + batch_size]]
        lengths = torch.tensor([len(row) for row in rows], device=model.device)
        input_ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=padding)
        mask = torch.arange(input_ids.size(1), device=model.device) < lengths[:, None]
        logits = model(input_ids=input_ids, attention_mask=mask.long(), use_cache=False).logits
        scores.append(logits.squeeze(-1).float().cpu())
    model.train(was_training)
    return torch.cat(scores)


def pairwise_evaluation(chosen_scores: Tensor, rejected_scores: Tensor, level: float = 0.95) -> dict[str, Any]:
    """Summarise the scores of held-out pairs.

    Args:
        chosen_scores: Scores of the chosen completions (reward units), shape `(N,)`.
        rejected_scores: Scores of the rejected completions in the same order, shape `(N,)`.
        level: Probability that the interval is to cover the true accuracy, taking the pairs as independent.

    Returns:
        `accuracy`, the share of pairs whose chosen completion scores higher (a tie is no success); `accuracy_ci`, its
        Wilson interval `[low, high]`; `margin`, the mean of chosen minus rejected; `chosen_score` and
        `rejected_score`, the means; and `n`, the number of pairs.

    Raises:
        ValueError: If the shapes differ, there is no pair, or a score is not finite.

    Example:
        >>> result = pairwise_evaluation(torch.tensor([2.0, 1.0, 0.0]), torch.tensor([1.0, 1.0, -2.0]))
        >>> result["n"], result["margin"], round(result["accuracy"], 3)
        (3, 1.0, 0.667)
    """
    if chosen_scores.shape != rejected_scores.shape or chosen_scores.dim() != 1 or not len(chosen_scores):
        raise ValueError(
            "Expected one score per chosen and per rejected completion, shape (N,) with N > 0, got shapes "
            f"{tuple(chosen_scores.shape)} and {tuple(rejected_scores.shape)}."
        )
    margins = (chosen_scores - rejected_scores).double()
    if not margins.isfinite().all():
        raise ValueError(
            f"{int((~margins.isfinite()).sum())} of {len(margins)} pairs have a score that is not finite: the reward "
            "model diverged. Lower its learning rate."
        )
    correct, n = int((margins > 0).sum()), len(margins)
    return {
        "accuracy": correct / n,
        "accuracy_ci": list(proportion_interval(correct, n, level)),
        "margin": margins.mean().item(),
        "chosen_score": chosen_scores.double().mean().item(),
        "rejected_score": rejected_scores.double().mean().item(),
        "n": n,
    }
