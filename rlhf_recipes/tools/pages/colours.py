"""The colours of all plots: one for each thing, and one for each run where several are compared.

Each has a contrast of at least 3 with the page, light and dark, and any two stay apart for colour-blind readers. Line
styles and markers say the same again.
"""

from __future__ import annotations

from dataclasses import dataclass

POLICY = "#0072b2"  # the language model that is trained, and what its texts are like
REFERENCE = "#6b6b6b"  # what the policy is compared with
REWARD = "#d55e00"  # what PPO maximises, and the model that gives it
GOLD = "#00a37a"  # a judge that PPO does not see
KL = "#b5609a"  # distances between policies
CRITIC = "#8a5a44"
INK = "#1b1c1d"  # everything else; on a page it becomes the colour of the text around it, light or dark

_RUNS = (POLICY, REWARD, GOLD, KL, CRITIC, REFERENCE)
_MARKERS = (("o", "●"), ("s", "■"), ("^", "▲"), ("D", "◆"), ("v", "▼"), ("P", "✚"), ("*", "★"))


@dataclass(frozen=True)
class Look:
    """How one of several runs looks, everywhere on a page.

    Attributes:
        colour: Its colour, as `#rrggbb`.
        marker: Its marker, as matplotlib names it.
        sign: The same marker as a letter, for texts.
    """

    colour: str
    marker: str
    sign: str


def run_look(number: int) -> Look:
    """Choose colour and marker for one of several runs: both together are another pair for each of 42 runs.

    Args:
        number: Which run, from 0.

    Returns:
        Its look.

    Example:
        >>> run_look(0).colour == POLICY, run_look(6).colour == POLICY, run_look(6).sign
        (True, True, '★')
    """
    marker, sign = _MARKERS[number % len(_MARKERS)]
    return Look(_RUNS[number % len(_RUNS)], marker, sign)


POLICY_LOOK, REFERENCE_LOOK = Look(POLICY, "o", "●"), Look(REFERENCE, "o", "○")
