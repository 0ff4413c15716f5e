"""Score texts with a saved reward model, in the format that it was trained on."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from peft import PeftModel
from safetensors import safe_open
from transformers import AutoTokenizer

from rlhf_recipes.data.chat_templates import encode_prompt, end_token_ids
from rlhf_recipes.data.context import context_length
from rlhf_recipes.models.adapters import CONFIG, WEIGHTS, base_to_load, is_adapter, read_config
from rlhf_recipes.models.loading import load_new_classifier
from rlhf_recipes.models.readout import Readout
from rlhf_recipes.models.reward import load_reward_model
from rlhf_recipes.reward_modeling.evaluation import score_sequences
from rlhf_recipes.rewards.encoding import encode, is_encoder

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


class Encoded(NamedTuple):
    """Token ids of a prompt with its completion.

    Args:
        ids: All of them.
        start: Position of the completion's first token.
        length: Tokens of the completion, those around it (an end token) included.
    """

    ids: list[int]
    start: int
    length: int


class DivergedError(ValueError):
    """Scores that are not finite.

    Args:
        scores: All that were read.
    """

    def __init__(self, scores: NDArray[np.float64]) -> None:
        self.bad, self.n = int((~np.isfinite(scores)).sum()), len(scores)
        super().__init__(f"{self.bad} of {self.n} scores are not finite: the reward model diverged.")


class Scorer:
    """A reward model with its tokenizer, and the way in which its score is read.

    Args:
        model: A model for sequence classification with one output, an encoder or a decoder.
        tokenizer: Its tokenizer.
        readout: Which of the head's numbers count, with the gain and bias of the normalisation.
        max_length: Most tokens of prompt and completion; `None` takes the model's context.
        batch_size: Texts per forward pass.
        end_ids: Ids that end an answer in the chat template, beside those that the model and the tokenizer name.

    Raises:
        ValueError: If the tokenizer has no padding token.
    """

    end_ids: Collection[int] = ()

    def __init__(
        self,
        model: PreTrainedModel | PeftModel,
        tokenizer: PreTrainedTokenizerBase,
        readout: Readout | None = None,
        max_length: int | None = None,
        batch_size: int = 32,
        end_ids: Collection[int] = (),
    ) -> None:
        if tokenizer.pad_token_id is None:
            raise ValueError("The reward model's tokenizer has no padding token. Set `pad_token` and save it again.")
        module: Any = model
        self._base = module.get_base_model() if isinstance(model, PeftModel) else module
        # TRL writes the choice of a padding token into the tokenizer, not into the base's configuration.
        self._base.config.get_text_config().pad_token_id = tokenizer.pad_token_id
        self.model, self.tokenizer, self.readout = model.eval(), tokenizer, readout or Readout()
        self.encoder = is_encoder(self._base)
        if not self.encoder:
            read_in_float32(self._base)
            self.end_ids = {*end_ids, *end_token_ids(self._base, tokenizer)}
        limits = (max_length, context_length(self._base), tokenizer.model_max_length)
        self.max_length, self.batch_size = min(limit for limit in limits if limit is not None), batch_size

    def encode(self, prompt: Any, completion: Any, **options: Any) -> Encoded:
        """Tokenize a prompt (text or chat) with a finished completion of the same kind, as in training.

        Args:
            prompt: The prompt.
            completion: The completion.
            **options: The row's options for its chat template, from `options_of`.
        """
        ids, start = encode(self.tokenizer, prompt, completion, encoder=self.encoder, end_ids=self.end_ids, **options)
        return Encoded(ids, start, len(ids) - (start or self._prompt_length(prompt, **options)))

    def encoded(self, ids: Sequence[int], prompt: Any, **options: Any) -> Encoded:
        """Take the token ids of a whole sequence as they are; `prompt` and `options` are those of `encode`."""
        length = min(self._prompt_length(prompt, **options), len(ids) - 1)
        return Encoded(list(ids), length, len(ids) - length)

    def _prompt_length(self, prompt: Any, **options: Any) -> int:
        if not prompt:
            return 0
        if self.encoder and isinstance(prompt, str):
            return len(self.tokenizer(prompt, add_special_tokens=False)["input_ids"])
        return len(encode_prompt(self.tokenizer, prompt, **({} if self.encoder else options)))

    def fits(self, text: Encoded) -> bool:
        """Return whether a text fits into the model's context."""
        return len(text.ids) <= self.max_length

    def finite_scores(self, rows: Sequence[Encoded]) -> NDArray[np.float64]:
        """Score as `score` does.

        Raises:
            DivergedError: If a score is not finite.
        """
        scores = self.score(rows)
        if not np.isfinite(scores).all():
            raise DivergedError(scores)
        return scores

    def score(self, rows: Sequence[Encoded]) -> NDArray[np.float64]:
        """Score texts that fit.

        Args:
            rows: `N` encoded texts.

        Returns:
            Raw scores, without gain and bias, shape `(N,)`.
        """
        order = sorted(range(len(rows)), key=lambda index: len(rows[index].ids))  # alike in length: little padding
        ordered = [rows[index] for index in order]
        scores = score_sequences(
            self.model,
            [row.ids for row in ordered],
            self.batch_size,
            self.readout.readout,
            [row.start for row in ordered],
        )
        result = np.empty(len(rows))
        result[order] = scores.double().numpy()
        return result


def read_in_float32(model: Any) -> None:
    """Let the head of a decoder compute in float32, as PPO reads it: bfloat16 has three digits, and makes ties."""
    model.score.float()
    if _to_float32 not in model.score._forward_pre_hooks.values():
        model.score.register_forward_pre_hook(_to_float32)


def _to_float32(module: Any, args: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(value.float() for value in args)


def load_scorer(
    model_name_or_path: str | None,
    reward_adapter: str | None = None,
    max_length: int | None = None,
    batch_size: int = 32,
    **options: Any,
) -> Scorer:
    """Load a reward model: an adapter with its head on a base, or a whole model (decoder or encoder) by path.

    Args:
        model_name_or_path: The base of the adapter; without one the reward model itself, which may be the folder of an
            adapter on the base that it names.
        reward_adapter: Folder of the adapter that the reward stage saved.
        max_length: Most tokens of prompt and completion; `None` takes the model's context.
        batch_size: Texts per forward pass.
        **options: Those of `load_sequence_classifier`.

    Returns:
        The scorer, with the tokenizer that was saved with the reward model.

    Raises:
        FileNotFoundError: If a folder does not exist or holds no adapter.
        ValueError: If the adapter belongs to another base, or weights of the head are missing.
    """
    if reward_adapter is None and is_adapter(str(model_name_or_path)):
        reward_adapter = str(model_name_or_path)
        model_name_or_path = base_to_load(reward_adapter)
    if reward_adapter is None:
        model, tokenizer = load_reward_model(str(model_name_or_path or ""), **options)
        return Scorer(model, tokenizer, Readout.load(str(model_name_or_path)), max_length, batch_size)
    _check_adapter(reward_adapter)
    base, missing = load_new_classifier(model_name_or_path, **options)
    config = read_config(reward_adapter, base)
    with safe_open(str(Path(reward_adapter, WEIGHTS)), framework="pt") as weights:
        saved = {key.removeprefix("base_model.model.") for key in weights.keys()}  # noqa: SIM118  # not a mapping
    if missing - saved:
        raise ValueError(
            f"The adapter in {reward_adapter!r} does not hold {min(missing - saved)!r}, so its score would be random. "
            "Train reward models with LoRA's `task_type='SEQ_CLS'`, which is the type that saves the head."
        )
    if not is_encoder(base):
        read_in_float32(base)  # before the saved head is copied into it
    # The adapter stays beside the base, in layers like PPO's: merged, or rounded elsewhere, it would score otherwise.
    adapted = PeftModel.from_pretrained(base, reward_adapter, config=config)
    own = Path(reward_adapter, "tokenizer_config.json").is_file()
    tokenizer = AutoTokenizer.from_pretrained(reward_adapter if own else model_name_or_path)
    ends = end_token_ids(reward_adapter, tokenizer)  # those of the stage, whatever its base has become since
    return Scorer(adapted, tokenizer, Readout.load(reward_adapter), max_length, batch_size, ends)


def _check_adapter(folder: str) -> None:
    if not is_adapter(folder):
        raise FileNotFoundError(f"{folder!r} holds no adapter ({CONFIG}). Give the output folder of a reward stage.")
    if not Path(folder, WEIGHTS).is_file():
        raise FileNotFoundError(f"{folder!r} has no {WEIGHTS}. Weights are read from safetensors files only.")
