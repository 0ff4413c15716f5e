"""The clock of the speed benchmark: phases of an update, and the memory of a process. It runs in two environments."""

import time
from dataclasses import dataclass, field
from pathlib import Path

import torch
from transformers import TrainerCallback


def seconds() -> float:
    """The time: on a GPU when its work is done; of one thread, its work alone, so that others do not count."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        return time.perf_counter()
    return time.process_time() if torch.get_num_threads() == 1 else time.perf_counter()


@dataclass
class Clock:
    """When the phases of an update begin and end: generate, score, train, and the rest.

    `score` is everything between the start of an update and its first training pass but the generation; `train` lasts
    until the last optimizer step; `rest` is what follows until the update is over.
    """

    generate: float = 0.0
    first_pass: float | None = None
    last_step: float = 0.0
    start: float = 0.0
    tokens: int = 0
    updates: list[dict[str, float]] = field(default_factory=list)

    def timed(self, function):
        """Count a function's time as generation."""

        def wrapped(*args, **kwargs):
            begin = seconds()
            result = function(*args, **kwargs)
            self.generate += seconds() - begin
            return result

        return wrapped

    def marks_pass(self, function):
        """Note when a function is called first in an update, with gradients."""

        def wrapped(*args, **kwargs):
            if torch.is_grad_enabled() and self.first_pass is None:
                self.first_pass = seconds()
            return function(*args, **kwargs)

        return wrapped

    def marks_step(self, function):
        """Note when a function, the optimizer's step, has ended."""

        def wrapped(*args, **kwargs):
            result = function(*args, **kwargs)
            self.last_step = seconds()
            return result

        return wrapped

    def begin(self):
        self.generate, self.first_pass, self.tokens = 0.0, None, 0
        self.start = seconds()

    def end(self):
        now = seconds()
        self.updates.append(
            {
                "update": now - self.start,
                "generate": self.generate,
                "score": self.first_pass - self.start - self.generate,
                "train": self.last_step - self.first_pass,
                "rest": now - self.last_step,
                "tokens": self.tokens,
            }
        )
        self.begin()


class Updates(TrainerCallback):
    """Tell the clock when an update, of several optimizer steps, begins and ends."""

    def __init__(self, clock, steps):
        self.clock, self.steps = clock, steps

    def on_train_begin(self, args, state, control, **kwargs):
        self.clock.begin()

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step % self.steps == 0:
            self.clock.end()


def memory(name: str) -> float:
    """A line of the process's status in MiB: `VmRSS` now, `VmHWM` at its peak; on a GPU, what torch's tensors take."""
    if torch.cuda.is_available():
        taken = {"VmRSS": torch.cuda.memory_allocated, "VmHWM": torch.cuda.max_memory_allocated}
        return taken[name]() / 2**20
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(f"{name}:"))
