"""The page of computed tables is what the code computes."""

import re
from pathlib import Path

import pytest
from scale_tables import MODELS, fit_row, memory_rows, page, phases_row, server_row, sizes_of, speed_rows

DOCS = Path(__file__).resolve().parents[1] / "docs"
PAGE = (DOCS / "scale_tables.md").read_text()


def row(cells):
    return f"| {' | '.join(cells)} |"


def test_rows_of_the_smallest_base_are_those_of_the_page():
    sizes = sizes_of("0.5B")
    memory, speed = memory_rows("0.5B", sizes), speed_rows("0.5B", sizes)
    rows = [memory["fsdp2"], phases_row("0.5B", sizes), memory["4bit"], fit_row("0.5B", sizes)]
    rows += [server_row("0.5B", sizes), speed["ddp"], speed["server"]]
    assert [line for line in PAGE.splitlines() if line.startswith("| 0.5B ")] == [row(cells) for cells in rows]


def test_every_base_is_in_every_table_and_it_says_that_nothing_was_measured():
    assert "**Computed, not measured**" in PAGE
    assert [len(re.findall(rf"(?m)^\| {model} \|", PAGE)) for model in MODELS] == [7] * len(MODELS)


@pytest.mark.slow
def test_the_page_is_what_the_code_computes():
    assert page() == PAGE
