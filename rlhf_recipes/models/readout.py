"""Readout of a reward model: what it reads, the tokens whose numbers give its score, gain and bias of the score."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor

FILE = "reward_model.json"
ReadoutName = Literal["last", "sum", "mean"]


@dataclass(frozen=True)
class Readout:
    """The step between a reward model's head and its score, saved beside the weights.

    Args:
        readout: `"last"`: the head's number at the last token; `"sum"` or `"mean"`: of its numbers at the
            completion's tokens, for heads that were trained per token.
        gain: Factor of the raw score, above 0.
        bias: Added after it, in reward units.
        reward_prompt: Whether it was trained on rows with a column `reward_prompt`, so that it needs one.

    Raises:
        ValueError: If a value is out of range.

    Example:
        >>> Readout(gain=0.25, bias=-0.5).apply(torch.tensor([2.0, 6.0]))
        tensor([0., 1.])
    """

    readout: ReadoutName = "last"
    gain: float = 1.0
    bias: float = 0.0
    reward_prompt: bool = False

    def __post_init__(self) -> None:
        """Check the values: a wrong one would change every reward, silently."""
        if self.readout not in get_args(ReadoutName):
            raise ValueError(f"`readout` must be one of {get_args(ReadoutName)}, got {self.readout!r}.")
        for name, value in (("gain", self.gain), ("bias", self.bias)):
            if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
                raise ValueError(f"`{name}` must be a finite number, got {value!r}.")
        if self.gain <= 0:
            raise ValueError(f"`gain` must be above 0, got {self.gain}: it would turn good into bad.")
        if not isinstance(self.reward_prompt, bool):
            raise ValueError(f"`reward_prompt` must be true or false, got {self.reward_prompt!r}.")

    def check_reward_prompts(self, name: str, reward_prompts: Any) -> None:
        """Check that rows bring reward prompts to a model that was trained on them.

        Args:
            name: Name of the reward model.
            reward_prompts: The rows' column, or `None` if they have none.

        Raises:
            ValueError: If they have none and it needs them.

        Example:
            >>> Readout(reward_prompt=True).check_reward_prompts("judge", None)
            Traceback (most recent call last):
            ...
            ValueError: The reward model 'judge' was trained on rows with `reward_prompt`, but these rows have no ...
        """
        if self.reward_prompt and reward_prompts is None:
            raise ValueError(
                f"The reward model {name!r} was trained on rows with `reward_prompt`, but these rows have no such "
                "column: it would judge without what it was taught to read. Add the column, with the prompt and the "
                "facts of each row, or train the reward model on rows without it."
            )

    def apply(self, scores: Tensor) -> Tensor:
        """Normalise raw scores of any shape: `gain * scores + bias`."""
        return self.gain * scores + self.bias

    def score(self, token_scores: Tensor) -> Tensor:
        """Score one completion from the head's numbers at its tokens, shape `(T,)`: a number, shape `()`."""
        return self.apply(read_scores(token_scores[None], torch.ones_like(token_scores)[None], self.readout)[0])

    def token_rewards(self, token_scores: Tensor) -> Tensor:
        """Split the score of one completion over its tokens.

        Args:
            token_scores: The head's numbers at the completion's tokens, shape `(T,)`.

        Returns:
            Rewards that add up to `score`, shape `(T,)`: with `"sum"` and `"mean"` each token's own number, with
            `"last"` by how much each token changes the score. The first token's holds the bias, and with `"last"` the
            prompt's score.

        Example:
            >>> numbers = torch.tensor([1.0, 3.0, 2.0])
            >>> Readout("last").token_rewards(numbers), Readout("sum", bias=1.0).token_rewards(numbers)
            (tensor([ 1.,  2., -1.]), tensor([2., 3., 2.]))
        """
        if self.readout == "last":
            token_scores = token_scores.diff(prepend=token_scores.new_zeros(1))
        rewards = self.gain * (token_scores / len(token_scores) if self.readout == "mean" else token_scores)
        rewards[:1] += self.bias
        return rewards

    def save(self, folder: str | Path) -> None:
        """Write `reward_model.json` into the folder of the model."""
        Path(folder).mkdir(parents=True, exist_ok=True)
        Path(folder, FILE).write_text(json.dumps(asdict(self), indent=2) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, folder: str | Path) -> Readout:
        """Read `reward_model.json` of a folder; without the file the score is the head's number at the last token.

        Raises:
            ValueError: If the file is not what `save` writes; it names the file and what is wrong.
        """
        path = Path(folder, FILE)
        if not path.is_file():
            return cls()
        try:
            fields: Any = json.loads(path.read_text(encoding="utf-8"))
            if not isinstance(fields, dict):
                raise ValueError(f"expected an object, found {type(fields).__name__}")
            if unknown := sorted(fields.keys() - asdict(cls()).keys()):
                raise ValueError(f"unknown keys {unknown}; known are {sorted(asdict(cls()))}")
            return cls(**fields)
        except ValueError as error:  # what JSON and Unicode raise is one too
            raise ValueError(
                f"{path} does not say how to read the reward model: {str(error).rstrip('.')}. Correct the file, or "
                "remove it to read the raw number at the last token."
            ) from error


def read_scores(token_scores: Tensor, mask: Tensor, readout: ReadoutName) -> Tensor:
    """Read raw scores of completions from a head's numbers at their tokens.

    Args:
        token_scores: The head's number at each token, shape `(B, T)`.
        mask: 1 at the tokens of the completion (the end token is one), with at least one a row, shape `(B, T)`.
        readout: Number at the last of them, sum or mean.

    Returns:
        Raw scores, shape `(B,)`.

    Raises:
        ValueError: If the shapes differ, or a row has no token.

    Example:
        >>> token_scores, mask = torch.tensor([[9.0, 1.0, 2.0, 9.0]]), torch.tensor([[0, 1, 1, 0]])
        >>> [read_scores(token_scores, mask, name).item() for name in ("last", "sum", "mean")]
        [2.0, 3.0, 1.5]
    """
    if token_scores.shape != mask.shape or mask.dim() != 2:
        raise ValueError(f"Expected two tensors (B, T), got {tuple(token_scores.shape)} and {tuple(mask.shape)}.")
    counts = mask.bool()
    empty = (~counts.any(dim=1)).nonzero().flatten().tolist()
    if empty:
        raise ValueError(f"Row {empty[0]} has no token to read a score from (and {len(empty) - 1} more rows).")
    if readout == "last":
        positions = torch.arange(mask.size(1), device=mask.device).expand_as(mask)
        last = torch.where(counts, positions, -1).amax(dim=1, keepdim=True)
        return token_scores.gather(1, last).squeeze(1)
    sums = token_scores.masked_fill(~counts, 0.0).sum(dim=1)
    return sums if readout == "sum" else sums / counts.sum(dim=1)


def fit_normalization(scores: Tensor, mode: Literal["std", "mean_only"] = "std") -> tuple[float, float]:
    """Find the gain and bias that bring the raw scores of reference samples to mean 0 (and standard deviation 1).

    Every gain above 0 leaves the order of completions and the accuracy on pairs as they are. What changes is the size
    of the reward that PPO sees, beside the KL penalty.

    Source: https://huggingface.co/papers/1909.08593: gain and bias for mean 0 and variance 1 on samples
    of the starting policy. https://huggingface.co/papers/2203.02155, section 3.5: a bias only, for mean 0 on the
    labelers' demonstrations.

    Args:
        scores: Raw scores of the reference samples (reward units), shape `(N,)`.
        mode: `"std"`: gain and bias; `"mean_only"`: the bias only, with gain 1.

    Returns:
        `(gain, bias)`, so that `gain * score + bias` has mean 0 and, with `"std"`, population standard deviation 1.

    Raises:
        ValueError: If there is no score, one is not finite, or all are equal and the gain would be infinite.

    Example:
        >>> fit_normalization(torch.tensor([-2.0, 6.0]))  # mean 2, standard deviation 4
        (0.25, -0.5)
        >>> fit_normalization(torch.tensor([-2.0, 6.0]), mode="mean_only")
        (1.0, -2.0)
    """
    if mode not in ("std", "mean_only"):
        raise ValueError(f"`mode` must be 'std' or 'mean_only', got {mode!r}.")
    if scores.dim() != 1 or not len(scores):
        raise ValueError(f"Expected one score per reference sample, shape (N,), got shape {tuple(scores.shape)}.")
    scores = scores.double()
    bad = (~scores.isfinite()).nonzero().flatten().tolist()
    if bad:
        raise ValueError(
            f"The score of reference sample {bad[0]} is {scores[bad[0]].item()} (and {len(bad) - 1} more)."
        )
    mean = scores.mean().item()
    if mode == "mean_only":
        return 1.0, -mean
    std = scores.std(correction=0).item()
    # Equal scores of float32 differ by rounding, which no gain may blow up
    if std <= 1e-6 * scores.abs().max().item():
        raise ValueError(
            f"All {len(scores)} reference samples score {mean:.6g}: a constant has no standard deviation to bring to "
            "1. Check that the reward model was trained and that its head was loaded, give more samples, or use "
            "`mode='mean_only'`."
        )
    return 1.0 / std, -mean / std
