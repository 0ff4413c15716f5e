"""Record of the base that an adapter was trained on: quantized or not, its precision, and numbers of a few rows.

An adapter learns on the weights it sees. On others (those of 4 bits in place of 32, say) it computes something else,
and nothing shows it. So each stage saves a few rows with the numbers that the adapter gave for them, and whoever loads
it on a base of another kind compares.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from peft import PeftModel
from torch import Tensor

logger = logging.getLogger(__name__)

FILE = "trained_on.json"
ROWS, _TOKENS = 8, 64  # that are kept, and at most of each
TOLERANCE, OF_THE_SPREAD = 0.5, "of the spread of the scores"
Numbers = list[list[float]]  # for each row


def describe_base(model: Any) -> str:
    """Describe in words how the weights of a model, or of the base of a PEFT model, are kept.

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> sizes = dict(hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1)
        >>> describe_base(LlamaForCausalLM(LlamaConfig(vocab_size=9, **sizes)).bfloat16())
        'bfloat16'
    """
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    dtype = str(base.dtype).removeprefix("torch.")
    config = getattr(base.config, "quantization_config", None) if getattr(base, "is_quantized", False) else None
    if config is None:
        return dtype
    fields = config if isinstance(config, dict) else config.to_dict()
    if fields.get("load_in_8bit"):
        return f"8 bits, {dtype} beside them"
    if not fields.get("load_in_4bit"):
        return f"{fields.get('quant_method')}, {dtype} beside it"
    double = ", double quantization" if fields.get("bnb_4bit_use_double_quant") else ""
    compute = str(fields.get("bnb_4bit_compute_dtype")).removeprefix("torch.")
    return f"4 bits ({fields.get('bnb_4bit_quant_type')}{double}), computed in {compute}, {dtype} beside them"


@torch.no_grad()
def log_probs(model: Any, row: Sequence[int]) -> list[float]:
    """Log-probability of each token of a row but the first, in nats, by a causal model as it is."""
    ids = torch.tensor([list(row)], device=model.device)
    logps = model(input_ids=ids).logits[0, :-1].float().log_softmax(dim=-1)
    values: list[float] = logps.gather(1, ids[0, 1:, None]).squeeze(1).tolist()
    return values


@torch.no_grad()
def raw_score(model: Any, row: Sequence[int]) -> list[float]:
    """The first number of a sequence classifier for a row, by the model as it is."""
    ids = torch.tensor([list(row)], device=model.device)
    return [float(model(input_ids=ids).logits.flatten()[0])]


def save_trained_on(
    folder: str | Path, model: Any, rows: Iterable[Sequence[int]], numbers_of: Callable[[Any, Sequence[int]], Any]
) -> None:
    """Write into an adapter's folder which base it was trained on, with its numbers of a few rows.

    Args:
        folder: The adapter's folder.
        model: The model with the adapter; its mode, training or evaluation, stays as it is.
        rows: Token ids; the first `ROWS` are kept, and the first tokens of each.
        numbers_of: `log_probs` or `raw_score`.
    """
    training = model.training
    model.eval()
    cut_rows = [list(map(int, row[:_TOKENS])) for row, _ in zip(rows, range(ROWS), strict=False)]
    cut_rows = [row for row in cut_rows if len(row) > 1]
    record = {"base": describe_base(model), "rows": cut_rows, "numbers": [numbers_of(model, row) for row in cut_rows]}
    model.train(training)
    Path(folder, FILE).write_text(json.dumps(record) + "\n", encoding="utf-8")


def save_with_first_rows(
    trainer: Any, folder: str | Path, ids_of: Callable[[Any], Sequence[int]], numbers_of: Callable[..., Any]
) -> None:
    """Call `save_trained_on` for the adapter of a stage, with the first rows of its evaluation, or of its training.

    Args:
        trainer: The stage's trainer. A model without an adapter, or spread over processes, leaves no record.
        folder: The adapter's folder.
        ids_of: Takes the token ids from a prepared row.
        numbers_of: `log_probs` or `raw_score`.
    """
    model = trainer.accelerator.unwrap_model(trainer.model)
    rows = trainer.eval_dataset if hasattr(trainer.eval_dataset, "select") else trainer.train_dataset
    sharded = trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled  # one process alone cannot run it
    if isinstance(model, PeftModel) and hasattr(rows, "select") and not sharded:  # no stream
        first = rows.select(range(min(ROWS, len(rows))))
        save_trained_on(folder, model, [ids_of(row) for row in first], numbers_of)


@dataclass(frozen=True)
class TrainedOn:
    """What `save_trained_on` wrote.

    Attributes:
        base: The base of the training, in the words of `describe_base`.
        rows: Token ids of a few texts.
        numbers: What the adapter gave for them, one after another, float64, shape `(N,)`.
    """

    base: str
    rows: list[list[int]]
    numbers: Tensor

    @property
    def spread(self) -> float:
        """Standard deviation of the numbers; 1 of a single one."""
        return max(self.numbers.std().item(), 1e-12) if len(self.numbers) > 1 else 1.0

    def gaps(self, model: Any, numbers_of: Callable[[Any, Sequence[int]], Any]) -> Tensor:
        """By how much a model's numbers of the same rows are above those of the training, shape `(N,)`.

        Args:
            model: The model; its mode, training or evaluation, stays as it is.
            numbers_of: As in training: `log_probs` or `raw_score`.
        """
        training = model.training
        model.eval()
        now = torch.tensor([number for row in self.rows for number in numbers_of(model, row)], dtype=torch.float64)
        model.train(training)
        return now - self.numbers


def read_trained_on(folder: str | Path) -> TrainedOn | None:
    """Read the record of an adapter's training; `None` where there is none.

    Raises:
        ValueError: If the file is damaged.

    Example:
        >>> read_trained_on("no/such/folder") is None
        True
    """
    path = Path(folder, FILE)
    if not path.is_file():
        return None
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        numbers = torch.tensor([number for row in record["numbers"] for number in row], dtype=torch.float64)
        return TrainedOn(str(record["base"]), record["rows"], numbers)
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{path} is damaged ({error}). Remove it to load the adapter unchecked.") from error


def check_trained_on(
    folder: str | Path, model: Any, numbers_of: Callable[[Any, Sequence[int]], Any], unit: str, tolerance: float
) -> None:
    """Compare an adapter's numbers on this base with those where it was trained, if the base is of another kind.

    Args:
        folder: The adapter's folder. Without the file nothing is known, and nothing is said.
        model: The model, with the adapter in use.
        numbers_of: As in training: `log_probs`, or `raw_score` (or what gives the same).
        unit: `"nats per token"`, or `OF_THE_SPREAD`: then the difference is divided by the scores' standard deviation.
        tolerance: Largest mean difference in this unit.

    Raises:
        ValueError: If the difference is larger, or the file is damaged.
    """
    record = read_trained_on(folder)
    current = describe_base(model)
    if record is None or current == record.base or not len(record.numbers):
        return
    gaps = record.gaps(model, numbers_of)
    difference = gaps.abs().mean().item()
    if unit == OF_THE_SPREAD:
        difference /= record.spread
    message = f"The adapter in {str(folder)!r} was trained on a base in {record.base}, and is put on one in {current}"
    if not difference <= tolerance:
        raise ValueError(
            f"{message}: on {len(record.rows)} rows it differs by {difference:.2g} {unit} (allowed: {tolerance:g}), "
            "so it is another model. Load the base as in training (`load_in_4bit`, `dtype`), or train the adapter on "
            "this one. `adapter_tolerance` raises the bound."
        )
    if PartialState().is_main_process:
        logger.warning("%s: on %d rows it differs by %.2g %s.", message, len(record.rows), difference, unit)
