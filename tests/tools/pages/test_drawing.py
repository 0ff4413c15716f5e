"""Colours that stay apart, axes that do not dramatise, and plots that can be told in words."""

import itertools
import re
from xml.etree import ElementTree

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlhf_recipes.tools.pages import colours
from rlhf_recipes.tools.pages.drawing import draw, limits
from rlhf_recipes.tools.pages.html import Html, table

ROLES = [getattr(colours, name) for name in ("POLICY", "REFERENCE", "REWARD", "GOLD", "KL", "CRITIC")]
PAGES = ("#ffffff", "#151617")
# Machado, Oliveira and Fernandes (2009), severity 1: what is seen without one kind of cones
BLIND = {
    "none": np.eye(3),
    "red": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
    "green": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.01182, 0.04294, 0.968881]],
    "blue": [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.3039]],
}


def linear(colour):
    parts = np.array([int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)])
    return np.where(parts <= 0.04045, parts / 12.92, ((parts + 0.055) / 1.055) ** 2.4)


def contrast(one, two):
    low, high = sorted(linear(colour) @ [0.2126, 0.7152, 0.0722] for colour in (one, two))
    return (high + 0.05) / (low + 0.05)


def lab(rgb):
    to_xyz = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]])
    x, y, z = np.cbrt(to_xyz @ np.clip(rgb, 0, 1) / [0.9505, 1.0, 1.089])
    return np.array([116 * y - 16, 500 * (x - y), 200 * (y - z)])


def test_colours_are_seen_on_light_and_on_dark_pages():
    assert len(set(ROLES)) == len(ROLES)
    assert min(contrast(colour, page) for colour in ROLES for page in PAGES) >= 3
    assert contrast(colours.INK, PAGES[0]) >= 7  # on a dark page it is replaced by the colour of the text


@pytest.mark.parametrize("kind", BLIND)
def test_colours_stay_apart_for_colour_blind_readers(kind):
    seen = [lab(np.array(BLIND[kind]) @ linear(colour)) for colour in ROLES]
    assert min(np.linalg.norm(one - two) for one, two in itertools.combinations(seen, 2)) >= 12  # CIE76; 2.3 is seen


def test_runs_have_looks_of_their_own():
    looks = [colours.run_look(number) for number in range(42)]
    assert len(set(looks)) == 42
    assert {look.colour for look in looks} == set(ROLES)
    assert len({look.marker for look in looks[:7]}) == len({look.sign for look in looks[:7]}) == 7


NUMBERS = st.floats(-1e6, 1e6)


@given(st.lists(NUMBERS, min_size=1), st.lists(NUMBERS, max_size=3), st.floats(0, 1e3))
def test_an_axis_holds_all_and_is_never_shorter_than_the_least_span(values, shows, span):
    low, high = limits(values, shows, span)
    inside = [*values, *shows]
    assert low < min(inside) <= max(inside) < high
    assert high - low >= span
    assert high - low >= 0.1 * max(map(abs, inside))
    # It is no longer than what is drawn, or than the least span, with the margins.
    longest = max(max(inside) - min(inside), span, 0.1 * max(map(abs, inside)))
    assert high - low <= 1.0800001 * (longest or 1.0)


def test_an_axis_grows_where_nothing_has_a_meaning():
    assert limits([5.0], span=2.0) == pytest.approx((3.92, 6.08))
    assert limits([0.02, 0.03], shows=(0.0,), span=1.0) == pytest.approx((-0.04, 1.04))
    assert limits([-0.3], shows=(0.0,), span=1.0) == pytest.approx((-1.04, 0.04))  # 0 is the top
    assert limits([0.5], shows=(0.0, 1.0)) == pytest.approx((-0.04, 1.04))
    assert limits([0.0, 0.0], shows=(0.0,)) == pytest.approx((-0.04, 1.04))


def test_a_plot_is_told_in_words_and_has_the_ink_of_the_page(tmp_path):
    def plot(axes):
        axes.plot([0, 1], [0, 1], color=colours.INK)
        axes.plot([0, 1], [1, 0], color=colours.GOLD)

    svg = draw("name", 'Says "<this>".', plot, tmp_path / "name.png", height=1.5)
    root = ElementTree.fromstring(svg)
    assert (root.get("role"), root.get("aria-label")) == ("img", 'Says "<this>".')
    assert colours.INK not in svg
    assert "stroke: currentColor" in svg
    assert f"stroke: {colours.GOLD}" in svg
    width, height = map(float, root.get("viewBox").split()[2:])
    assert height / width == pytest.approx(1.5 / 4.1, rel=0.01)
    assert (tmp_path / "name.png").read_bytes().startswith(b"\x89PNG")


def test_cells_are_escaped_unless_they_are_html_and_long_ones_may_break():
    html = table(["a"], [["<i>"], [Html("<b>x</b>")], ["word " * 20]])
    assert re.findall(r"<td.*?>(?=.*?</td>)", html) == ["<td>", "<td>", '<td class="long">']
    assert "&lt;i&gt;" in html
    assert "<td><b>x</b></td>" in html
