"""What a training on rewards says on the console: its roles, a line for each rollout or step, some completions."""

from __future__ import annotations

import math
import shutil
import sys
import textwrap
import time
from typing import TYPE_CHECKING, Any

from torch import nn

from rlhf_recipes.messages import as_text
from rlhf_recipes.models.parameter_table import roles_table
from rlhf_recipes.ppo._trl import last_rollout
from rlhf_recipes.tracking.console import HELD_OUT, Column, ConsoleProgress, one_line, show_progress

if TYPE_CHECKING:
    from collections.abc import Sequence

    from transformers import TrainerControl, TrainerState, TrainingArguments

_TIMES_WITH_COMPLETIONS = 10  # in a run, after the first rollout's
_MOST_LINES = {"prompt": 2, "completion": 6}
_OF_AN_EVALUATION = {"kl": "kl", "completions/mean_length": "length", "reward": "reward_score"}


class PolicyConsole(ConsoleProgress):
    """Print a line for each logged step of a training on rewards, and one for each evaluation of the policy.

    With `log_completions`, some completions of the first rollout are shown and of one in each tenth of the run; all of
    them are in `completions/`.

    Args:
        trainer: The trainer.
        columns: What is shown besides reward, gold score, KL and length.
    """

    def __init__(self, trainer: Any, columns: Sequence[Column] = ()) -> None:
        self._trainer = trainer
        weights = zip(trainer.reward_func_names, trainer.reward_weights.tolist(), strict=True)
        judges = [name for name, weight in weights if weight == 0]  # not in the reward; the last is the judge
        self._gold = [f"rewards/{name}/mean" for name in judges[-1:]]
        super().__init__(
            [
                Column("reward", "reward"),
                *(Column("gold", key) for key in self._gold),
                Column("KL", "kl"),
                Column("length", "completions/mean_length", ".1f"),
                *columns,
            ]
        )

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Begin the bar."""
        super().on_train_begin(args, state, control, **kwargs)
        self._next_completions = 0.0

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Print the line of a step or of an evaluation."""
        logs = logs or {}
        if not state.is_world_process_zero:
            return
        if "eval_policy/length" in logs:  # of the hook that samples on held-out prompts
            named = _OF_AN_EVALUATION | dict.fromkeys(self._gold, "gold_score")
            self._print_row(HELD_OUT, {key: logs.get(f"eval_policy/{name}") for key, name in named.items()})
        if "eval_win_rate" in logs:
            low, high = (logs.get(f"eval_win_rate_{end}") for end in ("low", "high"))
            interval = "" if low is None or high is None else f" [{low:.3f}, {high:.3f}]"
            self._print(f"{'':{self._label_width}}  win rate over the reference {logs['eval_win_rate']:.3f}{interval}")
        super().on_log(args, state, control, logs, **kwargs)
        if "loss" in logs:
            self._show_completions(state)

    def _show_completions(self, state: TrainerState) -> None:
        """Print completions of the last rollout, if it is time."""
        args = self._trainer.args
        if not args.log_completions or state.global_step < self._next_completions:
            return
        self._next_completions = state.global_step + state.max_steps / _TIMES_WITH_COMPLETIONS
        self._print(f"\nCompletions at step {state.global_step}:")
        for row in last_rollout(self._trainer)[: args.num_completions_to_print]:
            self._print(_paragraph("prompt", as_text(row["prompt"])))
            self._print(_paragraph("completion", as_text(row["completion"])))
            scores = (f"{one_line(name)} {_number(value)}" for name, value in row["scores"].items())
            self._print(f"  {', '.join(scores)}\n")
        self._under_header = 0  # the columns are named again below


class RolloutConsole(PolicyConsole):
    """Print a line for each rollout of PPO, when its updates are made, however often is logged.

    Args:
        trainer: The trainer.
    """

    def __init__(self, trainer: Any) -> None:
        super().__init__(
            trainer,
            [
                Column("expl. var.", "critic/explained_variance", ".2f"),
                Column("tokens/s", "tokens_per_second", ",.0f"),
            ],
        )

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Begin the bar, and to count tokens."""
        super().on_train_begin(args, state, control, **kwargs)
        self._counted = (state.num_input_tokens_seen, time.monotonic())

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Print the line of a rollout whose last update this was."""
        super().on_step_end(args, state, control, **kwargs)
        figures, ppo_args = self._trainer.last_rollout, self._trainer.args
        ends = state.global_step % ppo_args.steps_per_rollout == 0 or state.global_step == state.max_steps
        if not state.is_world_process_zero or not figures or not ends:
            return
        tokens, since = self._counted
        self._counted = (state.num_input_tokens_seen, time.monotonic())
        speed = (self._counted[0] - tokens) / max(self._counted[1] - since, 1e-9)
        self._print_step(state, {**figures, "tokens_per_second": speed})
        self._show_completions(state)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Print the line of an evaluation; the figures of steps are in the files."""
        if "loss" not in (logs or {}):
            super().on_log(args, state, control, logs, **kwargs)


def show_rollouts(trainer: Any) -> None:
    """Let a `RolloutConsole` print what transformers and TRL would: records of all metrics, and a table with each.

    Args:
        trainer: A PPO trainer, built.
    """
    _show(trainer, RolloutConsole(trainer))


def show_steps(trainer: Any) -> None:
    """Let a `PolicyConsole` print it, for a GRPO or RLOO trainer."""
    _show(trainer, PolicyConsole(trainer))


def _show(trainer: Any, console: PolicyConsole) -> None:
    trainer.num_completions_to_print = -1  # not TRL's table, which has texts as they are; 0 shows its frame
    show_progress(trainer, console)


def show_roles(trainer: Any) -> None:
    """Print the table of roles, their parameters and their memory, on the main process.

    Args:
        trainer: The trainer, built.
    """
    if trainer.is_world_process_zero():
        models = {f"reward_{i}": getattr(reward, "model", None) for i, reward in enumerate(trainer.reward_funcs)}
        own = {name: model for name, model in models.items() if isinstance(model, nn.Module)}
        sys.stdout.write(roles_table(trainer.model, trainer.roles, own) + "\n")


def _paragraph(name: str, text: str) -> str:
    """Wrap a text to the width of the console, and cut it: a prompt at its start, a completion at its end."""
    indent = f"  {name:<12}"
    width = max(shutil.get_terminal_size().columns - len(indent), 20)
    lines = textwrap.wrap(one_line(text), width) or ["(empty)"]
    most = _MOST_LINES[name]
    if len(lines) > most:
        cut = f"[{len(lines) - most} more lines]"
        lines = [cut, *lines[-most:]] if name == "prompt" else [*lines[:most], cut]
    return "\n".join((indent if not number else " " * len(indent)) + line for number, line in enumerate(lines))


def _number(score: float) -> str:
    return "none" if math.isnan(score) else f"{score:.2f}"
