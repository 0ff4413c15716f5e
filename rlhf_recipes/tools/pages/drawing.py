"""Draw a plot as SVG that stands inside a page."""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from rlhf_recipes.extras import from_extra
from rlhf_recipes.tools.pages.colours import INK
from rlhf_recipes.tools.pages.html import clean

with from_extra("report", needed_by="A page with plots"):
    from matplotlib import rc_context
    from matplotlib.axes import Axes as Axes
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine
    from matplotlib.lines import Line2D as Line2D

_WIDTH = 4.1  # inches
_LEAST_SHARE = 0.1  # of the level of the values: a change of a few hundredths fills no plot


def draw(name: str, alt: str, plot: Callable[[Axes], None], png: Path | None = None, height: float = 2.9) -> str:
    """Draw one plot as SVG for a page, and perhaps as a PNG.

    Args:
        name: Its name, a word: ids in the SVG start with it.
        alt: What it shows, in words, for those who do not see it.
        plot: Draws into the axes.
        png: Where to write the PNG.
        height: In inches, of a width of 4.1.

    Returns:
        The SVG element. Its text and axes, and lines in `INK`, have the colour of the text around it.
    """
    style: Any = {"svg.fonttype": "none", "svg.hashsalt": name, "font.size": 9.5}
    style |= {"axes.grid": True, "grid.alpha": 0.25, "legend.fontsize": 9.0}
    style |= dict.fromkeys(("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color"), INK)
    with rc_context(style), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing")  # browsers have more letters than this font
        figure = Figure(figsize=(_WIDTH, height))
        FigureCanvasSVG(figure)
        axes = figure.add_subplot()
        plot(axes)
        axes.spines[["top", "right"]].set_visible(False)
        ConstrainedLayoutEngine().execute(figure)  # once: as the figure's own, it would be at every drawing, twice
        file = io.StringIO()
        figure.savefig(file, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
        if png is not None:
            figure.savefig(png, format="png", dpi=150, facecolor="white")
    svg = file.getvalue()[file.getvalue().index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL).replace(INK, "currentColor")
    # One page holds several plots, and an id may occur in it only once.
    svg = re.sub(r'(\bid="|url\(#|href="#)', rf"\g<1>{name}-", svg)
    return svg.replace("<svg", f'<svg role="img" aria-label="{clean(alt)}"', 1)


def limits(values: Iterable[float], shows: Iterable[float] = (), span: float = 0.0) -> tuple[float, float]:
    """Choose the ends of an axis so that noise does not look like a trend.

    Args:
        values: What is drawn, finite; at least one number here or in `shows`.
        shows: Values that the axis holds in any case because they mean something, such as 0, or 1 for a share.
        span: The least distance of the ends, in the unit of the values. A tenth of the largest is another least one.

    Returns:
        The ends, with a small margin. What is missing to `span` goes on both sides, but not beyond what `shows` begins
        or ends with where nothing is drawn beyond it.

    Example:
        >>> limits([0.62, 0.64], shows=(0.0, 1.0))
        (-0.04, 1.04)
        >>> limits([2.0, 2.1], span=1.0), limits([0.0, 0.1], shows=(0.0,), span=1.0)
        ((1.51, 2.59), (-0.04, 1.04))
    """
    shown, drawn = list(shows), list(values)
    low, high = min([*drawn, *shown]), max([*drawn, *shown])
    least = max(span, _LEAST_SHARE * max(abs(low), abs(high))) or 1.0
    if (lacking := least - (high - low)) > 0:
        below = 0.0 if shown and low == min(shown) else lacking if shown and high == max(shown) else lacking / 2
        low, high = low - below, high + lacking - below
    margin = 0.04 * (high - low)
    return low - margin, high + margin
