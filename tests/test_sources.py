"""The pages of sources: every function that they name exists, and so does every test."""

import ast
import re
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted((ROOT / "docs").glob("sources*.md"))


def tables(text):
    """Yield the rows of every table with a column `function`: dictionaries by the names of the columns."""
    for block in re.findall(r"(?m)(?:^\|.*\n)+", text):
        header, _, *rows = (
            [cell.strip() for cell in line.strip().strip("|").split("|")] for line in block.splitlines()
        )
        if "function" in header:
            for row in rows:
                assert len(row) == len(header), f"{len(row)} cells under {len(header)} headings: {row}"
                yield dict(zip(header, row, strict=True))


@cache
def defined(*folders):
    """Names of the functions and classes in these folders, and for those within classes `Class::name` besides."""
    names = set()
    for path in (path for folder in folders for path in (ROOT / folder).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ClassDef | ast.FunctionDef):
                names |= {node.name, f"{path.name}::{node.name}"}
            if isinstance(node, ast.ClassDef):
                inside = {child.name for child in node.body if isinstance(child, ast.FunctionDef)}
                names |= {f"{path.name}::{node.name}::{name}" for name in inside}
    return names


def named(cell):
    """What a cell names, without folders and modules: `gae`, `test_kl.py::test_numbers`."""
    spans = re.findall(r"`([^`]+)`", cell)
    return [re.sub(r"^(?:.*/)?", "", span) if "::" in span else span.rpartition(".")[2] for span in spans]


def test_the_page_and_its_tables_are_found():
    assert ROOT / "docs" / "sources.md" in PAGES
    assert len(list(tables((ROOT / "docs" / "sources.md").read_text()))) > 60


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_functions_and_tests_exist(page):
    functions, tests = defined("rlhf_recipes", "recipes"), defined("tests", "benchmarks")
    for row in tables(page.read_text()):
        for column, known in (("function", functions), ("test", tests)):
            names = named(row[column])
            assert names, f"no {column} in the row {row}"
            missing = [name for name in names if name not in known]
            assert not missing, f"no {column} {missing} ({row})"


def test_what_does_not_exist_is_seen():
    text = "| formula | function | test |\n|---|---|---|\n| `x` | `a.no_such_function` | `tests/test_x.py::test_y` |\n"
    [row] = tables(text)
    assert named(row["function"]) == ["no_such_function"]
    assert named(row["test"]) == ["test_x.py::test_y"]
    assert not {"no_such_function"} & defined("rlhf_recipes", "recipes")
    assert "gae" in defined("rlhf_recipes", "recipes")
    assert "test_sources.py::test_functions_and_tests_exist" in defined("tests", "benchmarks")
