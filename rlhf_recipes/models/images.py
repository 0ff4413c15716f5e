"""Pictures in prompts, which the language part of a vision-language model reads as embeddings in the place of tokens.

Vision tower and projector are frozen and carry no adapter. What they make of a picture is then the same for policy,
reference and critic and after every update, so that it is computed once for a rollout. From there on a prompt is a
row of embeddings, with positions where these are not counted (Qwen-VL's are on a grid), and marks at the tokens of a
picture where these attend to each other (Gemma 3).

`B` prompts, `P` prompt tokens, `H` hidden size.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Collection, Mapping, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor
from transformers import ProcessorMixin
from trl import prepare_multimodal_messages

from rlhf_recipes.data.chat_templates import encode_answer, options_of
from rlhf_recipes.data.dialogues import BadRow
from rlhf_recipes.messages import IMAGE_COLUMNS, image_columns
from rlhf_recipes.models.image_embeddings import (
    EmbeddedPrompt,
    Pixels,
    embed_prompts,
    join_pixels,
    token_types,
)
from rlhf_recipes.models.vision import language_part

if TYPE_CHECKING:
    from PIL.Image import Image

# Dimensions of pixels that a processor (Idefics3's) lays out by text: of a single one, pictures come first
_NESTED = 5
# What is not here was not tried, or reads more than this: features in deeper layers (Qwen3-VL), attention in both
# directions in the whole prompt (PaliGemma).
MODEL_TYPES = ("llava", "qwen2_vl", "qwen2_5_vl", "idefics3", "smolvlm", "internvl", "gemma3")


def check_no_images(dataset: Any, name: str) -> None:
    """Refuse pictures where they would be left out without a word.

    Args:
        dataset: Rows.
        name: What the message calls them.

    Raises:
        ValueError: If they have a column of pictures.
    """
    if found := image_columns(dataset.column_names):
        raise ValueError(
            f"The {name} rows have the column {found[0]!r}, but this stage reads text and sees no pictures. Remove "
            "it, and write what is to be known of the pictures into the texts (`reward_prompt` for reward models)."
        )


def check_reads_images(model: Any) -> None:
    """Check that prompts with pictures can be read as embeddings, and that no adapter changes what these are.

    Args:
        model: The policy, or a reward model.

    Raises:
        ValueError: If it is of another kind, is trained as a whole, or has an adapter outside of its language part.
    """
    base: Any = check_model_type(model)
    if not isinstance(model, PeftModel):
        raise ValueError(
            "A vision-language model is trained with LoRA on its language part, since all roles share its frozen "
            "vision tower. Give `peft_config=LoraConfig(target_modules=language_layers(model), ...)` "
            "(`rlhf_recipes.models`)."
        )
    inside = f"{language_part(base)[0]}."
    for name, module in base.named_modules():
        if isinstance(module, BaseTunerLayer) and not name.startswith(inside):
            raise ValueError(
                f"An adapter is on {name!r}, outside of the language part: its pictures would look otherwise to each "
                "role. Give `target_modules=language_layers(model)` (`rlhf_recipes.models`)."
            )


def check_model_type(model: Any) -> Any:
    """Return the base of a model, with or without adapters, and refuse one that reads pictures in another way.

    Raises:
        ValueError: If its language part reads pictures in another way, or not at all.
    """
    base: Any = model.get_base_model() if isinstance(model, PeftModel) else model
    if base.config.model_type not in MODEL_TYPES:
        raise ValueError(
            f"A processor is given, but {type(base).__name__} (`model_type: {base.config.model_type}`) does not read "
            f"pictures in a way that is known here. Pictures work with {', '.join(MODEL_TYPES)}; for prompts "
            "without pictures give the processor's `tokenizer`."
        )
    return base


class ImageReader:
    """Read chats with pictures: token ids, pixels, embeddings.

    Args:
        processor: The model's processor.
        model: The model, with or without adapters.
    """

    def __init__(self, processor: ProcessorMixin, model: Any) -> None:
        self.processor: Any = processor
        self._model: Any = model.get_base_model() if isinstance(model, PeftModel) else model

    @cached_property
    def tokenizer(self) -> Any:
        """A copy of the processor's tokenizer that has the processor's chat template."""
        tokenizer = copy.deepcopy(self.processor.tokenizer)
        tokenizer.chat_template = self.processor.chat_template or tokenizer.chat_template
        return tokenizer

    @property
    def fields(self) -> tuple[str, ...]:
        """Names of what a network takes beside token ids, as `network_fields` makes them."""
        return self._of_pictures if self._types is None else (*self._of_pictures, self._types)

    @cached_property
    def _types(self) -> str | None:
        return token_types(self._model)

    @cached_property
    def _of_pictures(self) -> tuple[str, ...]:
        taken = inspect.signature(self._model.base_model.forward).parameters
        return tuple(name for name in self.processor.image_processor.model_input_names if name in taken)

    def pixels(self, row: Mapping[str, Any]) -> Pixels | None:
        """Pixels of the pictures of a row, and their sizes where the model needs these; `None` without a picture.

        Raises:
            BadRow: If one cannot be read.
        """
        shown = [{"type": "image", "image": image} for image in images_of(row)]
        return self.encode([[{"role": "user", "content": shown}]])[1][0] if shown else None

    def _taken(self, encoded: Mapping[str, Tensor]) -> Pixels | None:
        fields = {name: encoded[name] for name in self._of_pictures if name in encoded}
        nested = fields and fields["pixel_values"].dim() == _NESTED
        return {name: values.movedim(1, 0) if nested else values for name, values in fields.items()} or None

    def network_fields(self, input_ids: Tensor, pixels: Sequence[Pixels | None]) -> dict[str, Tensor]:
        """What a network is called with beside token ids, to read pictures as its processor hands them over.

        Args:
            input_ids: Token ids of texts, shape `(B, L)`.
            pixels: The pixels of their pictures.

        Returns:
            Nothing without a picture.
        """
        given = [row for row in pixels if row is not None]
        if not given:
            return {}
        types = {} if self._types is None else {self._types: (input_ids == self._image_token).long()}
        return join_pixels(given) | types

    @property
    def _image_token(self) -> int:
        token: int = self._model.config.image_token_id
        return token

    def without_images(self, ids: Sequence[int]) -> list[int]:
        """Token ids without those that stand for pictures."""
        return [token for token in ids if token != self._image_token]

    def rows(self, rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
        """Put the pictures of rows into the messages of their prompts, in RGB, and leave their column out."""
        return [
            {name: value for name, value in row.items() if name not in IMAGE_COLUMNS}
            | {"prompt": chat_with_images(row)}
            for row in rows
        ]

    def encode(self, prompts: Sequence[Any], **template: Any) -> tuple[list[list[int]], list[Pixels | None]]:
        """Encode chats as the processor does, for generation.

        Args:
            prompts: `B` chats as `rows` makes them.
            template: Further arguments of the chat template.

        Returns:
            For each the token ids, with as many image tokens as a picture has features, and the pixels of its
            pictures, or `None` without one.

        Raises:
            BadRow: If the processor refuses a chat (a text names the image token, for which there is no picture), or a
                picture is at its end.
        """
        options: dict[str, Any] = {"tokenize": True, "return_dict": True, "return_tensors": "pt", **template}
        try:
            encoded = [
                self.processor.apply_chat_template(
                    prepare_multimodal_messages(chat), add_generation_prompt=True, **options
                )
                for chat in prompts
            ]
        except (IndexError, StopIteration, ValueError) as error:  # an image token in a text asks for one more picture
            raise BadRow(f"cannot be read by the processor ({type(error).__name__}: {error})") from error
        prompt_ids = [each["input_ids"][0].tolist() for each in encoded]
        if any(ids[-1] == self._image_token for ids in prompt_ids):
            raise BadRow("ends with a picture: the chat template writes nothing behind it that asks for an answer")
        return prompt_ids, list(map(self._taken, encoded))

    def encode_answers(
        self, row: Mapping[str, Any], answers: Sequence[Any], end_ids: Collection[int]
    ) -> tuple[list[int], list[list[int]]]:
        """Encode the prompt of a row with its pictures, and answers to it, as PPO reads them.

        Args:
            row: `prompt`, a chat, and its pictures.
            answers: Lists of messages.
            end_ids: Ids that end a completion of the policy.

        Returns:
            Token ids of the prompt, and those of each answer up to and with its end token.

        Raises:
            BadRow: If there is no prompt, it cannot be read with its pictures, or an answer has the image token.
            ValueError: As of `encode_answer`.
        """
        if not row.get("prompt"):
            raise BadRow("is missing, and pictures belong to one. Give rows a column `prompt`")
        chat, options = chat_with_images(row), options_of(dict(row))
        [prompt_ids], _ = self.encode([chat], **(options["template_kwargs"] or {}))
        texts = [prepare_multimodal_messages(answer) for answer in answers]
        answer_ids = [encode_answer(self.tokenizer, chat, text, end_ids, **options).ids for text in texts]
        if any(self._image_token in ids for ids in answer_ids):
            raise BadRow("has an answer with the image token, for which there is no picture. Take it out of the text")
        return prompt_ids, answer_ids

    def embed(self, prompt_ids: Sequence[Sequence[int]], pixels: Sequence[Pixels | None]) -> list[EmbeddedPrompt]:
        """Embed prompts and their pictures, as `embed_prompts` does."""
        return embed_prompts(self._model, prompt_ids, pixels)


def chat_with_images(row: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Put the pictures of a row into its prompt's messages.

    Args:
        row: `prompt`, a chat, and `images`, a list of pictures (of PIL, or paths), or `image`, a single one.
            They fill the chat's parts of type `image` in their order; a chat of texts gets them before its first
            message of the user.

    Returns:
        Messages with their parts as lists.

    Raises:
        BadRow: If the prompt is no chat, a picture cannot be read, or they are more or fewer than their places.

    Example:
        >>> from PIL import Image
        >>> picture = Image.new("RGB", (2, 2))
        >>> [message] = chat_with_images({"prompt": [{"role": "user", "content": "Which colour?"}], "image": picture})
        >>> [part["type"] for part in message["content"]]
        ['image', 'text']
    """
    prompt, images = row["prompt"], images_of(row)
    if not isinstance(prompt, list):
        raise BadRow("is text, and pictures need a chat. Give a list of messages with `role` and `content`")
    places = sum(
        isinstance(part, Mapping) and part.get("type") == "image"
        for message in prompt
        for part in (message["content"] if isinstance(message["content"], list) else ())
    )
    if any(isinstance(message["content"], list) for message in prompt) and places != len(images):
        raise BadRow(f"has {places} places for pictures (parts of type `image`), but {len(images)} pictures")
    users = [message for message in prompt if message["role"] == "user"]
    if images and not places and not users:
        raise BadRow(f"has no message of the user that its {len(images)} pictures could go to")
    chat: list[dict[str, Any]] = prepare_multimodal_messages([_without_nulls(message) for message in prompt], images)
    return chat


def images_of(row: Mapping[str, Any]) -> list[Image]:
    """Read the pictures of a row, in RGB; what is transparent lies on white.

    Raises:
        BadRow: If one cannot be read.
    """
    given = row["images"] if row.get("images") is not None else row.get("image")
    if given is None:
        return []
    from PIL import Image, ImageOps  # it comes with what makes pictures; texts do without

    images = []
    for number, image in enumerate(given if isinstance(given, list | tuple) else [given]):
        try:
            opened = image if isinstance(image, Image.Image) else Image.open(image)  # a path: nothing is fetched
            upright = ImageOps.exif_transpose(opened).convert("RGBA")
            images.append(Image.alpha_composite(Image.new("RGBA", upright.size, "white"), upright).convert("RGB"))
        except (OSError, ValueError, TypeError, AttributeError, Image.DecompressionBombError) as error:
            raise BadRow(f"has a picture {number} that cannot be read ({type(error).__name__}: {error})") from error
    return images


def _without_nulls(message: Mapping[str, Any]) -> dict[str, Any]:
    """A message whose parts lack the keys that other parts have: Arrow fills them with null."""
    content = message["content"]
    if isinstance(content, list):
        content = [{name: value for name, value in part.items() if value is not None} for part in content]
    return {**message, "content": content}


def images_in(chat: Sequence[Mapping[str, Any]]) -> list[Any]:
    """Return the pictures in the messages of a chat, in their order."""
    parts = [part for message in chat if isinstance(message["content"], list) for part in message["content"]]
    return [part["image"] for part in parts if part["type"] == "image"]
