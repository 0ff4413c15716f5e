"""The certificate's script, from a reward model that the reward stage trained."""

import json
import random
from types import SimpleNamespace
from xml.etree import ElementTree

import pytest

from rlhf_recipes.config import parse_stage
from rlhf_recipes.models import load_sequence_classifier, load_tokenizer

NOUNS = "film story actor ending scene plot music".split()


def make_rows(count, seed):
    rng = random.Random(seed)
    return [
        {
            "prompt": f"the {rng.choice(NOUNS)} {rng.choice(NOUNS)} {rng.choice(NOUNS)} was",
            "chosen": f" {rng.choice(['good', 'warm', 'great'])} {rng.choice(['and', 'but', 'so'])}",
            "rejected": f" {rng.choice(['bad', 'dull', 'cold'])} {rng.choice(['and', 'but', 'so'])}",
            "kind": rng.choice("ab"),
        }
        for _ in range(count)
    ]


@pytest.fixture
def report(load_stage, tiny_model_path, tmp_path):
    """Run the script: `report(dataset_name=...)` gives what it wrote."""

    def run(**options):
        folder = tmp_path / "report"
        options = {"model_name_or_path": tiny_model_path, "output_dir": folder, **options}
        argv = [str(text) for name, value in options.items() for text in (f"--{name}", value)]
        module = load_stage("reward_report")
        module.main(*parse_stage(module.ARGUMENTS, argv))
        html = (folder / "certificate.html").read_text()
        root = ElementTree.fromstring(html.removeprefix("<!DOCTYPE html>\n"))
        return SimpleNamespace(json=json.loads((folder / "certificate.json").read_text()), html=html, root=root)

    return run


@pytest.mark.parametrize("four_bit", [pytest.param(False, marks=pytest.mark.slow), True], ids=["float32", "4-bit"])
def test_report_of_a_trained_reward_model(run_stage, report, write_rows, capsys, four_bit):
    data = write_rows(make_rows(160, seed=0))
    options = {"max_steps": 40, "lora_r": 8, "per_device_train_batch_size": 8, "load_in_4bit": four_bit}
    stage = run_stage("reward", dataset_name=data, test_size=0.3, **options)
    samples = [{**row, "completion": row[side]} for row in make_rows(8, seed=1) for side in ("chosen", "rejected") * 2]
    samples = [{**row, "gold_score": float(row["completion"] == row["chosen"])} for row in samples]
    bench = [{**row, "subset": "donotanswer"} for row in make_rows(4, seed=2)]
    found = report(
        reward_adapter=stage.folder,
        dataset_name=data,
        test_size=0.3,
        samples=write_rows(samples, "samples.jsonl"),
        reward_bench=write_rows(bench, "bench.jsonl"),
        category_column="kind",
        load_in_4bit=four_bit,
    )
    # It measures the very pairs that the stage held out, and scores them alike.
    assert found.json["accuracy"]["value"] == stage.evaluation["accuracy"] > 0.8
    assert found.json["accuracy"]["n"] == stage.evaluation["n"]
    chosen = found.json["scores"]["chosen"]["mean"]
    assert chosen == pytest.approx(stage.evaluation["chosen_score"], abs=1e-5)
    assert found.json["train_gap"]["train"]["value"] > 0.8
    assert set(found.json["baselines"]) == {"longer", "shorter", "tfidf"}
    assert found.json["best_of_n"]["curve"][-1]["n"] == 4
    assert found.json["reward_bench"]["sections"].keys() == {"Safety"}
    assert {row["group"] for row in found.json["by_category"]} == {"a", "b"}
    verdict = found.json["verdict"]["verdict"]
    assert f"Verdict: {verdict}" in "".join(found.root.itertext())
    printed = capsys.readouterr().out
    assert f"{verdict}: " in printed
    assert printed.count("\n  [") == len(found.json["verdict"]["reasons"])


@pytest.mark.parametrize("shuffled", [False, True], ids=["separable", "shuffled labels"])
def test_one_epoch_on_toy_preferences(run_stage, report, write_rows, shuffled):
    """C39: at least 0.95 on held-out pairs that one word decides, and 0.5 where a coin has decided."""
    rng, rows = random.Random(4), make_rows(500, seed=4)
    if shuffled:
        rows = [
            {**row, **dict(zip(("chosen", "rejected"), side, strict=True))}
            for row in rows
            for side in [coin(rng, row)]
        ]
    data = write_rows(rows)
    options = {"max_steps": -1, "num_train_epochs": 1, "lora_r": 8, "per_device_train_batch_size": 8}
    stage = run_stage("reward", dataset_name=data, test_size=0.4, **options)
    found = report(reward_adapter=stage.folder, dataset_name=data, test_size=0.4, train_rows=50, probe_rows=50).json
    low, high = found["accuracy"]["interval"]
    if shuffled:
        assert low < 0.5 < high
        assert found["verdict"]["verdict"] == "not fit"
    else:
        assert found["accuracy"]["value"] >= 0.95
        assert found["margin"]["interval"][0] > 1
        assert found["calibration"]["log_loss"]["value"] < 0.2
        assert all(row["value"] >= 0.9 for row in found["by_difference"][1:])


def coin(rng, row):
    return rng.sample([row["chosen"], row["rejected"]], k=2)


def test_a_whole_model_and_a_preference_table(report, write_rows, tiny_model_path, tmp_path):
    load_sequence_classifier(tiny_model_path).save_pretrained(tmp_path / "whole")
    load_tokenizer(tiny_model_path).save_pretrained(tmp_path / "whole")
    table = [
        {"prompt": row["prompt"], "completions": [row["chosen"], row["rejected"], " so so"], "ranks": [1, 2, 2]}
        for row in make_rows(40, seed=3)
    ]
    found = report(model_name_or_path=tmp_path / "whole", dataset_name=write_rows(table), test_size=0.5)
    assert found.json["data"]["ties"] * 3 == found.json["data"]["pairs"]
    assert found.json["verdict"]["verdict"] in ("not fit", "use with care")
    assert [text for text in found.json["verdict"]["not_checked"] if "TF-IDF" in text] == []


@pytest.mark.parametrize("name", ["batch_size", "train_rows", "probe_rows", "max_length"])
def test_numbers_below_one_are_refused(report, name):
    with pytest.raises(ValueError, match=f"`{name}` must be at least 1, got 0"):
        report(dataset_name="rows.jsonl", **{name: 0})


@pytest.mark.parametrize("recipe", ["quickstart", "hh_rlhf"])
def test_configurations_fit_the_reward_stage(load_stage, repo_root, recipe):
    config = repo_root / "recipes" / recipe / "reward_report.yaml"
    assert config.read_text().startswith(f"# python recipes/reward_report.py --config recipes/{recipe}/{config.name}")
    data_args, args, model_args = parse_stage(load_stage("reward_report").ARGUMENTS, ["--config", str(config)])
    cpu = ["--use_cpu", "true", "--bf16", "false"]
    reward = config.with_name("reward.yaml")
    rows, training, model = parse_stage(load_stage("reward").ARGUMENTS, ["--config", str(reward), *cpu])
    assert data_args == rows, "the same rows are held out"
    assert args.output_dir == f"outputs/{recipe}/reward_report"
    assert (args.reward_adapter, args.max_length) == (training.output_dir, training.max_length)
    names = ("model_name_or_path", "load_in_4bit", "dtype")
    assert [getattr(model_args, name) for name in names] == [getattr(model, name) for name in names]
