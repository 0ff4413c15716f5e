"""Measure a reward model on held-out pairs: how often, and by how much, it prefers the chosen completion."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from accelerate import PartialState
from torch import Tensor
from tqdm.auto import trange

from rlhf_recipes.models.quantized import keep_4bit_differentiable
from rlhf_recipes.models.readout import ReadoutName, read_scores
from rlhf_recipes.models.reward import score_tokens
from rlhf_recipes.reward_modeling.collator import pairs_of, sequences_of
from rlhf_recipes.reward_modeling.losses import pairwise_loss
from rlhf_recipes.statistics.metrics import proportion_interval, share_interval
from rlhf_recipes.tracking.console import table

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel
    from trl import RewardTrainer

    from rlhf_recipes.models.images import ImageReader

    FieldsOf = Callable[[Tensor, Sequence[int]], dict[str, Tensor]]


def evaluate_pairs(trainer: RewardTrainer) -> dict[str, Any]:
    """Score the held-out rows of a trainer with the model as it is now, and summarise the pairs that they compare.

    A ranking, ratings or a choice of K give all pairs that they compare. Every process scores all rows, in
    the precision that the trainer trains in.

    Args:
        trainer: The trainer; its `eval_dataset` holds the rows.

    Returns:
        The summary of `pairwise_evaluation`. If the rows compare nothing (labels of tokens, single ratings): `loss`,
        that of the objective, and `n`, the number of rows.

    Raises:
        ValueError: If there is no row, or the model diverged.
    """
    model: Any = trainer.model  # TRL types what a trainer holds only in part
    rows: Any = trainer.eval_dataset
    groups = [sequences_of(row) for row in rows]
    pairs = [(index, *pair) for index, row in enumerate(rows) for pair in pairs_of(row)]
    if not pairs:
        return {"loss": trainer.evaluate()["eval_loss"], "n": len(rows)}
    readout: ReadoutName = getattr(trainer.args, "readout", "last")
    starts = [n for lengths in rows["prompt_lengths"] for n in lengths] if readout != "last" else None
    with trainer.accelerator.autocast():
        sequences = [ids for group in groups for ids in group]
        of_texts = [index for index, group in enumerate(groups) for _ in group]
        fields = fields_of_images(trainer, lambda number: rows[of_texts[number]])
        size = trainer.args.per_device_eval_batch_size
        scores = score_sequences(model, sequences, size, readout, starts, fields)
    firsts = list(itertools.accumulate(map(len, groups), initial=0))
    left, right = (scores[[firsts[pair[0]] + pair[side] for pair in pairs]] for side in (1, 2))
    labels = torch.tensor([pair[3] for pair in pairs], dtype=torch.float64)
    return pairwise_evaluation(left, right, labels=labels, clusters=[pair[0] for pair in pairs])


def fields_of_images(trainer: Any, row_of: Callable[[int], Any]) -> FieldsOf | None:
    """What `score_sequences` hands over of pictures, where the trainer sees them.

    Args:
        trainer: The trainer.
        row_of: Takes the number of a sequence and gives its row.
    """
    reader: ImageReader | None = getattr(trainer, "image_reader", None)
    if reader is None:
        return None
    return lambda ids, numbers: reader.network_fields(ids, [reader.pixels(row_of(number)) for number in numbers])


@torch.no_grad()
def score_sequences(
    model: PreTrainedModel | PeftModel,
    sequences: Sequence[Sequence[int]],
    batch_size: int = 32,
    readout: ReadoutName = "last",
    prompt_lengths: Sequence[int] | None = None,
    fields: FieldsOf | None = None,
) -> Tensor:
    """Score token sequences with a reward model in evaluation mode (and leave it in the mode it was in).

    Args:
        model: A model for sequence classification with one output, whose configuration knows the padding token: it
            reads the score at the last token that is not padding.
        sequences: `N` lists of token ids, prompt and completion together, without padding.
        batch_size: Sequences per forward pass.
        readout: `"last"` for the model's own score, or `"sum"` or `"mean"` of its scores at the completion's tokens.
        prompt_lengths: For those two: how many of each sequence's tokens belong to its prompt.
        fields: Takes padded token ids `(b, L)` and the numbers of their sequences, and gives what else the model is
            called with, such as their pictures.

    Returns:
        Scores in float32 on the CPU, shape `(N,)`.

    Raises:
        ValueError: If there is no sequence, one is empty, or 4-bit weights are repacked.

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
    keep_4bit_differentiable(model)
    padding: int = model.config.get_text_config().pad_token_id
    was_training, scores = model.training, []
    model.eval()
    hidden = None if PartialState().is_local_main_process else True  # `None`: where it would not be a terminal
    progress = trange(0, len(sequences), batch_size, desc="scoring", disable=hidden)
    for start in progress:
        rows = [torch.tensor(ids, device=model.device) for ids in sequences[start : start + batch_size]]
        lengths = torch.tensor([len(row) for row in rows], device=model.device)
        input_ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=padding)
        mask = torch.arange(input_ids.size(1), device=model.device) < lengths[:, None]
        call = {"input_ids": input_ids, "attention_mask": mask.long(), "use_cache": False}
        if fields is not None:
            numbers = range(start, start + len(rows))
            call |= {name: values.to(model.device) for name, values in fields(input_ids, numbers).items()}
        if readout == "last":
            scores.append(model(**call).logits.squeeze(-1).float().cpu())
            continue
        assert prompt_lengths is not None
        first = torch.tensor(prompt_lengths[start : start + batch_size], device=model.device)
        completion = mask & (torch.arange(input_ids.size(1), device=model.device) >= first[:, None])
        _, token_scores = score_tokens(model, model, call)
        scores.append(read_scores(token_scores, completion, readout).cpu())
    model.train(was_training)
    return torch.cat(scores)


def pairwise_evaluation(
    chosen_scores: Tensor,
    rejected_scores: Tensor,
    level: float = 0.95,
    labels: Tensor | None = None,
    clusters: Sequence[int] | None = None,
) -> dict[str, Any]:
    """Summarise the scores of held-out pairs.

    Args:
        chosen_scores: Scores of the chosen completions (reward units), shape `(N,)`.
        rejected_scores: Scores of the rejected completions in the same order, shape `(N,)`.
        level: Probability that the interval is to cover the true accuracy.
        labels: Probability that the chosen completion wins, shape `(N,)`: 0.5 is a tie, and below it the rejected
            completion is the winner. `None`: 1 everywhere.
        clusters: What each pair came from, shape `(N,)`. `None` takes the pairs as independent.

    Returns:
        `accuracy`, the share of untied pairs whose winner scores higher (equal scores are no success); `accuracy_ci`,
        its interval `[low, high]`: Wilson's, or from a bootstrap over the clusters if one has several pairs; `margin`,
        the mean of winner minus loser; `chosen_score` and `rejected_score`, the means of winners and of losers;
        `log_loss`, the mean cross-entropy of all labels, ties included, under `sigmoid(chosen - rejected)`, in nats;
        `n`, the number of pairs; and `ties`, how many of them are ties.

    Raises:
        ValueError: If the shapes differ, there is no untied pair, or a score is not finite.

    Example:
        >>> result = pairwise_evaluation(torch.tensor([2.0, 1.0, 0.0]), torch.tensor([1.0, 1.0, -2.0]))
        >>> result["n"], result["margin"], round(result["accuracy"], 3)
        (3, 1.0, 0.667)
        >>> pairwise_evaluation(torch.ones(2), torch.zeros(2), labels=torch.tensor([0.5, 0.0]))["accuracy"]
        0.0
    """
    labels = torch.ones(len(chosen_scores)) if labels is None else labels
    shapes = [tuple(tensor.shape) for tensor in (chosen_scores, rejected_scores, labels)]
    if len(set(shapes)) > 1 or chosen_scores.dim() != 1 or not len(chosen_scores):
        raise ValueError(
            "Expected one score per chosen and per rejected completion and one label per pair, shape (N,) with N > 0, "
            f"got shapes {', '.join(map(str, shapes))}."
        )
    leads = (chosen_scores - rejected_scores).double()
    if not leads.isfinite().all():
        raise ValueError(
            f"{int((~leads.isfinite()).sum())} of {len(leads)} pairs have a score that is not finite: the reward "
            "model diverged. Lower its learning rate."
        )
    untied, first_wins = labels != 0.5, labels > 0.5
    if not untied.any():
        raise ValueError(f"All {len(labels)} held-out pairs are ties, which have no accuracy. Hold out more rows.")
    margins = torch.where(first_wins, leads, -leads)[untied]
    winners = torch.where(first_wins, chosen_scores, rejected_scores)[untied]
    losers = torch.where(first_wins, rejected_scores, chosen_scores)[untied]
    right, n = margins > 0, len(margins)
    groups = range(len(labels)) if clusters is None else clusters
    groups = [group for group, counts in zip(groups, untied.tolist(), strict=True) if counts]
    independent = len(set(groups)) in (1, n)  # of one cluster nothing can be drawn
    interval = proportion_interval(int(right.sum()), n, level)
    return {
        "accuracy": right.double().mean().item(),
        "accuracy_ci": list(interval if independent else share_interval(right.double(), groups, level)),
        "margin": margins.mean().item(),
        "chosen_score": winners.double().mean().item(),
        "rejected_score": losers.double().mean().item(),
        "log_loss": pairwise_loss(leads, torch.zeros_like(leads), labels.double()).item(),
        "n": len(labels),
        "ties": len(labels) - n,
    }


def pairs_table(evaluation: dict[str, Any]) -> str:
    """Lay out what `evaluate_pairs` gives, as text for the console: the model, and below it the simple rules.

    Args:
        evaluation: The summary, with `baselines` (`pair_baselines`) if there are any.

    Example:
        >>> pairs = {"accuracy": 0.9, "accuracy_ci": [0.8, 0.95], "n": 50, "ties": 10, "margin": 2.0, "log_loss": 0.4}
        >>> rules = {"longer": {"accuracy": 0.5, "accuracy_ci": [0.4, 0.6], "n": 40}}
        >>> print(pairs_table(pairs | {"baselines": rules}))
        held-out pairs  accuracy   95 % interval  pairs
        reward model       0.900  [0.800, 0.950]     40
        longer wins        0.500  [0.400, 0.600]     40
        10 ties are left out. Margin 2.000, log loss 0.400 with ties.
    """
    if "accuracy" not in evaluation:
        return table([[f"{evaluation['n']:,} held-out rows"], ["loss", f"{evaluation['loss']:.4f}"]])
    ties = evaluation["ties"]
    measured = {"reward model": {**evaluation, "n": evaluation["n"] - ties}}
    measured |= {_RULES.get(name, name): rule for name, rule in evaluation.get("baselines", {}).items()}
    rows = [["held-out pairs", "accuracy", "95 % interval", "pairs"]]
    for name, found in measured.items():
        low, high = found["accuracy_ci"]
        rows.append([name, f"{found['accuracy']:.3f}", f"[{low:.3f}, {high:.3f}]", f"{found['n']:,}"])
    left_out = f"{ties:,} ties are left out. " if ties else ""
    with_ties = " with ties" if ties else ""
    figures = f"Margin {evaluation['margin']:.3f}, log loss {evaluation['log_loss']:.3f}{with_ties}."
    return f"{table(rows)}\n{left_out}{figures}"


_RULES = {"longer": "longer wins", "shorter": "shorter wins", "tfidf": "words (TF-IDF)"}
