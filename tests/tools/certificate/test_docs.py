"""docs/certificate.md says what the code does."""

import importlib.util
import re
from dataclasses import MISSING, fields

import pytest
import yaml

from rlhf_recipes.tools.certificate import certify
from rlhf_recipes.tools.certificate.functional.reasons import Thresholds


@pytest.fixture(scope="module")
def text(repo_root):
    return (repo_root / "docs" / "certificate.md").read_text()


def table(text, header):
    body = text.split(f"\n{header}\n", 1)[1].split("\n\n")[0].splitlines()[1:]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in body]


def names(cells):
    return [name for cell in cells for name in re.findall(r"`([^`]+)`", cell)]


def test_every_field_has_its_default(text, repo_root):
    spec = importlib.util.spec_from_file_location("documented_report", repo_root / "recipes" / "reward_report.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    known = {field.name: field.default for field in fields(module.ReportArguments) if field.default is not MISSING}
    rows = table(text, "| field | default | what it does |")
    assert {name.strip("`"): yaml.safe_load(value.strip("`")) for name, value, _ in rows} == known


def test_every_line_has_its_value(text):
    rules = text.split("\n## The verdict\n")[1].split("\n## ")[0]
    lines = re.findall(r"`(\w+)` = ([\d.]*\d)", rules)
    assert len(lines) == len(dict(lines)), "a line is drawn twice"
    assert {name: float(value) for name, value in lines} == vars(Thresholds())


def test_every_measure_is_explained(text, rule_scorer, pairs, train_pairs, samples):
    measures = certify(rule_scorer(), pairs, train=train_pairs, samples=samples, category_column="kind")
    parts = text.split("\nParts of `certificate.json`:\n")[1].split("\n| probe |")[0]
    explained = {name.split(".")[0] for name in names(re.findall(r"(?m)^- (`[^:]+`): ", parts))}
    assert explained - {"by_confidence"} == set(measures) - {"data", "readout", "samples", "verdict"}
    assert names(row[0] for row in table(text, "| probe | change | healthy |")) == list(measures["probes"])


def test_the_example_runs(text, tiny_model_path, reward_adapter, write_rows, tmp_path, monkeypatch, capsys):
    nouns = "film story actor ending scene plot music".split()
    rows = [
        {"prompt": f"the {nouns[i % 7]} was", "chosen": f" good {nouns[i % 5]}", "rejected": f" bad {nouns[i % 3]}"}
        for i in range(210)
    ]
    places = {
        "outputs/quickstart/world/base": tiny_model_path,
        "outputs/quickstart/reward": str(reward_adapter),
        "outputs/quickstart/preferences": write_rows(rows),
    }
    [code] = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    for path, place in places.items():
        code = code.replace(f'"{path}"', repr(place))
    monkeypatch.chdir(tmp_path)
    exec(compile(code, "certificate.md", "exec"), {})
    assert capsys.readouterr().out.strip() in ("fit for PPO", "use with care", "not fit")
    assert (tmp_path / "outputs" / "quickstart" / "reward_report" / "certificate.html").is_file()
