"""Every example of docs/preferences.md is read by the reader that its section names, and recognised."""

import json
import re
from pathlib import Path

import pytest

from rlhf_recipes.data import preferences
from rlhf_recipes.data.preferences import load_preferences, preference_features, to_pairs, to_preference_table

PAGE = (Path(__file__).resolve().parents[3] / "docs" / "preferences.md").read_text()
SECTIONS = re.findall(r"(?ms)^### [^\n]*`(\w+)`\n(.*?)(?=^##)", PAGE)
EXAMPLES = [(reader, block) for reader, text in SECTIONS for block in re.findall(r"(?s)```json\n(.*?)```", text)]


@pytest.mark.parametrize(("reader", "block"), EXAMPLES, ids=[reader for reader, _ in EXAMPLES])
def test_examples_are_read_and_recognised(reader, block, tmp_path):
    rows = [json.loads(line) for line in block.splitlines()]
    table = getattr(preferences, reader)(rows)
    assert len(table) == len(rows) > 0
    assert to_preference_table(rows).to_list() == table.to_list()
    (tmp_path / "rows.jsonl").write_text(block)
    assert load_preferences(str(tmp_path / "rows.jsonl"))["line"][:] == list(range(1, len(rows) + 1))


def test_every_reader_and_column_is_explained():
    readers = {name for name in preferences.__all__ if name.startswith("from_")} | {"check_preferences"}
    assert {reader for reader, _ in SECTIONS} == readers == {reader for reader, _ in EXAMPLES}
    columns = PAGE.split("## The table")[1].split("A chat is")[0]
    assert re.findall(r"`(\w+)`", columns) == list(preference_features())
    assert all(f"`{word}`" in PAGE for word in preferences.LABEL_WORDS)


def test_the_first_example_prints_what_it_says(capsys):
    code = re.search(r"(?s)```python\n(.*?)```", PAGE)[1]
    exec(compile(code, "docs/preferences.md", "exec"), {})
    assert capsys.readouterr().out.splitlines() == re.findall(r"print\(.*\)  # (.*)", code)


def test_pairs_of_the_examples():
    ranked = next(block for reader, block in EXAMPLES if reader == "from_rankings")
    pairs = to_pairs(to_preference_table([json.loads(line) for line in ranked.splitlines()]))
    assert pairs["label"][:] == [1.0, 0.5, 0.0, 0.0]
