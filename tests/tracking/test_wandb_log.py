"""What hooks send to a W&B run: nothing where none is reported to, plain cells, and the step beside everything."""

import math
import sys
from types import SimpleNamespace

import pytest
import wandb

from rlhf_recipes.tracking.wandb_log import as_table, current_run, define_axis, log_row, log_table

HOSTILE = "<script>alert(1)</script>[x](javascript:alert(2))\x00\u202e"


class StubRun:
    """Records what a W&B run is asked to do."""

    def __init__(self):
        self.logged, self.defined = [], []

    def log(self, row):
        self.logged.append(row)

    def define_metric(self, name, **options):
        self.defined.append((name, options))


def trainer(report_to=("wandb",), main=True, step=7):
    return SimpleNamespace(
        args=SimpleNamespace(report_to=list(report_to)),
        is_world_process_zero=lambda: main,
        state=SimpleNamespace(global_step=step),
    )


@pytest.fixture
def run(monkeypatch):
    run = StubRun()
    monkeypatch.setattr(wandb, "run", run)
    return run


def test_a_table_has_the_columns_of_its_first_row_and_the_step(run):
    log_table(trainer(), "eval/samples", [{"prompt": "a", "score": 1}, {"prompt": "b"}])
    [row] = run.logged
    assert row["train/global_step"] == 7
    assert row["eval/samples"].columns == ["prompt", "score"]
    assert row["eval/samples"].data == [["a", 1.0], ["b", None]]


def test_texts_stay_plain_strings_and_numbers_that_are_none_stay_empty():
    chat = [{"role": "user", "content": HOSTILE}, {"role": "assistant", "tool_calls": []}]
    rows = [{"text": HOSTILE, "chat": chat, "score": math.nan, "won": True}]
    assert as_table(rows).data == [[HOSTILE, f"user: {HOSTILE}\nassistant: ", None, True]]
    assert as_table(rows).data[0][-1] is True
    assert all(isinstance(cell, str | bool | float | None) for cell in as_table(rows).data[0])


def test_no_rows_make_no_table(run):
    log_table(trainer(), "eval/samples", [])
    assert run.logged == []


def test_an_axis_is_defined_before_what_is_drawn_against_it(run):
    define_axis(trainer(), "frontier/distance", ["frontier/reward", "frontier/gold"])
    axis = {"step_metric": "frontier/distance"}
    assert run.defined == [("frontier/distance", {}), ("frontier/reward", axis), ("frontier/gold", axis)]
    log_row(trainer(step=3), {"frontier/distance": 2.0})
    assert run.logged == [{"frontier/distance": 2.0, "train/global_step": 3}]


@pytest.mark.parametrize("quiet", [trainer(report_to=["tensorboard"]), trainer(main=False)])
def test_nothing_goes_where_nothing_is_reported(quiet, run):
    log_table(quiet, "t", [{"a": 1}])
    log_row(quiet, {"a": 1.0})
    define_axis(quiet, "a", ["b"])
    assert (run.logged, run.defined) == ([], [])


def test_before_a_run_has_started_there_is_none(monkeypatch):
    monkeypatch.setattr(wandb, "run", None)
    assert current_run(trainer()) is None
    log_table(trainer(), "t", [{"a": 1}])


def test_without_wandb_nothing_is_imported(monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)  # importing it would fail
    assert current_run(trainer(report_to=[])) is None
