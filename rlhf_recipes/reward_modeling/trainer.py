"""TRL's reward trainer with more to learn from: ties, soft labels, rankings, choices, ratings, targets per token."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import torch
from datasets import Dataset
from torch import Tensor, nn
from transformers import GenerationConfig, ProcessorMixin
from trl import RewardTrainer

from rlhf_recipes.checkpoints import KeptRates, load_finished
from rlhf_recipes.data.chat_templates import end_token_ids
from rlhf_recipes.data.reward_prompts import with_graded_prompts
from rlhf_recipes.messages import IMAGE_COLUMNS
from rlhf_recipes.models.adapters import name_base_absolutely
from rlhf_recipes.models.chance import disable_dropout
from rlhf_recipes.models.images import (
    ImageReader,
    check_model_type,
    check_no_images,
    check_reads_images,
)
from rlhf_recipes.models.quantized import keep_4bit_differentiable
from rlhf_recipes.models.readout import Readout, read_scores
from rlhf_recipes.models.resumed import check_same_adapter
from rlhf_recipes.models.reward import score_tokens
from rlhf_recipes.models.sharding import compute_by_autocast
from rlhf_recipes.models.trained_on import raw_score, save_with_first_rows
from rlhf_recipes.reward_modeling.collator import PreferenceCollator, sequences_of
from rlhf_recipes.reward_modeling.config import PreferenceConfig
from rlhf_recipes.reward_modeling.evaluated import EvaluatedRows
from rlhf_recipes.reward_modeling.losses import untied_margins
from rlhf_recipes.reward_modeling.objective import completion_losses, preference_objective, scatter_completions
from rlhf_recipes.reward_modeling.preparation import check_reward_prompts, with_chat_ids
from rlhf_recipes.reward_modeling.table import (
    check_rows,
    drop_ties,
    is_table,
    prompt_lengths,
    to_whole_texts,
    token_labels,
    with_completion_ids,
)
from rlhf_recipes.tracking.console import (
    LEARNING_RATE,
    LOSS,
    Column,
    ConsoleProgress,
    QuietModelCard,
    show_progress,
)

if TYPE_CHECKING:
    from collections.abc import Iterator

    from transformers import PreTrainedTokenizerBase

    from rlhf_recipes.reward_modeling.config import PreferenceConfig

_TARGETS = ("label", "margin", "ranks", "best", "ratings", "token_labels")


class PreferenceTrainer(QuietModelCard, RewardTrainer):
    """Trains a reward model on the preference table, or on TRL's rows with `chosen` and `rejected`.

    `PreferenceConfig.objective` says what is learned. All completions of a prompt are one element of a batch: each is
    scored once, and `per_device_train_batch_size` counts prompts. The loss is the mean over the prompts of an
    optimizer step, however they are cut into micro-batches.

    With a processor as `processing_class` it sees pictures: rows are chats with `prompt` and `images`, or `image`, and
    the model is `load_image_classifier`'s with LoRA on its language part (`language_layers`).

    Rows may have a column `reward_prompt`, which is then read in place of `prompt`; PPO will ask for it too.
    Rows with `chosen` and `rejected` may have a column `label`, the probability that `chosen` wins (missing: 1). With
    neither that nor another setting of `PreferenceConfig` changed, everything is TRL's own, to the last bit.

    Args:
        args: The configuration.
        **kwargs: The other arguments of `trl.RewardTrainer`.

    Raises:
        TypeError: If `args` is no `PreferenceConfig`, or streamed rows are to be learned in another way than TRL's.
        ValueError: If a row does not fit the objective (it names the row and the fix), the model's 4-bit weights are
            repacked, or it cannot read the pictures.

    Attributes:
        image_reader: What reads chats with pictures; `None` with a tokenizer.
    """

    args: PreferenceConfig

    def __init__(self, *, args: PreferenceConfig, **kwargs: Any) -> None:
        if not isinstance(args, PreferenceConfig):
            raise TypeError(f"`args` must be a PreferenceConfig, got {type(args).__name__}: it says what is learned.")
        self._given_model = kwargs.get("model")  # TRL prepares the rows before it keeps the model
        self.image_reader: ImageReader | None = None
        if isinstance(kwargs.get("processing_class"), ProcessorMixin):
            self.image_reader = _image_reader(kwargs["processing_class"], self._given_model, args)
            kwargs["processing_class"] = self.image_reader.tokenizer
        self._readout = Readout(args.readout, reward_prompt=check_reward_prompts(**kwargs))
        super().__init__(args=args, **kwargs)
        compute_by_autocast(self)
        own: Any = self.model
        if self.image_reader is not None:
            check_reads_images(own)
        keep_4bit_differentiable(own)
        if args.disable_dropout:
            disable_dropout(own)  # TRL leaves on what is no module
        self.add_callback(KeptRates())
        show_progress(self, ConsoleProgress([LOSS, Column("accuracy", "accuracy"), LEARNING_RATE]))
        self._prompts_in_step = 0
        self._evaluated = EvaluatedRows(self.accelerator)
        config, own_collator = args, kwargs.get("data_collator")
        evals = self.eval_dataset if isinstance(self.eval_dataset, dict) else {"eval": self.eval_dataset}
        rows = [dataset for dataset in (self.train_dataset, *evals.values()) if dataset is not None]
        # TRL's batches, and with them its loss, unless something is asked for that they cannot say.
        plain = self.image_reader is None and all(_is_trl(dataset, config) for dataset in rows)
        if own_collator is None and not plain:
            collator: Any = self.data_collator
            self.data_collator = PreferenceCollator(
                pad_token_id=collator.pad_token_id,
                objective=config.objective,
                per_token=_per_token(config),
                pad_to_multiple_of=collator.pad_to_multiple_of,
                images=self.image_reader,
            )

    def train(self, resume_from_checkpoint: Any = None, *args: Any, **kwargs: Any) -> Any:
        """Train as TRL does; a checkpoint of the last step is loaded, and no further step is made."""
        path = resume_from_checkpoint if isinstance(resume_from_checkpoint, str) else None
        return load_finished(self, path) or super().train(resume_from_checkpoint, *args, **kwargs)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        check_same_adapter(resume_from_checkpoint, self.model)
        super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _prepare_dataset(
        self, dataset: Any, processing_class: PreTrainedTokenizerBase, args: Any, dataset_name: str
    ) -> Any:
        """Check the rows against the objective, and tokenize them: texts as TRL does, chats as PPO reads them."""
        ends = end_token_ids(self._given_model, processing_class)
        if self.image_reader is None:
            check_no_images(dataset, dataset_name)
        dataset = with_graded_prompts(dataset)
        if _is_trl(dataset, args):
            if isinstance(dataset, Dataset):
                check_rows(dataset, args, dataset_name)
            dataset = with_chat_ids(dataset, processing_class, ends, dataset_name, self.image_reader)
            return super()._prepare_dataset(dataset, processing_class, args, dataset_name)
        if not isinstance(dataset, Dataset):
            raise TypeError(
                f"The {dataset_name} rows are a {type(dataset).__name__}. Streamed rows can only be `chosen` and "
                "`rejected` without `label`, with the default settings of the loss. Load them whole."
            )
        if "prompt_lengths" in dataset.column_names:
            return dataset  # prepared before
        dataset = check_rows(dataset, args, dataset_name)
        dataset = with_chat_ids(dataset, processing_class, ends, dataset_name, self.image_reader)
        if is_table(dataset.column_names):
            dataset = self._tokenized(dataset, processing_class, args, dataset_name)
        else:
            dataset = super()._prepare_dataset(dataset, processing_class, args, dataset_name)
        if dataset_name == "train":
            dataset = drop_ties(dataset, args)
        if _per_token(args):
            dataset = dataset.add_column("prompt_lengths", prompt_lengths(dataset, processing_class))
        if args.objective == "token":
            labels = token_labels(dataset, processing_class, args.token_loss)
            left = [column for column in dataset.column_names if column != "token_labels"]
            dataset = dataset.select_columns(left).add_column("token_labels", labels)
        return dataset

    def _tokenized(
        self, dataset: Dataset, processing_class: PreTrainedTokenizerBase, args: PreferenceConfig, dataset_name: str
    ) -> Dataset:
        """Give each row of the preference table the token ids of its completions, and leave out those too long."""
        saved_ids = dataset["completion_ids"] if "completion_ids" in dataset.column_names else None
        if saved_ids is None or any(ids is None for ids in saved_ids):
            unlimited = copy.copy(args)
            unlimited.max_length = None  # a row is left out whole, not two texts of it
            texts = super()._prepare_dataset(to_whole_texts(dataset), processing_class, unlimited, dataset_name)
            tokenized = with_completion_ids(dataset, texts, processing_class.eos_token_id)
            groups = [
                own or new
                for own, new in zip(saved_ids or tokenized["completion_ids"], tokenized["completion_ids"], strict=True)
            ]
            dataset = tokenized.remove_columns("completion_ids").add_column("completion_ids", groups)
        if args.max_length is None:
            return dataset
        limit = args.max_length
        return dataset.filter(lambda row: all(len(ids) <= limit for ids in row["completion_ids"]))

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        names: Any = self._signature_columns
        names += [
            name for name in ("completion_ids", "prompt_lengths", *IMAGE_COLUMNS, *_TARGETS) if name not in names
        ]

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list[Any], Any]:
        """Count the prompts of an optimizer step, so that each of them gets the same weight in its loss."""
        batches, items = super().get_batch_samples(epoch_iterator, num_batches, device)
        self._prompts_in_step = sum(len(batch["group_mask"]) for batch in batches if "group_mask" in batch)
        return batches, items

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        """Loss of a batch, as the configuration asks for it; TRL's own where it asks for nothing else."""
        if "group_mask" not in inputs:
            return self._trl_loss(model, inputs, return_outputs, num_items_in_batch)
        mask = inputs["group_mask"]
        outputs, raw, token_scores = self._scores(model, inputs)
        scores = scatter_completions(raw, mask)
        loss = preference_objective(self.args, inputs, scores, token_scores)
        if model.training:
            self._record(inputs, raw.detach(), scores.detach())
            # The trainer divides by the number of micro-batches, as if they were of one size.
            loss = loss * (len(mask) * self.current_gradient_accumulation_steps / self._prompts_in_step)
        else:
            losses = None if token_scores is None else completion_losses(self.args, inputs, token_scores)
            self._evaluated.add(inputs, scores, losses)
        return (loss, outputs) if return_outputs else loss

    def _scores(self, model: nn.Module, inputs: dict[str, Any]) -> tuple[Any, Tensor, Tensor | None]:
        """Run the model: its output, the scores of all completions `(S,)`, and those at their tokens `(S, T)`."""
        call = {"input_ids": inputs["input_ids"], "attention_mask": inputs["attention_mask"], "use_cache": False}
        if self.image_reader is not None:
            call |= {name: inputs[name] for name in self.image_reader.fields if name in inputs}
        if "completion_mask" not in inputs:
            outputs = model(**call)
            return outputs, outputs.logits.squeeze(-1).float(), None
        outputs, token_scores = score_tokens(model, self.accelerator.unwrap_model(model), call)
        return outputs, read_scores(token_scores, inputs["completion_mask"], self.args.readout), token_scores

    def _trl_loss(self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool, num_items: Any) -> Any:
        """TRL's own loss; in evaluation the rows are kept, to be measured together."""
        if model.training:
            return super().compute_loss(model, inputs, return_outputs, num_items)
        loss, outputs = super().compute_loss(model, inputs, True, num_items)
        scores = torch.stack(outputs.logits.squeeze(-1).float().chunk(2), dim=1)  # chosen and rejected
        rows = {"group_mask": torch.ones_like(scores), "label": torch.ones_like(scores[:, 0])}
        rows["ranks"] = torch.tensor([-1.0, 0.0], device=scores.device).expand_as(scores)
        rows["margin"] = inputs.get("margin", torch.full_like(scores[:, 0], torch.nan)).float()
        self._evaluated.add(rows, scores)
        return (loss, outputs) if return_outputs else loss

    def evaluation_loop(
        self,
        dataloader: Any,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> Any:
        """Evaluate, and log the metrics of all rows together in place of means of the batches' means."""
        self._evaluated = EvaluatedRows(self.accelerator)
        output = super().evaluation_loop(dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix)
        metrics: Any = output.metrics
        for name, value in self._evaluated.summary(self.args).items():
            if name == "loss":
                metrics[f"{metric_key_prefix}_loss"] = value
            else:
                self._metrics["eval"][name] = [value]
        return output

    def _record(self, inputs: dict[str, Any], raw: Tensor, scores: Tensor) -> None:
        """Log TRL's metrics of a batch: rewards over all completions, accuracy and margin over all untied pairs."""
        metrics = self._metrics["train"]
        self._total_train_tokens += int(self.accelerator.gather(inputs["attention_mask"].sum()).sum())
        metrics["num_tokens"] = [self._total_train_tokens]
        margins = untied_margins(scores, inputs["ranks"], inputs["group_mask"]) if "ranks" in inputs else raw[:0]
        # Sums, because processes have different numbers of completions and of untied pairs.
        sums = torch.stack([raw.sum(), raw.new_tensor(len(raw)), margins.sum(), (margins > 0).sum(), _size(margins)])
        total, count, lead, right, pairs = self.accelerator.gather(sums[None]).sum(dim=0).tolist()
        ends = self.accelerator.gather(torch.stack([-raw.min(), raw.max()])[None]).amax(dim=0).tolist()
        metrics["min_reward"].append(-ends[0])
        metrics["mean_reward"].append(total / count)
        metrics["max_reward"].append(ends[1])
        if pairs:
            metrics["accuracy"].append(right / pairs)
            metrics["margin"].append(lead / pairs)

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        name_base_absolutely(self.accelerator.unwrap_model(self.model))
        super()._save(output_dir, state_dict)
        tokenizer: Any = self.processing_class
        ends = end_token_ids(self.model, tokenizer)  # a classifier alone does not say how answers end
        if len(ends) > 1:
            GenerationConfig(eos_token_id=ends).save_pretrained(output_dir or str(self.args.output_dir))
        folder = output_dir or str(self.args.output_dir)
        reader = self.image_reader
        if reader is None:
            save_with_first_rows(self, folder, lambda row: sequences_of(row)[0], raw_score)
        else:
            reader.processor.save_pretrained(folder)
            save_with_first_rows(self, folder, lambda row: reader.without_images(sequences_of(row)[0]), raw_score)
        if self._readout != Readout():
            self._readout.save(folder)


def _image_reader(processor: ProcessorMixin, model: Any, config: PreferenceConfig) -> ImageReader:
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"`processing_class` is a processor, but `model` is a {type(model).__name__}. Give the model that "
            "`load_image_classifier` (`rlhf_recipes.models`) loads."
        )
    if _per_token(config):
        raise ValueError(
            "With a processor, which puts many tokens in the place of a picture, scores are read at the last token. "
            "Set `readout: last`, and another `objective` than 'token'."
        )
    check_model_type(model)
    return ImageReader(processor, model)


def _per_token(config: PreferenceConfig) -> bool:
    return config.readout != "last" or config.objective == "token"


def _is_trl(dataset: Any, config: PreferenceConfig) -> bool:
    columns = dataset.column_names or []
    return config.is_plain and not is_table(columns) and "label" not in columns


def _size(margins: Tensor) -> Tensor:
    return margins.new_tensor(margins.numel())
