"""TRL's trainer of completions, whose evaluation counts every token of every row once."""

from __future__ import annotations

import math
from collections.abc import Sequence, Sized
from dataclasses import dataclass
from typing import Any, cast

import torch
from datasets import Dataset
from torch import Tensor, nn
from transformers import ProcessorMixin
from trl import SFTConfig, SFTTrainer

from rlhf_recipes.checkpoints import KeptRates
from rlhf_recipes.config import ChosenDefaults
from rlhf_recipes.data.chat_templates import end_token_ids
from rlhf_recipes.data.context import context_length
from rlhf_recipes.data.dialogues import BadRow
from rlhf_recipes.messages import image_columns
from rlhf_recipes.models.adapters import name_base_absolutely
from rlhf_recipes.models.images import ImageReader, check_model_type, check_reads_images
from rlhf_recipes.models.resumed import check_same_adapter
from rlhf_recipes.models.rows import pad_rows
from rlhf_recipes.models.sharding import compute_by_autocast
from rlhf_recipes.models.trained_on import log_probs, save_with_first_rows
from rlhf_recipes.statistics.metrics import ratio_interval
from rlhf_recipes.tracking.console import (
    LEARNING_RATE,
    LOSS,
    ConsoleProgress,
    QuietModelCard,
    show_progress,
    table,
)


@dataclass
class CompletionConfig(ChosenDefaults, SFTConfig):
    """TRL's configuration of supervised fine-tuning, without its needless warnings.

    Example:
        >>> CompletionConfig("outputs/films/sft", use_cpu=True, bf16=False).dataloader_pin_memory
        False
    """


class CompletionTrainer(QuietModelCard, SFTTrainer):
    """Trains as TRL does, to the last bit, and evaluates all rows as if they were one batch.

    TRL logs the mean of the batches' means over tokens, so that a token of a batch with short completions weighs more,
    and `eval_loss` changes with the size of the batches. With several processes it also counts the rows twice that
    fill up the last batches. Here `eval_loss`, `eval_entropy` and `eval_mean_token_accuracy` are sums over all tokens
    of all rows, divided by their number. (A loss other than the plain one, `loss_type: dft`, label smoothing or a
    router's auxiliary loss, stays TRL's; and `padding_free` rows are not told apart, so that several processes count
    some of them twice.)

    With a processor as `processing_class` it sees pictures: rows are chats (`prompt`, `completion`) with `images` or
    `image`, and LoRA is on the model's language part (`language_layers`). The loss is on the completion's tokens, its
    end token included, as PPO reads them.

    Args:
        **kwargs: Those of `trl.SFTTrainer`.

    Raises:
        ValueError: If the model or its adapter cannot read pictures, or a row cannot be used; it names the row.

    Attributes:
        image_collator: What makes batches of rows with pictures; `None` with a tokenizer.
    """

    args: SFTConfig

    def __init__(self, **kwargs: Any) -> None:
        self.image_collator: ImageCollator | None = None
        if isinstance(kwargs.get("processing_class"), ProcessorMixin):
            self.image_collator = _image_collator(**kwargs)
            kwargs["data_collator"] = kwargs.get("data_collator") or self.image_collator
        super().__init__(**kwargs)
        compute_by_autocast(self)
        if self.image_collator is not None:
            check_reads_images(self.model)
        self.add_callback(KeptRates())
        show_progress(self, ConsoleProgress([LOSS, LEARNING_RATE]))
        self._token_sums: list[Tensor] = []

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Loss of a batch; in evaluation the sums over the tokens of each row are kept."""
        if model.training:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        handle = model.register_forward_hook(self._keep)
        try:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        finally:
            handle.remove()

    def evaluation_loop(
        self,
        dataloader: Any,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> Any:
        """Evaluate, and log the metrics of all tokens together in place of means of the batches' means."""
        self._token_sums = []
        output = super().evaluation_loop(dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix)
        if self._token_sums:
            loss, entropy, right, tokens = torch.cat(self._token_sums).double().sum(dim=0).tolist()
            self._metrics["eval"]["entropy"] = [entropy / max(tokens, 1)]
            self._metrics["eval"]["mean_token_accuracy"] = [right / max(tokens, 1)]
            metrics: Any = output.metrics
            if self._is_plain():
                metrics[f"{metric_key_prefix}_loss"] = loss / max(tokens, 1)
        return output

    def loss_interval(self, level: float = 0.95, seed: int = 0) -> tuple[float, float] | None:
        """Confidence interval of the last evaluation's `eval_loss`, of a bootstrap over its rows.

        Args:
            level: Probability that the interval is to cover the true loss.
            seed: Seed of the draws.

        Returns:
            `(low, high)` in nats per token; `None` where `eval_loss` is no mean over tokens of rows, where rows are
            not told apart (`padding_free`, and packing that implies it), or if there are fewer than two.
        """
        if not self._token_sums or not self._is_plain() or self.padding_free:
            return None
        loss, _, _, tokens = torch.cat(self._token_sums).double().cpu().unbind(dim=1)
        counted = tokens > 0
        return ratio_interval(loss[counted], tokens[counted], level, seed=seed) if counted.sum() > 1 else None

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        check_same_adapter(resume_from_checkpoint, self.model)
        super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        name_base_absolutely(self.accelerator.unwrap_model(self.model))
        super()._save(output_dir, state_dict)
        ids_of = self.image_collator.text_ids if self.image_collator is not None else _ids_of
        save_with_first_rows(self, output_dir or str(self.args.output_dir), ids_of, log_probs)

    def _is_plain(self) -> bool:
        custom = (self.compute_loss_func, self.label_smoother)
        return self.args.loss_type == "nll" and custom == (None, None) and not self.aux_loss_enabled

    def _keep(self, module: nn.Module, inputs: Any, output: Any) -> None:
        """Add up over the tokens of each row, which tells accelerate's fillers apart from rows."""
        if getattr(output, "log_probs", None) is None:  # another call, for the logits
            return
        parts = (-output.log_probs, output.entropy, output.is_top1, output.label_mask)
        sums = torch.stack([part.detach().double().sum(dim=-1) for part in parts], dim=1)  # (B, 4)
        self._token_sums.append(self.accelerator.gather_for_metrics(sums))


class ImageCollator:
    """Makes batches of prompts with pictures and their completions.

    Args:
        reader: Reads them.
        end_ids: Ids that end a completion.
        longest: Tokens of the model's context; `None` without a limit.
    """

    def __init__(self, reader: ImageReader, end_ids: Sequence[int], longest: int | None = None) -> None:
        self._reader, self._end_ids, self._longest = reader, end_ids, longest

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, Tensor]:
        """Make a batch of `B` rows.

        Returns:
            `input_ids`, `attention_mask` and `labels` (-100 at prompts and padding), each `(B, L)`, padded on the
            right; and the pictures as the model's processor hands them over, if there are any.
        """
        encoded = [self._encode(row) for row in rows]
        padding: int = self._reader.tokenizer.pad_token_id
        ids, mask = pad_rows([[*prompt, *answer] for prompt, answer in encoded], padding)
        labels, _ = pad_rows([[-100] * len(prompt) + answer for prompt, answer in encoded], -100)
        batch = {"input_ids": ids, "attention_mask": mask, "labels": labels}
        return batch | self._reader.network_fields(ids, list(map(self._reader.pixels, rows)))

    def text_ids(self, row: dict[str, Any]) -> list[int]:
        """Token ids of a row without those that stand for pictures."""
        prompt, answer = self._encode(row)
        return self._reader.without_images([*prompt, *answer])

    def check(self, dataset: Any, name: str) -> None:
        """Check rows before they are trained on; those of a stream are checked as they come.

        Args:
            dataset: Rows.
            name: What the message calls them.

        Raises:
            ValueError: If a row cannot be used, or none has pictures.
        """
        if not isinstance(dataset, Dataset):
            return
        if not image_columns(dataset.column_names):
            raise ValueError(
                f"A processor is given, but the {name} rows have no column `images` or `image`: they have "
                f"{dataset.column_names}. Add one (an empty list where a row has no picture), or give the processor's "
                "`tokenizer`."
            )
        for index, row in enumerate(dataset):
            try:
                self._encode(row)
            except BadRow as problem:
                raise ValueError(f"The prompt of row {index} of the {name} rows {problem}.") from problem

    def _encode(self, row: dict[str, Any]) -> tuple[list[int], list[int]]:
        if not isinstance(row.get("completion"), list):
            raise BadRow("has no chat as `completion`. Rows with pictures have `prompt` and `completion`, both chats")
        prompt_ids, [answer] = self._reader.encode_answers(row, [row["completion"]], self._end_ids)
        length = len(prompt_ids) + len(answer)
        if self._longest is not None and length > self._longest:
            raise BadRow(
                f"has {length} tokens with its pictures and completion, but the model's context is {self._longest}. "
                "Make the pictures smaller, or shorten or remove such rows"
            )
        return prompt_ids, answer


def _image_collator(
    processing_class: ProcessorMixin,
    model: Any = None,
    args: Any = None,
    train_dataset: Any = None,
    eval_dataset: Any = None,
    **others: Any,
) -> ImageCollator:
    """Check what a trainer that sees pictures is given, and make what makes its batches."""
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"`processing_class` is a processor, but `model` is a {type(model).__name__}. Give a loaded model: "
            "that of `load_image_model` (`rlhf_recipes.models`)."
        )
    check_model_type(model)
    if args is None or args.max_length is not None:
        raise ValueError(
            "Rows with pictures are not cut: a picture has many tokens, and without some of them it is none. Set "
            "`max_length: null` (`max_length=None`)."
        )
    reader = ImageReader(processing_class, model)
    collator = ImageCollator(reader, end_token_ids(model, reader.tokenizer), context_length(model))
    evals = eval_dataset if isinstance(eval_dataset, dict) else {"eval": eval_dataset}
    for name, dataset in {"train": train_dataset, **evals}.items():
        collator.check(dataset, name)
    return collator


def _ids_of(row: dict[str, Any]) -> list[int]:
    ids: list[int] = row["input_ids"]
    return ids


def evaluate_completions(trainer: CompletionTrainer) -> dict[str, Any]:
    """Measure how well a model predicts the held-out completions of its trainer.

    Args:
        trainer: The trainer; its `eval_dataset` holds the rows.

    Returns:
        `loss`, TRL's `eval_loss` in nats per token; `perplexity`, its exponential; `n`, the number of rows; and, where
        `loss_interval` gives one, the 95 % intervals `loss_ci` and `perplexity_ci` [low, high].
    """
    loss, rows = trainer.evaluate()["eval_loss"], cast("Sized", trainer.eval_dataset)
    evaluation: dict[str, Any] = {"loss": loss, "perplexity": math.exp(loss), "n": len(rows)}
    interval = trainer.loss_interval()
    if interval is not None:
        evaluation |= {"loss_ci": list(interval), "perplexity_ci": [math.exp(end) for end in interval]}
    return evaluation


def completions_table(evaluation: dict[str, Any]) -> str:
    """Lay out what `evaluate_completions` gives, as text for the console.

    Example:
        >>> print(completions_table({"loss": 1.5, "perplexity": 4.48, "n": 158, "loss_ci": [1.4, 1.6]}))
        158 held-out rows               95 % interval
        loss (nats per token)  1.5000  [1.4000, 1.6000]
        perplexity              4.480
    """
    rows = [[f"{evaluation['n']:,} held-out rows", "", "95 % interval"]]
    for name, title, spec in (("loss", "loss (nats per token)", ".4f"), ("perplexity", "perplexity", ".3f")):
        interval = evaluation.get(f"{name}_ci")
        cells = [] if interval is None else [f"[{interval[0]:{spec}}, {interval[1]:{spec}}]"]
        rows.append([title, f"{evaluation[name]:{spec}}", *cells])
    return table(rows)
