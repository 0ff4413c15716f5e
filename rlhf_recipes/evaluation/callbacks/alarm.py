"""The alarm against reward hacking: it watches a run's logs, writes down what it finds, and acts as configured."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

from transformers import Trainer

from rlhf_recipes.evaluation.callbacks.evidence import rollout_evidence
from rlhf_recipes.evaluation.hacking_signs import (
    AlarmLimits,
    Reason,
    entropy_collapse,
    kl_over_budget,
    length_drift,
    ngram_takeover,
    over_optimization,
    read_series,
)
from rlhf_recipes.evaluation.records import RecordingCallback, log_apart
from rlhf_recipes.ppo.trainer import PPOTrainer
from rlhf_recipes.shaping import AdaptiveKLController, FixedKLController
from rlhf_recipes.tracking.wandb_log import current_run, log_table

if TYPE_CHECKING:
    from transformers import TrainerControl, TrainerState, TrainingArguments

Action = Literal["warn", "lower_learning_rate", "raise_kl", "stop"]

logger = logging.getLogger(__name__)

_KEYS = {"kl": "kl", "entropy": "entropy", "length": "completions/mean_length"}
_LEAST_KL_COEF = 0.05  # where there was no penalty, doubling it would leave it at 0
# What `PolicyEvaluation` logs: the policy's reward, and what may fall while it rises.
_EVALUATED = ("eval_policy/gold_score", "eval_win_rate", "eval_length_controlled_reward", "eval_judge_win_rate")


class RewardHackingAlarm(RecordingCallback):
    """Warn of reward hacking, or act against it.

    After each log it looks for: a proxy that rises while the true score falls; a KL to the reference beyond a budget;
    a collapse of the entropy; a drift of the length; and one n-gram that takes over. It reads what TRL's trainers
    log, and what `PolicyEvaluation` adds; what is not logged is not watched. A sign that is there counts again only
    after `limits.window` more logs.

    Each reason is a warning of the Python logger, an entry of `alarms.json` in the run's folder (an empty list where
    there was none), and a log entry `alarm/<kind>` (1.0), so that it is in `trainer_state.json` and in W&B. A run
    that is resumed keeps those up to its checkpoint. W&B also gets evidence from the last rollout, as tables:
    `alarm/samples`, the completions that stand highest by the reward compared with the true score (without one, the
    highest rewards), and `alarm/ngrams`, the sequences of tokens that are in the most completions.

    Actions: `warn` only says it. `lower_learning_rate` halves all learning rates and what the schedule makes of them.
    `raise_kl` doubles the weight of the KL penalty (to 0.05 at least) of a `PPOTrainer`, or the `beta` of TRL's GRPO
    and RLOO; where there is no penalty that could be raised, it says so. `stop` ends the training, and lets Trainer
    load the last checkpoint from before the true score fell, where one is kept (`save_steps`).

    Source: https://huggingface.co/papers/2210.10760.

    Args:
        trainer: The trainer.
        gold: Name of the reward function that measures the truth and has the weight 0: `rewards/<gold>/mean` is
            compared with `reward`.
        action: What to do.
        limits: From where on a change is a sign.
        pairs: More keys to compare: `(proxy, truth)` each. The truth is a number that should rise.
        keys: What `kl`, `entropy` and `length` (by default `completions/mean_length`) are called in the logs.

    Raises:
        ValueError: If the action is unknown, or a key is none of those three.

    Example:
        >>> trainer.add_callback(RewardHackingAlarm(trainer, gold="gold_score", action="stop"))  # doctest: +SKIP
    """

    file_name = "alarms.json"

    def __init__(
        self,
        trainer: Trainer,
        gold: str | None = None,
        action: Action = "warn",
        limits: AlarmLimits | None = None,
        pairs: Sequence[tuple[str, str]] = (),
        keys: Mapping[str, str] | None = None,
    ) -> None:
        if action not in get_args(Action):
            raise ValueError(f"`action` must be one of {', '.join(get_args(Action))}; got {action!r}.")
        self._keys = {**_KEYS, **(keys or {})}
        if len(self._keys) > len(_KEYS):
            raise ValueError(f"`keys` names {', '.join(_KEYS)}; got {sorted(keys or {})}.")
        super().__init__(trainer)
        self._action, self._gold = action, gold
        self._limits = limits or AlarmLimits()
        self._pairs = [("reward", f"rewards/{gold}/mean")] if gold is not None else []
        self._pairs += [*pairs, *(("eval_policy/reward_score", truth) for truth in _EVALUATED)]
        self._last: dict[tuple[str, str], int] = {}  # number of values at which a sign was last reported

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Start the list of alarms, or take up the one of the run that is resumed."""
        super().on_train_begin(args, state, control, **kwargs)
        self._last = {}
        raised = read_series(state.log_history, "alarm/kl_coef").values
        adaptive = isinstance(getattr(self._trainer, "kl_controller", None), AdaptiveKLController)
        if len(raised) and not adaptive:  # an adaptive coefficient is part of the checkpoint
            self._set_kl_coef(float(raised[-1]))

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Look at what has been logged so far."""
        if any(key.startswith("alarm/") for key in logs or {}):
            return
        for name, reason, seen in self._signs(state.log_history):
            since = self._last.get((reason.kind, name))
            if since is not None and seen < since + self._limits.window:
                continue
            self._last[reason.kind, name] = seen
            self._report(reason, state, control)

    def _signs(self, history: list[dict[str, Any]]) -> list[tuple[str, Reason, int]]:
        """All signs that are there now, each with what it was seen in and how many values there were."""
        limits, found = self._limits, []
        for names in self._pairs:
            proxy, truth = (read_series(history, key) for key in names)
            quoted = (f"`{names[0]}`", f"`{names[1]}`")
            found.append((names[1], over_optimization(proxy, truth, limits, quoted), truth))
        checks = {"kl": kl_over_budget, "entropy": entropy_collapse, "length": length_drift}
        for name, check in checks.items():
            series = read_series(history, self._keys[name])
            found.append((name, check(series, limits), series))
        share, usual = (read_series(history, f"eval_{side}/top_ngram") for side in ("policy", "reference"))
        found.append(("ngram", ngram_takeover(share, usual, limits), share))
        return [(name, reason, len(series.steps)) for name, reason, series in found if reason is not None]

    def _report(self, reason: Reason, state: TrainerState, control: TrainerControl) -> None:
        logs = {f"alarm/{reason.kind}": 1.0}
        done = "warned"
        if self._action == "lower_learning_rate":
            logs["alarm/learning_rate"] = self._halve_learning_rates()
            done = f"learning rate halved to {logs['alarm/learning_rate']:.3g}"
        elif self._action == "raise_kl":
            raised = self._raise_kl()
            done = "there is no KL penalty that could be raised"
            if raised is not None:
                logs["alarm/kl_coef"] = raised
                done = f"weight of the KL penalty raised to {raised:.3g}"
        elif self._action == "stop":
            control.should_training_stop = True
            done = self._restore(reason, state)
        self._record({**asdict(reason), "action": done}, state)
        if state.is_world_process_zero:
            logger.warning("Reward hacking, step %d: %s (%s)", reason.step, reason.message, done)
            self._log_evidence(reason)
        log_apart(self._trainer, logs)

    def _log_evidence(self, reason: Reason) -> None:
        if current_run(self._trainer) is None:
            return
        found = {"step": reason.step, "kind": reason.kind, "message": reason.message}
        for name, rows in zip(("samples", "ngrams"), rollout_evidence(self._trainer, self._gold), strict=True):
            log_table(self._trainer, f"alarm/{name}", [found | row for row in rows])

    def _halve_learning_rates(self) -> float:
        scheduler = self._trainer.lr_scheduler
        scheduler.base_lrs = [rate / 2 for rate in scheduler.base_lrs]  # kept in checkpoints
        for group in self._trainer.optimizer.param_groups:
            group["lr"] /= 2
        return float(self._trainer.optimizer.param_groups[0]["lr"])

    def _raise_kl(self) -> float | None:
        if isinstance(self._trainer, PPOTrainer):
            return self._set_kl_coef(max(2 * self._trainer.kl_controller.value, _LEAST_KL_COEF))
        beta = getattr(self._trainer, "beta", None)
        return self._set_kl_coef(2 * beta) if beta else None  # at 0 TRL has loaded no reference

    def _set_kl_coef(self, value: float) -> float:
        if not isinstance(self._trainer, PPOTrainer):
            self._trainer.beta = value
        elif isinstance(self._trainer.kl_controller, FixedKLController):
            self._trainer.kl_controller = replace(self._trainer.kl_controller, value=value)
        else:
            self._trainer.kl_controller.value = value
        return value

    def _restore(self, reason: Reason, state: TrainerState) -> str:
        """Let Trainer load, at its end, the last checkpoint from before the sign."""
        before = reason.numbers.get("best_step", reason.step - 1)
        steps = {
            int(match[1]): path
            for path in Path(self._trainer.args.output_dir).glob("checkpoint-*")
            if (match := re.fullmatch(r"checkpoint-(\d+)", path.name)) and int(match[1]) <= before
        }
        if not steps:
            return "stopped; no checkpoint from before was kept"
        state.best_global_step, state.best_model_checkpoint = max(steps), str(steps[max(steps)])
        self._trainer.args.load_best_model_at_end = True
        return f"stopped; the weights are those of checkpoint-{max(steps)}"
