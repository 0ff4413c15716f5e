"""Health of a run: warnings that explain themselves, gradient norms per role, time per phase, speed and memory."""

from __future__ import annotations

import logging
import resource
import sys
import time
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import Trainer

from rlhf_recipes.evaluation.health_checks import CRITIC_CHECKS, TRAINING_CHECKS, Check, failed_checks
from rlhf_recipes.evaluation.records import RecordingCallback, log_apart
from rlhf_recipes.models.arguments import CACHE
from rlhf_recipes.models.roles import is_critic_parameter
from rlhf_recipes.models.sharding import whole

if TYPE_CHECKING:
    from transformers import TrainerControl, TrainerState, TrainingArguments

logger = logging.getLogger(__name__)


class _Health(RecordingCallback):
    """Run checks on the log history, and say each that fails once for as long as it does."""

    checks: Sequence[Check]

    def __init__(self, trainer: Trainer) -> None:
        super().__init__(trainer)
        self._failing: set[str] = set()

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Start the list of warnings, or take up the one of the run that is resumed."""
        super().on_train_begin(args, state, control, **kwargs)
        self._failing = set()

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Look at what has been logged so far."""
        if "loss" not in (logs or {}):
            return
        failed = failed_checks(state.log_history, self.checks)
        for check, value in failed:
            if check.kind not in self._failing:
                message = f"`{check.key}` is {value:.3g}: {check.explanation}"
                numbers = {"value": value, "limit": check.limit}
                self._record(
                    {"kind": check.kind, "step": state.global_step, "message": message, "numbers": numbers}, state
                )
                if state.is_world_process_zero:
                    logger.warning("Step %d: %s", state.global_step, message)
        self._failing = {check.kind for check, _ in failed}


class CriticHealth(_Health):
    """Warn of a critic that explains nothing, is blind at the start of the completions, or is clipped all the time.

    It reads what `PPOTrainer` logs, and writes `critic_health.json`: a list of warnings, each with what to do.

    Args:
        trainer: The trainer.

    Example:
        >>> trainer.add_callback(CriticHealth(trainer))  # doctest: +SKIP
    """

    checks = CRITIC_CHECKS
    file_name = "critic_health.json"


class TrainingHealth(_Health):
    """Warn of updates that are too large, clipped or dropped, and measure where the gradient and the time go.

    With every log there is an entry with, as means per optimizer step since the last one:

    - `health/grad_norm_policy`, `health/grad_norm_critic`: norms of the gradients that the optimizer gets, after
      clipping (`max_grad_norm`); not under DeepSpeed, which has cleared them by then;
    - `health/seconds_generate`, `health/seconds_score`, `health/seconds_train`: wall time. `generate` is the time
      between forward passes with a cache of keys and values; `train` begins with the first forward pass with a
      gradient; `score` is what is left in between: log-probabilities, values and rewards. With vLLM there are no
      such passes, and the generation counts as `score`. TRL's profiler has more, but sends it only to trackers;
    - `health/tokens_per_second`, prompts and completions, where `num_tokens` is logged;
    - `health/peak_memory_gb`: of the accelerator since the last log; on a CPU of the process since its start.

    The warnings are in `training_health.json`. On a GPU nothing is synchronized for this, so that times of phases are
    exact only as far as the phases wait for their results, which generation does with each token.

    Args:
        trainer: The trainer; it should not be compiled.

    Example:
        >>> trainer.add_callback(TrainingHealth(trainer))  # doctest: +SKIP
    """

    checks = TRAINING_CHECKS
    file_name = "training_health.json"

    def __init__(self, trainer: Trainer) -> None:
        super().__init__(trainer)
        self._clock = _PhaseClock()
        self._hooks: list[Any] = []
        self._reset()
        self._tokens: tuple[float, float] | None = None  # number of tokens, and when it was logged

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Listen to the model's forward passes."""
        super().on_train_begin(args, state, control, **kwargs)
        model = self._trainer.accelerator.unwrap_model(self._trainer.model)
        model = model.get_base_model() if hasattr(model, "peft_config") else model
        self._hooks = [
            model.register_forward_pre_hook(self._clock.before_forward, with_kwargs=True),
            model.register_forward_hook(self._clock.after_forward, with_kwargs=True),
        ]
        cleared = self._trainer.is_deepspeed_enabled
        self._parameters = {} if cleared else dict(_by_role(self._trainer.model))
        self._reset()
        self._tokens = None

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Stop listening."""
        for hook in self._hooks:
            hook.remove()
        self._hooks = []

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Begin a step, most often with a rollout."""
        self._clock.begin()

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Measure the gradients that the optimizer is about to get."""
        for role, parameters in self._parameters.items():
            gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
            norm = whole(torch.nn.utils.get_total_norm(gradients).detach()) if gradients else torch.zeros(())
            self._norms[role] = norm + self._norms[role] if role in self._norms else norm

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """End the step, before an evaluation at its end."""
        for phase, seconds in self._clock.end().items():
            self._seconds[phase] = self._seconds.get(phase, 0.0) + seconds
        self._steps += 1

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Log what was measured since the last log."""
        super().on_log(args, state, control, logs, **kwargs)
        if "loss" not in (logs or {}) or not self._steps:
            return
        metrics = {f"health/grad_norm_{role}": float(norm) / self._steps for role, norm in self._norms.items()}
        metrics |= {f"health/seconds_{phase}": seconds / self._steps for phase, seconds in self._seconds.items()}
        now, tokens = time.perf_counter(), (logs or {}).get("num_tokens")
        if tokens is not None:
            if self._tokens is not None:
                metrics["health/tokens_per_second"] = (tokens - self._tokens[0]) / (now - self._tokens[1])
            self._tokens = (tokens, now)
        metrics["health/peak_memory_gb"] = _peak_memory() / 1e9
        self._reset()
        log_apart(self._trainer, metrics)

    def _reset(self) -> None:
        self._norms: dict[str, Tensor] = {}
        self._seconds: dict[str, float] = {}
        self._steps = 0


class _PhaseClock:
    """Times of the phases of a step, told apart by the forward passes: with a cache, with a gradient, or neither."""

    def __init__(self) -> None:
        self.begin()

    def begin(self) -> None:
        self._start = time.perf_counter()
        self._train: float | None = None
        self._generating: tuple[float, float] | None = None

    def before_forward(self, module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        if torch.is_grad_enabled():
            self._train = self._train or time.perf_counter()
        elif kwargs.get(CACHE) is not None and self._generating is None:
            self._generating = (time.perf_counter(), time.perf_counter())

    def after_forward(self, module: Any, args: Any, kwargs: dict[str, Any], output: Any) -> None:
        if self._generating is not None and kwargs.get(CACHE) is not None:
            self._generating = (self._generating[0], time.perf_counter())

    def end(self) -> dict[str, float]:
        now = time.perf_counter()
        train = now if self._train is None else self._train
        generate = 0.0 if self._generating is None else self._generating[1] - self._generating[0]
        return {"generate": generate, "score": train - self._start - generate, "train": now - train}


def _by_role(model: Any) -> Iterator[tuple[str, list[Any]]]:
    trained = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    for role, critic in (("policy", False), ("critic", True)):
        parameters = [parameter for name, parameter in trained if is_critic_parameter(name) == critic]
        if parameters:
            yield role, parameters


def _peak_memory() -> float:
    if torch.cuda.is_available():
        peak = torch.cuda.max_memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        return float(peak)
    unit = 1 if sys.platform == "darwin" else 1024
    return float(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit)
