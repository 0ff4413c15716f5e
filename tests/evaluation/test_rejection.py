"""The best of K: against a search through all samples, after a stop, and with other settings."""

import json

import pytest

from rlhf_recipes.data import load_rows, to_completions
from rlhf_recipes.evaluation.records import check_settings
from rlhf_recipes.evaluation.rejection import sample_best

SETTINGS = {"best_of": 3, "seed": 5}


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture
def sample(make_trainer, prompts, tmp_path):
    """Sample in a folder of this name, from a new trainer."""

    def run(name, **changes):
        options = {"best_of": 3, "prompts_per_round": 6, "seed": 5} | changes
        trainer = make_trainer(per_device_eval_batch_size=4)
        rows = prompts.add_column("topic", [f"topic {index}" for index in range(len(prompts))])
        return tmp_path / name, sample_best(trainer, rows, tmp_path / name, SETTINGS, **options)

    return run


def test_the_best_ones_are_those_of_a_search(sample, prompts):
    folder, found = sample("whole")
    rows, best = lines(folder / "samples.jsonl"), lines(folder / "train.jsonl")
    assert [(row["row"], row["sample"]) for row in rows] == [(i, k) for i in range(16) for k in range(3)]
    assert len({row["completion"] for row in rows}) > 30
    assert all(row["prompt"] == prompts[row["row"]]["prompt"] for row in rows)
    assert all(row["topic"] == f"topic {row['row']}" for row in rows)
    assert all(row["score"] == row["rewards"]["reward"] for row in rows)
    left = []
    for index in range(16):
        group = [row for row in rows if row["row"] == index]
        in_order = sorted(row["score"] for row in group)[::-1]
        assert [row["rank"] for row in group] == [1 + in_order.index(row["score"]) for row in group]
        ended = [row for row in group if row["finished"] and row["completion"].strip()]
        ended.sort(key=lambda row: -row["score"])
        left += ended[:1]
    assert best == left
    assert any(row["rank"] > 1 for row in best), "the highest score may be that of a completion that was cut off"
    assert found == json.loads((folder / "rejection.json").read_text())
    assert (found["prompts"], found["best_of"], found["left_out"]) == (16, 3, 16 - len(best))
    assert found["best_score"] == pytest.approx(sum(row["score"] for row in best) / len(best))
    assert found["score"] == pytest.approx(sum(row["score"] for row in rows) / 48)
    firsts = [rows[3 * index : 3 * index + 2] for index in range(16)]
    highest = sum(max(row["score"] for row in group) for group in firsts) / 16
    assert found["highest_of_k"][1] == pytest.approx(highest)
    taught = to_completions(load_rows(str(folder)))  # as the SFT stage reads them
    assert taught["completion"][:] == [row["completion"] for row in best]


def test_a_run_that_was_stopped_goes_on_and_ends_with_the_same_files(sample, tmp_path):
    names = ("samples.jsonl", "train.jsonl", "rejection.json", "settings.json")
    folder, _ = sample("whole")
    expected = {name: (folder / name).read_text() for name in names}
    text = expected["samples.jsonl"].splitlines(keepends=True)
    for name in names[1:3]:
        (folder / name).unlink()
    (folder / "samples.jsonl").write_text("".join(text[:25]) + text[25][:40])  # in the second round, within a line
    check_settings(folder, SETTINGS)
    sample("whole")
    assert {name: (folder / name).read_text() for name in names} == expected
    other, _ = sample("other", seed=6)
    assert (other / "samples.jsonl").read_text() != expected["samples.jsonl"]


def test_prompts_without_a_completion_that_ended_are_left_out(sample, monkeypatch):
    from rlhf_recipes.evaluation import rejection

    original = rejection.sample_rows
    cut = lambda *args, **kwargs: [row | {"eos_rate": 0.0} for row in original(*args, **kwargs)]  # noqa: E731
    monkeypatch.setattr(rejection, "sample_rows", cut)
    folder, found = sample("cut", best_of=2)
    assert (found["left_out"], found["best_score"]) == (16, None)
    assert not (folder / "train.jsonl").exists()


def test_folders_of_other_samples_and_of_anything_else_are_refused(tmp_path):
    folder = tmp_path / "samples"
    check_settings(folder, SETTINGS)
    folder.mkdir()
    check_settings(folder, SETTINGS)
    (folder / "settings.json").write_text(json.dumps(SETTINGS | {"temperature": 1.0}))
    check_settings(folder, SETTINGS | {"temperature": 1.0})
    with pytest.raises(FileExistsError, match="other settings: `best_of` 3 there, and 8 now, `temperature` 1.0 there"):
        check_settings(folder, {"best_of": 8, "seed": 5})
    (tmp_path / "notes.txt").write_text("do not lose me")
    with pytest.raises(FileExistsError, match="is not empty"):
        check_settings(tmp_path, SETTINGS)
