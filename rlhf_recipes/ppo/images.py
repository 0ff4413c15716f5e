"""TRL's engine for prompts with pictures: it sees chats and token ids, and the networks read embeddings."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from datasets import Dataset
from trl import GRPOTrainer

from rlhf_recipes.models.image_embeddings import pad_prompts
from rlhf_recipes.models.images import ImageReader

if TYPE_CHECKING:
    from rlhf_recipes.models.image_embeddings import EmbeddedPrompt
    from rlhf_recipes.models.rows import Texts

_PIXELS = "pixels"  # among the fields that TRL hands from the tokenization to the generation


class ImageTrainer(GRPOTrainer):
    """`GRPOTrainer` whose prompts may have pictures.

    TRL gets a tokenizer and no column of pictures: they lie in the messages of the prompts.

    Attributes:
        image_reader: What reads chats with pictures; `None` for prompts without.
    """

    image_reader: ImageReader | None = None

    def chats_of(self, rows: Sequence[Mapping[str, Any]]) -> Any:
        """Rows whose prompts hold their pictures; without a processor the rows as they are."""
        return rows if self.image_reader is None else self.image_reader.rows(rows)

    def embedded_prompts(
        self, prompt_ids: list[list[int]], chats: Sequence[Mapping[str, Any]]
    ) -> list[EmbeddedPrompt] | None:
        """Prompts as embeddings; `None` without a processor."""
        if self.image_reader is None:
            return None
        return self.embed_tokenized(prompt_ids, self._tokenize_prompts([row["prompt"] for row in chats])[2])

    def with_pictures(self, texts: Texts, chats: Sequence[Mapping[str, Any]]) -> Texts:
        """Give texts their prompts as embeddings, where there is a processor."""
        rows = zip(texts.prompt_ids, texts.prompt_mask.bool(), strict=True)
        return replace(texts, **pad_prompts(self.embedded_prompts([ids[mask].tolist() for ids, mask in rows], chats)))

    def saved_with(self) -> tuple[Any, Sequence[Any]]:
        """What is saved beside the policy: tokenizer or processor; prompts to try it out on, none with pictures."""
        if self.image_reader is not None:
            return self.image_reader.processor, []
        rows: Any = self.train_dataset
        return self.processing_class, rows["prompt"] if isinstance(rows, Dataset) else []

    def embed_tokenized(self, prompt_ids: list[list[int]], fields: Mapping[str, Any]) -> list[EmbeddedPrompt] | None:
        """Prompts as embeddings, from what `_tokenize_prompts` returned; `None` without a processor."""
        if self.image_reader is None:
            return None
        with self.accelerator.autocast():
            return self.image_reader.embed(prompt_ids, fields[_PIXELS])

    def _tokenize_prompts(self, prompts: list[Any]) -> Any:
        if self.image_reader is None:
            return super()._tokenize_prompts(prompts)
        template: Any = self.chat_template_kwargs  # TRL types it as text too
        ids, pixels = self.image_reader.encode(prompts, **template)
        return ids, None, {_PIXELS: pixels}
