"""The report's settings: of one run what differs from the defaults, of several where they differ."""

import json
import re

import pytest

from rlhf_recipes.tools.report.reading import read_runs
from rlhf_recipes.tools.report.settings import settings
from rlhf_recipes.tools.report.writing import write_report
from rlhf_recipes.tracking.settings import FILE, write_settings


@pytest.fixture
def make_stage(tmp_path):
    def make(run, values, stage="ppo"):
        folder = tmp_path / run / stage
        folder.mkdir(parents=True)
        (folder / "run.json").write_text(json.dumps({"stage": stage}))
        if values is not None:
            write_settings(folder, values)
        return tmp_path / run

    return make


def stages_of(*folders):
    return [stage for run in read_runs(folders) for stage in run.stages]


def test_one_run_shows_what_differs_from_the_defaults(make_stage, tmp_path):
    page = write_report([make_stage("a", {"kl_coef": 0.1, "output_dir": "outputs/a"})], tmp_path / "page").read_text()
    assert '<h2 id="settings">Settings</h2>' in page
    assert "<td>kl_coef</td><td>0.1</td>" in page
    assert "outputs/a</td>" not in page
    assert "Differences" not in page


def test_several_runs_show_where_they_differ(make_stage):
    folders = [make_stage("a", {"kl_coef": 0.1, "seed": 3, "output_dir": "a"}), make_stage("b", {"seed": 3})]
    html = settings(stages_of(*folders, make_stage("c", {"learning_rate": 1e-4}, stage="sft")), {})
    differences = html.split("<details>")[0]
    assert "Differences: Policy" in differences
    assert "<td>kl_coef</td><td>0.1</td><td>default</td>" in differences
    assert "seed" not in differences
    assert "learning_rate" not in differences, "stages of another kind have other settings"


def test_runs_have_their_signs_above_their_values(make_stage, tmp_path):
    folders = [make_stage(name, {"kl_coef": value}) for name, value in (("a", 0.1), ("b", 0.2))]
    for folder in folders:
        (folder / "ppo/evaluation.json").write_text(json.dumps({"win_rate": 0.5}))
    page = write_report(folders, tmp_path / "page").read_text()
    assert re.findall(r"<th><span [^>]*>(.)</span>(\w)</th>", page) == [("●", "a"), ("■", "b")]


def test_hostile_values_are_escaped_and_cut(make_stage):
    folder = make_stage("a", {"</td><script>": "<script>" * 100, "seed": 1})
    bomb = ["a: &a [x, x]"] + [
        f"{c}: &{c} [{', '.join([f'*{p}'] * 9)}]" for p, c in zip("abcdefgh", "bcdefghi", strict=True)
    ]
    with (folder / "ppo" / FILE).open("a") as file:
        file.write("\n".join(bomb))
    html = settings(stages_of(folder), {})
    assert "<script" not in html
    assert len(html) < 20_000


@pytest.mark.parametrize("text", ["- 1", "a: [", "\x00"])
def test_a_damaged_file_is_said_and_costs_nothing_else(text, make_stage):
    folder = make_stage("a", {})
    (folder / "ppo" / FILE).write_text(text)
    [stage] = stages_of(folder)
    assert "No settings are known" in settings([stage], {})
    assert any("config.yaml is damaged" in line for line in stage.missing)


def test_without_the_file_it_says_so(make_stage):
    assert "No settings are known" in settings(stages_of(make_stage("a", None)), {})
