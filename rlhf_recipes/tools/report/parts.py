"""What the sections of a report share: their titles, and how numbers are written."""

from __future__ import annotations

from typing import Any

from rlhf_recipes.tools.report.reading import finite

TITLES = {"sft": "SFT", "reward": "Reward", "ppo": "Policy"}


def shown(value: Any, ends: Any = None) -> str:
    """Write a number, perhaps with the ends of its interval; a dash for what is no number.

    Example:
        >>> shown(0.79931, [0.7729, 0.8232]), shown(576), shown(float("nan")), shown("<b>"), shown(0.00003)
        ('0.799 [0.773, 0.823]', '576', '-', '-', '3e-05')
    """
    if not finite(value):
        return "-"
    plain = value == 0 or 0.001 <= abs(value) < 1e6
    text = str(value) if isinstance(value, int) else f"{value:.3f}" if plain else f"{value:.3g}"
    if isinstance(ends, list | tuple) and len(ends) == 2 and all(map(finite, ends)):
        text += f" [{ends[0]:.3f}, {ends[1]:.3f}]"
    return text
