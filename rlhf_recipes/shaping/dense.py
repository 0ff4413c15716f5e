"""Rewards that differ from token to token: from a reward model's inside, from a potential, from another tokenizer.

`B` completions, `T` completion tokens. Every `mask` is `(B, T)` with 1 where a token counts. Rewards are 0 where the
mask is 0, and carry no gradient. What stands at a masked position, even `nan` or `inf`, never changes a result.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from rlhf_recipes.masks import check_shapes
from rlhf_recipes.shaping.placement import place_discounted, place_every_token, place_terminal, place_uniform

RewardPlacement = Literal["terminal", "uniform", "discounted", "every_token", "redistributed", "attention"]


def place_scores(
    scores: Tensor,
    mask: Tensor,
    placement: RewardPlacement,
    gamma: float = 0.95,
    attention: Tensor | None = None,
    attention_weight: float = 0.8,
) -> Tensor:
    """Pay scores by a placement's name; a new placement needs its function, and its case and word here.

    Args:
        scores: One score per completion, in units of reward, shape `(B,)`.
        mask: 1 where a token counts, shape `(B, T)`.
        placement: Which one. With `"redistributed"` the reward adapter has paid its own score per token, and what is
            left of the scores is paid on the last token.
        gamma: For `"discounted"`.
        attention: For `"attention"`: attention to each token, shape `(B, T)`.
        attention_weight: For `"attention"`.

    Returns:
        Token rewards, shape `(B, T)`.

    Raises:
        ValueError: If the shapes do not fit together, or there is no such placement or no attention.

    Example:
        >>> place_scores(torch.tensor([3.0]), torch.tensor([[1, 1, 1, 0]]), "uniform").tolist()
        [[1.0, 1.0, 1.0, 0.0]]
    """
    if placement in ("terminal", "redistributed"):
        return place_terminal(scores, mask)
    if placement == "uniform":
        return place_uniform(scores, mask)
    if placement == "discounted":
        return place_discounted(scores, mask, gamma)
    if placement == "every_token":
        return place_every_token(scores, mask)
    if placement == "attention" and attention is not None:
        return place_attention(scores, mask, attention, attention_weight)
    raise ValueError(
        f"No rewards can be placed by {placement!r} {'without' if attention is None else 'with'} attention."
    )


def place_differences(prefix_scores: Tensor, mask: Tensor, prompt_scores: Tensor | None = None) -> Tensor:
    """Pay each token what it changed in the reward model's score: `r_t = s_t - s_{t-1}`.

    `s_t` is the score of the prompt and the completion up to and including token `t`; a causal reward model gives all
    of them in one forward pass. The differences telescope: a row sums to the score of the whole completion, minus the
    score of the bare prompt if that is given. Masked tokens are skipped, wherever they stand.

    Source: RED, https://huggingface.co/papers/2411.08302, where the score of the bare prompt is subtracted.

    Args:
        prefix_scores: Score of the text up to and including each token, in units of reward, shape `(B, T)`.
        mask: 1 where a token counts, shape `(B, T)`.
        prompt_scores: Score of the prompt alone, shape `(B,)`. `None` counts it as 0, so that the first token is paid
            its own prefix score.

    Returns:
        Token rewards, shape `(B, T)`. Each row sums to its last counted prefix score minus its prompt score, or is 0
        if no token counts.

    Raises:
        ValueError: If the shapes do not fit together.

    Example:
        >>> place_differences(torch.tensor([[0.5, 2.0, 1.5, 9.0]]), torch.tensor([[1, 1, 1, 0]])).tolist()
        [[0.5, 1.5, -0.5, 0.0]]
    """
    check_shapes(mask, prefix_scores=prefix_scores)
    if prompt_scores is None:
        prompt_scores = prefix_scores.new_zeros(len(prefix_scores))
    elif prompt_scores.shape != mask.shape[:1]:
        raise ValueError(
            f"`prompt_scores` has shape {tuple(prompt_scores.shape)}, but `mask` has shape {tuple(mask.shape)}. "
            "Give one score per prompt, shape (B,)."
        )
    counts, scores = mask.bool(), prefix_scores.detach()
    before = _at_previous_counted(scores, counts, prompt_scores.detach().to(scores))
    return torch.where(counts, scores - before, 0.0)


def place_attention(scores: Tensor, mask: Tensor, attention: Tensor, weight: float) -> Tensor:
    """Spread a part of the score as the reward model's attention is spread, and pay the rest on the last token.

    `weight * r * a_t / sum_k a_k + (1 - weight) * r * [t is the last token]`, where `a_t` is the attention that the
    reward model pays to token `t` at the position where it reads its score.

    Source: attention-based credit (ABC), https://huggingface.co/papers/2402.00782.

    Args:
        scores: One score per completion, in units of reward, shape `(B,)`.
        mask: 1 where a token counts, shape `(B, T)`.
        attention: Attention to each token, not negative, shape `(B, T)`. It need not sum to 1: what went to the prompt
            is spread in proportion. A row without any is paid on its last token.
        weight: Share of the score that follows the attention, in [0, 1].

    Returns:
        Token rewards, shape `(B, T)`. Each row sums to its score, or is 0 if no token counts.

    Raises:
        ValueError: If the shapes do not fit together, the attention to a counted token is negative, or `weight` is out
            of range.

    Example:
        >>> attention = torch.tensor([[0.1, 0.3, 0.1, 0.0]])
        >>> place_attention(torch.tensor([10.0]), torch.tensor([[1, 1, 1, 0]]), attention, weight=0.5).tolist()
        [[1.0, 3.0, 6.0, 0.0]]
    """
    terminal = place_terminal(scores, mask)
    check_shapes(mask, attention=attention)
    if not 0 <= weight <= 1:
        raise ValueError(f"`weight` is the share of the score that follows the attention: give 0 to 1, got {weight}.")
    # In float64, because the attention may be half precision, and sums of that would not give the score back.
    attended = attention.detach().double().masked_fill(~mask.bool(), 0.0)
    if (attended < 0).any():
        raise ValueError(f"`attention` must not be negative, got {attended.min().item()}. Give it after the softmax.")
    total = attended.sum(-1, keepdim=True)
    spread = torch.where(total > 0, scores.detach()[:, None] * (attended / total), terminal)
    mixed = weight * spread + (1 - weight) * terminal
    return mixed.masked_fill(~mask.bool(), 0.0).to(scores.dtype)


def potential_shaping(potentials: Tensor, mask: Tensor, gamma: float) -> Tensor:
    """Reward progress in a potential, without changing which policy is best: `F_t = gamma * Phi_{t+1} - Phi_t`.

    `Phi_t` is the potential of the text before token `t`, for example an early estimate of how good it will become,
    and 0 after the last counted token. The sum telescopes: from any token on, the discounted rewards `F` add up to
    `-Phi_t`, whatever the completion goes on with. Added to other rewards, they shift every return by a number that
    the policy's next token cannot change. Masked tokens are skipped, wherever they stand.

    Source: Ng, Harada and Russell 1999, Policy invariance under reward transformations, theorem 1,
    https://people.eecs.berkeley.edu/~pabbeel/cs287-fa09/readings/NgHaradaRussell-shaping-ICML1999.pdf.

    Args:
        potentials: Potential of the text before each token, in units of reward, shape `(B, T)`.
        mask: 1 where a token counts, shape `(B, T)`.
        gamma: The discount of the returns, in [0, 1]. With another one the best policy would change.

    Returns:
        Token rewards to add to others, shape `(B, T)`. The discounted sum of a row is minus its first counted
        potential, or 0 if no token counts.

    Raises:
        ValueError: If the shapes differ, or `gamma` is out of range.

    Example:
        >>> potential_shaping(torch.tensor([[0.0, 1.0, 3.0, 9.0]]), torch.tensor([[1, 1, 1, 0]]), gamma=1.0).tolist()
        [[1.0, 2.0, -3.0, 0.0]]
    """
    check_shapes(mask, potentials=potentials)
    if not 0 <= gamma <= 1:
        raise ValueError(f"`gamma` must be the discount of the returns, from 0 to 1, got {gamma}.")
    counts, potentials = mask.bool(), potentials.detach()
    ended = potentials.new_zeros(len(potentials))
    following = _at_previous_counted(potentials.flip(-1), counts.flip(-1), ended).flip(-1)
    return torch.where(counts, gamma * following - potentials, 0.0)


def align_rewards(
    rewards: Sequence[float], offsets: Sequence[tuple[int, int]], target_offsets: Sequence[tuple[int, int]]
) -> list[float]:
    """Carry per-token rewards over to another tokenization of the same text.

    Each reward goes to the policy's token that holds the last character of the rewarded token: there the text that it
    judges is complete. A reward without a character of its own (an end token, a character that the policy's tokenizer
    dropped) goes to the last policy token that starts at or before its place, or else to the first one.

    An empty span stands where the text before it ends. Tokenizers give `(0, 0)` to special tokens wherever they are,
    and some give empty spans to all but one of the bytes of a character.

    Args:
        rewards: Reward of each token of the reward model's tokenization, in units of reward.
        offsets: Their spans of characters, `(start, end)` with `end` excluded, in the order of the text.
        target_offsets: The spans of the policy's tokens over the same text.

    Returns:
        One reward for each of the policy's tokens. The sum is that of `rewards`.

    Raises:
        ValueError: If there is not one span per reward, there are rewards but no policy tokens, or the spans are not
            in the order of the text.

    Example:
        >>> align_rewards([1.0, 2.0, 4.0, 0.5], [(0, 2), (2, 3), (3, 6), (0, 0)], [(0, 3), (3, 5), (5, 6)])
        [3.0, 0.0, 4.5]
    """
    if len(rewards) != len(offsets):
        raise ValueError(
            f"`rewards` has {len(rewards)} entries, but `offsets` has {len(offsets)}: give one per token."
        )
    if rewards and not target_offsets:
        raise ValueError("`target_offsets` is empty: there is no token of the policy that could take the rewards.")
    targets = _in_text_order("target_offsets", target_offsets)
    starts = [start for start, _ in targets]
    received: list[list[float]] = [[] for _ in targets]
    for reward, (start, end) in zip(rewards, _in_text_order("offsets", offsets), strict=True):
        last_character = max(start, end - 1)
        received[max(bisect_right(starts, last_character) - 1, 0)].append(reward)
    return [math.fsum(parts) for parts in received]


def _in_text_order(name: str, offsets: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """Check the spans, and put each empty one where the text before it ends."""
    spans, last_start, last_end = [], 0, 0
    for start, end in offsets:
        if start == end:
            start = end = max(start, last_end)
        if not (last_start <= start <= end and last_end <= end):
            raise ValueError(
                f"`{name}` must be spans (start, end) in the order of the text, but ({start}, {end}) comes after "
                f"({last_start}, {last_end})."
            )
        spans.append((start, end))
        last_start, last_end = start, end
    return spans


def _at_previous_counted(values: Tensor, counts: Tensor, first: Tensor) -> Tensor:
    """Look up the value at the last counted token before each token, or `first`, `(B,)`, where there is none."""
    if not values.numel():
        return values
    positions = torch.arange(values.size(1), device=values.device).expand_as(values)
    last_counted = torch.where(counts, positions, -1).cummax(-1).values
    before = torch.cat([torch.full_like(last_counted[:, :1], -1), last_counted[:, :-1]], dim=-1)
    return torch.where(before < 0, first[:, None], values.gather(-1, before.clamp(min=0)))
