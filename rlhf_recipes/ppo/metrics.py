"""Metrics of a rollout, of an evaluation, and of the micro-batches of updates.

`B` completions, `T` completion tokens.
"""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn
from trl.trainer.utils import nanstd

from rlhf_recipes.ppo.functional import explained_variance, masked_mean
from rlhf_recipes.ppo.off_policy import off_policy_metrics

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from accelerate import Accelerator

    from rlhf_recipes.models.rows import Texts

_PARTS = ("start", "middle", "end")


def rollout_metrics(
    kl: Tensor, values: Tensor, returns: Tensor, mask: Tensor, value_mask: Tensor
) -> dict[str, Tensor]:
    """Sum a rollout up in scalars.

    Args:
        kl: KL to the reference per token in nats, 0 on padding, shape `(B, T)`.
        values: The critic's values at the rollout, shape `(B, T)`.
        returns: What it should have said, shape `(B, T)`.
        mask: 1 where a token counts, shape `(B, T)`.
        value_mask: 1 where the critic learns, shape `(B, T)`.

    Returns:
        KL per completion and per token; mean value and return; the critic's explained variance, over all tokens and
        over the first, the second and the last third of each completion, with the mean values there.
    """
    metrics = {
        "kl": kl.sum(dim=1).mean(),
        "kl_per_token": masked_mean(kl, mask),
        "critic/value_mean": masked_mean(values, value_mask),
        "critic/return_mean": masked_mean(returns, value_mask),
        "critic/explained_variance": explained_variance(values, returns, value_mask),
    }
    for name, part in zip(_PARTS, thirds(mask), strict=True):
        metrics[f"critic/value_{name}"] = masked_mean(values, part)
        metrics[f"critic/explained_variance_{name}"] = explained_variance(values, returns, part)
    return metrics


def thirds(mask: Tensor) -> list[Tensor]:
    """Split the counted tokens of each completion into three parts of equal length, shapes `(B, T)`.

    Example:
        >>> import torch
        >>> [part.tolist() for part in thirds(torch.tensor([[1, 1, 1, 1, 0]]))]
        [[[1, 1, 0, 0, 0]], [[0, 0, 1, 0, 0]], [[0, 0, 0, 1, 0]]]
    """
    position, length = mask.cumsum(dim=1) - 1, mask.sum(dim=1, keepdim=True)
    part = (3 * position).div(length.clamp(min=1), rounding_mode="floor")
    return [((part == number) & mask.bool()).to(mask.dtype) for number in range(3)]


@dataclass(frozen=True)
class RolloutFacts:
    """What is logged of the completions of a rollout, or of an evaluation.

    Attributes:
        kl: KL to the reference per token in nats, 0 on padding, shape `(B, T)`.
        values: The critic's values at the rollout, shape `(B, T)`.
        returns: What it should have said, shape `(B, T)`.
        mask: 1 where a token counts, shape `(B, T)`.
        value_mask: 1 where the critic learns, shape `(B, T)`.
        surprise: Log-probability plus entropy of each token in nats, shape `(B, T)`.
        scores: The scores after all transforms, shape `(B,)`.
        contributions: By transform, what it added to them, shape `(B,)`.
        moments: What `sampled_moments` gives of each process, shape `(processes, 2)`.
        rewards: The rewards by each function, nan where it gave none, shape `(B, functions)`.
        lengths: Sampled tokens of each completion, shape `(B,)`.
        ended: Whether it ends with an end token, shape `(B,)`.
    """

    kl: Tensor
    values: Tensor
    returns: Tensor
    mask: Tensor
    value_mask: Tensor
    surprise: Tensor
    scores: Tensor
    contributions: dict[str, Tensor]
    moments: Tensor
    rewards: Tensor
    lengths: Tensor
    ended: Tensor

    def __len__(self) -> int:
        return len(self.mask)

    def gather(self, accelerator: Accelerator) -> RolloutFacts:
        """Those of all processes: a mean over tokens is not the mean of the processes' means."""
        padded = {name: accelerator.pad_across_processes(getattr(self, name), dim=1) for name in _PER_TOKEN}
        gathered: Any = accelerator.gather(vars(self) | padded)
        return RolloutFacts(**gathered)

    def metrics(self, kl_coef: float) -> dict[str, float]:
        """Sum up in numbers: the KL, the critic, whether the samples are the policy's own, and the scores.

        Args:
            kl_coef: The weight of the KL penalty.
        """
        metrics = {
            **rollout_metrics(self.kl, self.values, self.returns, self.mask, self.value_mask),
            **off_policy_metrics(self.surprise, self.mask, self.moments.sum(dim=0), len(self.moments)),
            **{f"score/{name}": part.mean() for name, part in self.contributions.items()},
            "score/total": self.scores.mean(),
            "rlhf_reward": (self.scores - kl_coef * self.kl.sum(dim=1)).mean(),
            "kl_coef": self.kl.new_tensor(kl_coef),
        }
        return _numbers(metrics)

    def metrics_of_trl(self, functions: Sequence[str], weights: Tensor) -> dict[str, float]:
        """What TRL logs of a batch.

        Args:
            functions: The names of the reward functions.
            weights: Their weights, shape `(functions,)`.
        """
        rewards = (self.rewards * weights.to(self.rewards)).nansum(dim=1)
        metrics = {"reward": rewards.mean(), "reward_std": nanstd(rewards)}
        for name, column in zip(functions, self.rewards.unbind(dim=1), strict=True):
            metrics |= {f"rewards/{name}/mean": column.nanmean(), f"rewards/{name}/std": nanstd(column)}
        ended, lengths = self.ended.bool(), self.lengths.float()
        metrics["completions/clipped_ratio"] = 1.0 - ended.float().mean()
        terminated = lengths[ended] if ended.any() else lengths.new_zeros(1)
        for name, each in (("length", lengths), ("terminated_length", terminated)):
            metrics[f"completions/mean_{name}"] = each.mean()
            metrics[f"completions/min_{name}"], metrics[f"completions/max_{name}"] = each.aminmax()
        return _numbers(metrics)


class EvaluatedRows:
    """The completions of an evaluation, each once, until it is logged: a mean of means of batches depends on them.

    Args:
        accelerator: Gathers the processes.
    """

    def __init__(self, accelerator: Accelerator) -> None:
        self._accelerator = accelerator
        self._parts: list[RolloutFacts] = []
        self._total = sys.maxsize

    def begin(self, total: int | None) -> None:
        """Begin an evaluation of so many completions, of all processes; `None` if that is not known before."""
        self._parts, self._total = [], sys.maxsize if total is None else total

    def without_repeats(self, texts: Texts) -> Texts:
        """Take the mask off the completions that only fill up the last batch of several processes."""
        accelerator = self._accelerator
        first = sum(map(len, self._parts)) + accelerator.process_index * len(texts)
        places = torch.arange(first, first + len(texts), device=texts.completion_mask.device)
        return replace(texts, completion_mask=texts.completion_mask * (places < self._total)[:, None])

    def add(self, facts: RolloutFacts) -> None:
        """Add a batch, of all processes."""
        self._parts.append(facts)

    def log(
        self,
        logs: dict[str, float],
        batches: dict[str, list[float]],
        of_steps: dict[str, float],
        vf_coef: float,
        kl_coef: float,
        functions: Sequence[str],
        weights: Tensor,
    ) -> None:
        """Write what is logged of an evaluation, over all of its completions.

        Args:
            logs: What is logged; its names begin with that of the data set.
            batches: TRL's metrics of each batch, by name. The means of these are replaced, and those that stay are
                metrics of the reward functions' own.
            of_steps: Means over the items of all micro-batches.
            vf_coef: The weight of the value loss.
            kl_coef: The weight of the KL penalty.
            functions: The names of the reward functions.
            weights: Their weights, shape `(functions,)`.
        """
        prefix = next((name.removesuffix("_runtime") for name in logs if name.endswith("_runtime")), "eval")
        if "loss" in of_steps:
            logs[f"{prefix}_loss"] = of_steps.pop("loss") + vf_coef * of_steps.get("critic/value_loss", 0.0)
        batches.update({name: [value] for name, value in of_steps.items()})
        batches.update({name: [value] for name, value in self.collect(kl_coef, functions, weights).items()})
        if prefix != "eval":  # one of several data sets; TRL would call all of theirs `eval_`
            for name, values in batches.items():
                known = [value for value in values if not math.isnan(value)]
                mean: Any = sum(known) / len(known) if known else None
                logs[f"{prefix}_{name}"] = mean
            batches.clear()

    def collect(self, kl_coef: float, functions: Sequence[str], weights: Tensor) -> dict[str, float]:
        """Sum up all completions since `begin`, and forget them; the arguments are those of `log`."""
        if not self._parts:
            return {}
        facts = self._joined()
        self.begin(None)
        return facts.metrics(kl_coef) | facts.metrics_of_trl(functions, weights)

    def _joined(self) -> RolloutFacts:
        length = max(part.mask.size(1) for part in self._parts)
        joined: dict[str, Any] = {}
        for name in vars(self._parts[0]):
            columns = [getattr(part, name) for part in self._parts]
            if name == "contributions":
                joined[name] = {key: torch.cat([each[key] for each in columns])[: self._total] for key in columns[0]}
            elif name in _PER_TOKEN:
                padded = [nn.functional.pad(each, (0, length - each.size(1))) for each in columns]
                joined[name] = torch.cat(padded)[: self._total]
            else:
                joined[name] = torch.cat(columns)[: self._total if name != "moments" else None]
        return RolloutFacts(**joined)


_PER_TOKEN = ("kl", "values", "returns", "mask", "value_mask", "surprise")


def _numbers(metrics: dict[str, Tensor]) -> dict[str, float]:
    """All numbers at once, since a GPU waits for each."""
    stacked = torch.stack([value.detach().float() for value in metrics.values()])
    return dict(zip(metrics, stacked.tolist(), strict=True))


class LossMetrics(NamedTuple):
    """What is logged of a micro-batch: means, each with the number of items that it is over, and maxima."""

    means: dict[str, tuple[Tensor, Tensor]]
    maxima: dict[str, Tensor]

    @classmethod
    def of(cls, means: dict[str, tuple[Tensor, Tensor]], maxima: dict[str, Tensor]) -> LossMetrics:
        """Collect metrics without their graphs, which would keep memory until the end of the step."""
        return cls({name: (mean.detach(), count) for name, (mean, count) in means.items()}, maxima)


class StepMetrics:
    """Sum up micro-batches until they are logged: a mean of their means would weigh a short one like a long one.

    Args:
        accelerator: Adds up the processes.

    Example:
        >>> from accelerate import Accelerator
        >>> metrics = StepMetrics(Accelerator(cpu=True))
        >>> metrics.add({"entropy": (torch.tensor(2.0), torch.tensor(3))}, {"ratio_max": torch.tensor(1.5)})
        >>> metrics.add({"entropy": (torch.tensor(6.0), torch.tensor(1))}, {"ratio_max": torch.tensor(1.1)})
        >>> metrics.collect()
        {'entropy': 3.0, 'ratio_max': 1.5}
    """

    def __init__(self, accelerator: Accelerator) -> None:
        self._accelerator = accelerator
        self._sums: dict[str, Tensor] = {}
        self._maxima: dict[str, Tensor] = {}

    def add(self, means: Mapping[str, tuple[Tensor, Tensor]], maxima: Mapping[str, Tensor]) -> None:
        """Add a micro-batch: means, each with the number of tokens or completions that it is over, and maxima."""
        for name, (mean, count) in means.items():
            sums = torch.stack([(mean.detach() * count).double(), count.double()])
            self._sums[name] = self._sums[name] + sums if name in self._sums else sums
        for name, value in maxima.items():
            value = value.detach().double()
            self._maxima[name] = torch.maximum(self._maxima[name], value) if name in self._maxima else value

    def collect(self) -> dict[str, float]:
        """Return means and maxima of all processes since the last call. A mean over nothing is left out."""
        metrics = {}
        if self._sums:
            sums = self._accelerator.reduce(torch.stack(list(self._sums.values())), reduction="sum").tolist()
            metrics = {name: total / count for name, (total, count) in zip(self._sums, sums, strict=True) if count}
        if self._maxima:
            rows = self._accelerator.gather(torch.stack(list(self._maxima.values()))[None])
            metrics |= dict(zip(self._maxima, rows.max(dim=0).values.tolist(), strict=True))
        self._sums, self._maxima = {}, {}
        return metrics
