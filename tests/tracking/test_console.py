"""The lines of a run: what they show, where they go, and that a bar is for terminals."""

import io
import logging
import re
import sys
from types import SimpleNamespace

import pytest
import torch
from datasets import Dataset
from transformers import PrinterCallback, ProgressCallback, Trainer, TrainerControl, TrainerState, TrainingArguments

from rlhf_recipes.tracking.console import (
    LEARNING_RATE,
    LOSS,
    Column,
    ConsoleProgress,
    QuietModelCard,
    one_line,
    show_progress,
    table,
)

COLUMNS = [LOSS, Column("accuracy", "accuracy"), LEARNING_RATE]


class Terminal(io.StringIO):
    """Text that says it is a terminal."""

    def isatty(self):
        return True


@pytest.fixture
def run(tmp_path):
    """Play a run of so many steps to a console, from a step on, with what is logged at each."""

    def play(logs, steps=4, start=0, main=True, console=None, **arguments):
        args = TrainingArguments(str(tmp_path), use_cpu=True, report_to="none", **{"disable_tqdm": False} | arguments)
        state, control = TrainerState(max_steps=steps, global_step=start, is_world_process_zero=main), TrainerControl()
        console = console or ConsoleProgress(COLUMNS)
        console.on_train_begin(args, state, control)
        for step in range(start + 1, steps + 1):
            state.global_step = step
            console.on_step_end(args, state, control)
            for entry in logs.get(step, []):
                console.on_log(args, state, control, logs=entry)
        console.on_train_end(args, state, control)

    return play


def test_a_file_gets_plain_lines_with_the_columns_only(run, capsys):
    training = {"loss": 1.25, "accuracy": 0.5, "learning_rate": 1e-5, "grad_norm": 3.0, "epoch": 0.1}
    held_out = {"eval_loss": 1.5, "eval_accuracy": 0.75, "eval_runtime": 2.0, "eval_entropy": 3.0}
    run({2: [training, held_out], 4: [training, {"train_runtime": 75.0, "train_loss": 1.0}]})
    out, err = capsys.readouterr()
    assert err == ""
    assert "\r" not in out
    header, first, evaluated, last, end = out.splitlines()
    assert header.split("  ")[-1] == "time left"
    assert re.split(" {2,}", header.strip()) == ["step", "loss", "accuracy", "learning rate", "time left"]
    assert first.split()[:-1] == ["2/4", "1.2500", "0.500", "1.00e-05"]
    assert re.fullmatch(r"\d+:\d\d", first.split()[-1])
    assert evaluated.split() == ["held-out", "1.5000", "0.750"]
    assert last.split() == ["4/4", "1.2500", "0.500", "1.00e-05", "0:00"]
    assert end == "4 steps in 1:15"
    assert {len(header), len(first), len(last)} == {len(header)}, "the columns are below their names"
    assert evaluated.index("1.5000") == first.index("1.2500")


def test_a_terminal_gets_a_bar_below_the_lines(run, capsys, monkeypatch):
    monkeypatch.setattr(sys, "stderr", Terminal())
    run({2: [{"loss": 1.25}]})
    assert "| 4/4 [" in sys.stderr.getvalue()
    assert "1.2500" in capsys.readouterr().out


@pytest.mark.parametrize("arguments", [{"disable_tqdm": True}, {"main": False}])
def test_no_bar_where_none_is_wanted(run, capsys, monkeypatch, arguments):
    monkeypatch.setattr(sys, "stderr", Terminal())
    run({2: [{"loss": 1.25}]}, **arguments)
    assert sys.stderr.getvalue() == ""
    assert ("1.2500" in capsys.readouterr().out) == ("main" not in arguments), "the main process prints"


def test_messages_go_above_the_bar_while_there_is_one(run, monkeypatch):
    monkeypatch.setattr(sys, "stderr", Terminal())
    handlers = list(logging.getLogger().handlers)

    class Warns(ConsoleProgress):
        def on_step_end(self, args, state, control, **kwargs):
            super().on_step_end(args, state, control, **kwargs)
            logging.getLogger("rlhf_recipes.anything").warning("mind step %d", state.global_step)

    run({}, console=Warns(COLUMNS))
    lines = re.split("[\r\n]", sys.stderr.getvalue())
    assert [line for line in lines if "mind" in line] == [f"mind step {step}" for step in range(1, 5)]
    assert logging.getLogger().handlers == handlers


def test_a_resumed_run_counts_from_its_checkpoint_on(run, capsys, monkeypatch):
    times = iter([100.0, 110.0])
    monkeypatch.setattr("rlhf_recipes.tracking.console.time", SimpleNamespace(monotonic=lambda: next(times)))
    run({6: [{"loss": 1.0}]}, start=5, steps=8)
    assert capsys.readouterr().out.split()[-1] == "0:20"  # one step took 10 seconds, two are left


def test_the_columns_are_named_again_in_a_long_run(run, capsys):
    run({step: [{"loss": 1.0}] for step in range(1, 61)}, steps=60)
    lines = capsys.readouterr().out.splitlines()
    assert [number for number, line in enumerate(lines) if "learning rate" in line] == [0, 26, 52]


def test_each_of_several_sets_has_its_line(run, capsys):
    run({2: [{"eval_easy_loss": 1.0, "eval_easy_runtime": 1.0}], 4: [{"eval_loss": 2.0}]})
    assert capsys.readouterr().out.splitlines()[1].split() == ["easy", "1.0000"], "and what is no evaluation has none"


def test_a_console_that_knows_few_letters_loses_nothing(run, monkeypatch):
    out = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", out)
    run({2: [{"loss": 1.0}]}, console=ConsoleProgress([Column("Güte", "loss")]))
    out.flush()
    assert b"G?te" in out.buffer.getvalue()


@pytest.fixture
def make_trainer(tmp_path):
    """A trainer of a line through the origin."""

    class Line(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.slope = torch.nn.Parameter(torch.zeros(()))

        def forward(self, x, labels):
            return {"loss": ((self.slope * x - labels) ** 2).mean()}

    def make(**arguments):
        rows = Dataset.from_dict({"x": [1.0, 2.0], "labels": [2.0, 4.0]})
        args = TrainingArguments(
            str(tmp_path),
            use_cpu=True,
            report_to="none",
            max_steps=2,
            logging_steps=1,
            save_strategy="no",
            **arguments,
        )
        return Trainer(Line(), args, train_dataset=rows, eval_dataset=rows)

    return make


@pytest.mark.parametrize("disable_tqdm", [False, True])
def test_it_takes_the_place_of_what_transformers_prints_with(make_trainer, capsys, disable_tqdm):
    trainer = make_trainer(disable_tqdm=disable_tqdm)
    show_progress(trainer, ConsoleProgress([LOSS]))
    kinds = [type(callback) for callback in trainer.callback_handler.callbacks]
    assert kinds.count(ConsoleProgress) == 1
    assert not {ProgressCallback, PrinterCallback} & set(kinds)
    trainer.train()
    trainer.evaluate()
    out, err = capsys.readouterr()
    assert [line.split()[0] for line in out.splitlines()] == ["step", "1/2", "2/2", "2", "held-out"]
    assert "{" not in out
    assert "\r" not in out + err
    assert len(trainer.state.log_history) == 4  # all is kept there


def test_the_table_of_notebooks_stays(make_trainer):
    trainer = make_trainer()
    trainer.remove_callback(ProgressCallback)  # notebooks have another
    before = list(trainer.callback_handler.callbacks)
    show_progress(trainer, ConsoleProgress([LOSS]))
    assert trainer.callback_handler.callbacks == before


def test_texts_cannot_command_the_terminal():
    text = f"a{chr(27)}[2Jb{chr(0x9B)}31m{chr(0x202E)}c{chr(0xD800)}\n\td"
    cleaned = one_line(text)
    assert cleaned.isprintable()
    assert cleaned == "a\ufffd[2Jb\ufffd31m\ufffdc\ufffd d"
    assert one_line("naïve 日本 \U0001f600") == "naïve 日本 \U0001f600"


def test_a_table_is_aligned():
    assert table([["a", "one", "b"], ["longer", "2"], ["c", "", "x"]]).splitlines() == [
        "a       one  b",
        "longer    2",
        "c            x",
    ]


def test_only_the_missing_url_of_an_offline_run_is_not_said(capsys):
    class Card:
        def create_model_card(self, name):
            print("wandb: WARNING URL not available in offline run", file=sys.stderr)
            print("wandb: WARNING something else", file=sys.stderr)
            assert name == "model"
            if self.fails:
                raise OSError("disk full")

    class Ours(QuietModelCard, Card):
        fails = False

    Ours().create_model_card("model")
    assert capsys.readouterr().err == "wandb: WARNING something else\n"
    Ours.fails = True
    with pytest.raises(OSError, match="full"):
        Ours().create_model_card("model")
    assert capsys.readouterr().err == "wandb: WARNING something else\n"
