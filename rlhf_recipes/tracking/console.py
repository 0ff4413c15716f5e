"""What a run says on the console: a line for each step that is logged, above a progress bar where it is a terminal."""

from __future__ import annotations

import contextlib
import io
import logging
import re
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from tqdm.auto import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm
from transformers import PrinterCallback, ProgressCallback, Trainer, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import has_length

HELD_OUT = "held-out"
_ROWS_UNDER_A_HEADER = 25
# What would move the cursor, colour what follows or turn its direction, and halves of characters
_CONTROL = re.compile("[\x00-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
_NO_URL = "URL not available in offline run"


class Column(NamedTuple):
    """A column of the console.

    Attributes:
        title: What stands above it.
        key: Of the logged metric that it shows.
        spec: The format of its numbers.
    """

    title: str
    key: str
    spec: str = ".3f"


LOSS = Column("loss", "loss", ".4f")
LEARNING_RATE = Column("learning rate", "learning_rate", ".2e")


class ConsoleProgress(ProgressCallback):
    """Print a line of figures for each logged step and each evaluation, in place of all that is logged.

    On a terminal the lines stand above a progress bar; in a file or a pipe, or with `disable_tqdm: true`, there are
    the lines alone. With several processes the main one prints.

    Args:
        columns: What is shown, between the step and the time left. An evaluation's line has what is logged with
            `eval_` before the key.

    Example:
        >>> trainer.add_callback(ConsoleProgress([LOSS, LEARNING_RATE]))  # doctest: +SKIP
    """

    def __init__(self, columns: Sequence[Column]) -> None:
        super().__init__()
        self.training_bar: Any
        self.prediction_bar: Any
        self._columns = columns
        self._under_header = 0
        self._label_width = len(HELD_OUT)
        self._above_bar = contextlib.ExitStack()

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Begin the bar, at the step where a resumed run goes on."""
        self.current_step = self._first_step = state.global_step
        self._start = time.monotonic()
        self._label_width = max(len(HELD_OUT), len(f"{state.max_steps}/{state.max_steps}"))
        self._under_header = 0
        if state.is_world_process_zero:
            bar = tqdm(
                total=state.max_steps,
                initial=state.global_step,
                unit="step",
                disable=_no_bar(args),
                dynamic_ncols=True,
            )
            self.training_bar = bar
            if not bar.disable:  # messages go above the bar, not into it
                loggers = [logging.getLogger(), logging.getLogger("transformers")]
                self._above_bar.enter_context(logging_redirect_tqdm(loggers))

    def on_prediction_step(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        eval_dataloader: Any = None,
        **kwargs: Any,
    ) -> None:
        """Go on with the bar of an evaluation, which disappears at its end."""
        if state.is_world_process_zero and has_length(eval_dataloader):
            if self.prediction_bar is None:
                self.prediction_bar = tqdm(
                    total=len(eval_dataloader),
                    desc="evaluation",
                    leave=False,
                    disable=_no_bar(args),
                    dynamic_ncols=True,
                )
            self.prediction_bar.update(1)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Print the line of a step or of an evaluation; what else is logged is in the files."""
        logs = logs or {}
        if not state.is_world_process_zero:
            return
        if "loss" in logs:
            self._print_step(state, logs)
        elif "train_runtime" in logs:
            self._print(f"{state.global_step - self._first_step:,} steps in {duration(logs['train_runtime'])}")
        for prefix in [key.removesuffix("runtime") for key in logs if re.fullmatch("eval_(.*_)?runtime", key)]:
            name = prefix.removeprefix("eval_").rstrip("_")  # of one of several sets
            self._print_row(name or HELD_OUT, {key.removeprefix(prefix): value for key, value in logs.items()})

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """End the bar."""
        super().on_train_end(args, state, control, **kwargs)
        self._above_bar.close()

    def _print_step(self, state: TrainerState, figures: Mapping[str, Any]) -> None:
        done, left = state.global_step - self._first_step, state.max_steps - state.global_step
        seconds = (time.monotonic() - self._start) / max(done, 1) * left
        self._print_row(f"{state.global_step}/{state.max_steps}", figures, duration(seconds))

    def _print_row(self, label: str, figures: Mapping[str, Any], time_left: str = "") -> None:
        if self._under_header % _ROWS_UNDER_A_HEADER == 0:
            titles = [column.title.rjust(_width(column)) for column in self._columns]
            self._print("  ".join(["step".rjust(self._label_width), *titles, "time left"]))
        self._under_header += 1
        cells = [_cell(figures.get(column.key), column) for column in self._columns]
        row = [label[: self._label_width].rjust(self._label_width), *cells, time_left.rjust(len("time left"))]
        self._print("  ".join(row).rstrip())

    def _print(self, line: str) -> None:
        encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
        tqdm.write(line.encode(encoding, "replace").decode(encoding))


def show_progress(trainer: Trainer, console: ConsoleProgress) -> None:
    """Let a console print what transformers' own callback would; the one of notebooks, a table, stays.

    Args:
        trainer: The trainer.
        console: What prints.
    """
    if trainer.pop_callback(PrinterCallback if trainer.args.disable_tqdm else ProgressCallback) is not None:
        trainer.add_callback(console)


def duration(seconds: float) -> str:
    """Write a time as minutes and seconds, or hours, minutes and seconds.

    Example:
        >>> duration(75), duration(7384.2)
        ('1:15', '2:03:04')
    """
    return str(tqdm.format_interval(seconds)).removeprefix("0")


def one_line(text: object) -> str:
    """Make one line of a text of a model or of data, without the characters that would command a terminal.

    Example:
        >>> one_line("a" + chr(27) + "[2J  b" + chr(10) + "c") == "a" + chr(0xFFFD) + "[2J b c"
        True
    """
    return _CONTROL.sub("\ufffd", " ".join(str(text).split()))


def table(rows: Sequence[Sequence[str]]) -> str:
    """Lay out rows as text, the first column on the left and the others on the right.

    Args:
        rows: The rows, the header first. A shorter row leaves its last cells empty.

    Example:
        >>> print(table([["held-out", "policy"], ["reward", "4.27"]]))
        held-out  policy
        reward      4.27
    """
    widths = [max(len(row[column]) for row in rows if len(row) > column) for column in range(max(map(len, rows)))]
    lines = []
    for first, *others in rows:
        cells = [cell.rjust(width) for cell, width in zip(others, widths[1:], strict=False)]
        lines.append("  ".join([first.ljust(widths[0]), *cells]).rstrip())
    return "\n".join(lines)


class QuietModelCard:
    """Mixin for TRL's trainers: model cards are written without a word from W&B that an offline run has no URL.

    TRL asks for one with every card, and so with every checkpoint.
    """

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """Write TRL's model card."""
        with _without_missing_url():
            super().create_model_card(*args, **kwargs)  # type: ignore[misc]  # the trainer's


@contextlib.contextmanager
def _without_missing_url() -> Iterator[None]:
    """Drop that one message, which W&B writes to stderr without a logger or an option of its own."""
    written = io.StringIO()
    try:
        with contextlib.redirect_stderr(written):
            yield
    finally:
        sys.stderr.write("".join(line for line in written.getvalue().splitlines(True) if _NO_URL not in line))


def _no_bar(args: TrainingArguments) -> bool | None:
    return True if args.disable_tqdm else None  # `None`: where it would not be a terminal


def _width(column: Column) -> int:
    return max(len(column.title), 7)


def _cell(value: Any, column: Column) -> str:
    return ("" if value is None else format(value, column.spec)).rjust(_width(column))
