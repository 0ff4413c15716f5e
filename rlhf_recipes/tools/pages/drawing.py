"""Draw a plot as SVG that stands inside a page."""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rlhf_recipes.extras import from_extra

with from_extra("report", needed_by="A page with plots"):
    from matplotlib import rc_context
    from matplotlib.axes import Axes as Axes
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

_INK = "#1b1c1d"  # becomes the colour of the page's text: light or dark


def draw(name: str, plot: Callable[[Axes], None], png: Path | None = None) -> str:
    """Draw one plot as SVG for a page, and perhaps as a PNG.

    Args:
        name: Its name, a word: ids in the SVG start with it.
        plot: Draws into the axes.
        png: Where to write the PNG.

    Returns:
        The SVG element. Its text and axes have the colour of the text around it.
    """
    style: Any = {"svg.fonttype": "none", "svg.hashsalt": name, "font.size": 9.0}
    style |= {"axes.grid": True, "grid.alpha": 0.25}
    style |= dict.fromkeys(("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color"), _INK)
    with rc_context(style), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing")  # browsers have more letters than this font
        figure = Figure(figsize=(4.4, 3.1), layout="constrained")
        FigureCanvasSVG(figure)
        axes = figure.add_subplot()
        plot(axes)
        axes.spines[["top", "right"]].set_visible(False)
        file = io.StringIO()
        figure.savefig(file, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
        if png is not None:
            figure.savefig(png, format="png", dpi=150, facecolor="white")
    svg = file.getvalue()[file.getvalue().index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL).replace(_INK, "currentColor")
    # One page holds several plots, and an id may occur in it only once.
    return re.sub(r'(\bid="|url\(#|href="#)', rf"\g<1>{name}-", svg)
