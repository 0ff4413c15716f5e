"""Change texts, score them again, and compare."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from rlhf_recipes.data.chat_templates import options_of
from rlhf_recipes.tools.certificate.functional.sensitivity import (
    change_completion,
    polite,
    repeated,
    score_shift,
    swapped_prompts,
    truncated,
)
from rlhf_recipes.tools.certificate.pairs import Pairs, prompt_key
from rlhf_recipes.tools.certificate.scoring import Encoded, Scorer

_CHANGES: dict[str, Callable[[str], str]] = {"repetition": repeated, "truncation": truncated, "politeness": polite}


def probe(scorer: Scorer, pairs: Pairs, rows: int, seed: int) -> dict[str, Any]:
    """Change the chosen completions, or their prompts, and measure how the scores change.

    Args:
        scorer: The reward model.
        pairs: Scored pairs.
        rows: Number of pairs that are drawn.
        seed: Seed of the draw.

    Returns:
        For each probe the summary of `score_shift`. Texts that a change leaves as they are, or makes too long for the
        model, are left out; a probe without texts is left out too. `prompt_swap` compares a completion under
        another prompt with the same under its own, and `completion_swap` with the completion that belongs there.

    Raises:
        DivergedError: If a score is not finite.
    """
    drawn = random.Random(seed).sample(pairs.rows, min(rows, len(pairs.rows)))
    prompts, chosen = [row["prompt"] for row in drawn], [row["chosen"] for row in drawn]
    keys = [prompt_key(prompt) for prompt in prompts]
    options = [options_of(row) for row in drawn]
    plain = _encode(scorer, prompts, chosen, options)
    compared: dict[str, tuple[list[Encoded], list[Encoded]]] = {}
    for name, change in _CHANGES.items():
        changed = [change_completion(text, change) for text in chosen]
        compared[name] = plain, _encode(scorer, prompts, changed, options)
    others = swapped_prompts(prompts, seed)
    if others is not None:
        of_other = dict(zip(keys, options, strict=True))
        swapped = _encode(scorer, others, chosen, [of_other[prompt_key(prompt)] for prompt in others])
        of_prompt = dict(zip(keys, plain, strict=True))
        compared["prompt_swap"] = plain, swapped
        compared["completion_swap"] = [of_prompt[prompt_key(prompt)] for prompt in others], swapped
    scores = _score_once(scorer, [text for sides in compared.values() for side in sides for text in side])
    scale = float(np.concatenate([pairs.chosen, pairs.rejected]).std())
    results = {}
    for name, sides in compared.items():
        rows_of = enumerate(zip(*sides, strict=True))
        indices = [i for i, (a, b) in rows_of if a != b and _key(a) in scores and _key(b) in scores]
        if indices:
            before, after = ([scores[_key(side[i])] for i in indices] for side in sides)
            results[name] = score_shift(before, after, [keys[i] for i in indices], scale)
    return results


def _encode(
    scorer: Scorer, prompts: Sequence[Any], completions: Sequence[Any], options: Sequence[dict[str, Any]]
) -> list[Encoded]:
    rows = zip(prompts, completions, options, strict=True)
    return [scorer.encode(prompt, text, **own) for prompt, text, own in rows]


def _key(text: Encoded) -> tuple[tuple[int, ...], int]:
    return tuple(text.ids), text.start


def _score_once(scorer: Scorer, texts: Sequence[Encoded]) -> dict[tuple[tuple[int, ...], int], float]:
    """Score every different text that fits."""
    different = {_key(text): text for text in texts if scorer.fits(text)}
    if not different:
        return {}
    return dict(zip(different, scorer.finite_scores(list(different.values())).tolist(), strict=True))
