"""The notebook runs from its first cell to its last, and PPO does in it what the text says."""

import json
import re
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOK = ROOT / "docs" / "notebooks" / "quickstart_smollm2.ipynb"


@pytest.fixture
def notebook():
    return nbformat.read(NOTEBOOK, as_version=4)


def test_notebook_is_kept_without_outputs(notebook):
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert code
    assert [cell.source for cell in code if cell.outputs or cell.execution_count] == []


@pytest.mark.slow
def test_notebook_runs(notebook, smollm2, tmp_path):
    (tmp_path / "model").symlink_to(smollm2)  # as its first command would have made it
    where = 'OUTPUT = Path("outputs/notebook")'
    [first] = [cell for cell in notebook.cells if where in cell.source]
    first.source = first.source.replace(where, f"OUTPUT = Path({str(tmp_path)!r})")
    NotebookClient(notebook, timeout=1800, resources={"metadata": {"path": str(NOTEBOOK.parent)}}).execute()

    evaluation = json.loads((tmp_path / "ppo" / "evaluation.json").read_text())
    assert evaluation["policy"]["reward_score"] > evaluation["reference"]["reward_score"] + 0.3, "the mood is better"
    assert evaluation["win_rate"] > 0.6
    [text] = [output.text for output in notebook.cells[-2].outputs if output.get("name") == "stdout"]
    assert len(re.findall(r"(?m)^  (?:SFT|PPO) [+-]", text)) == 12, "six samples of each"
