"""Known sets of instructions whose prompts are text: a user's message, to be read as a chat."""

from __future__ import annotations

import re
from typing import Any

from datasets import Dataset

_SETS = (
    {"response", "helpfulness"},
    {"response_1", "response_2", "preference_strength"},
    {"response_0", "response_1"},
    {"chosen", "rejected", "num_correct"},
)
_ASKED = {"context": ("response1", "response2", "overall_preference"), "instruction": ("completions",)}
_ASSISTANT = "\n\nAssistant:"
_TURN = re.compile(r"\n?<extra_id_1>(User|Assistant)\n")


def instructions_as_chats(dataset: Dataset, chat_template: Any) -> Dataset:
    r"""Turn the prompts of HelpSteer2, PKU-SafeRLHF and RewardBench 2 into chats, for a model with a chat template.

    Elsewhere text is joined as it is. There a prompt is what a user said, and a response what the assistant answers:
    joined they would read "1 + 1?Two." Answers to a chat become messages when the rows are read.

    Args:
        dataset: Rows of any kind.
        chat_template: The tokenizer's template; without one (None) all text stays text.

    Returns:
        The rows. A prompt of HelpSteer2 with marks of turns ("\n<extra_id_1>Assistant\n") becomes several messages.

    Example:
        >>> rows = Dataset.from_dict({"prompt": ["Hi"], "response": ["Hello!"], "helpfulness": [4]})
        >>> instructions_as_chats(rows, "{{ messages }}")["prompt"][:]
        [[{'role': 'user', 'content': 'Hi'}]]
    """
    names = set(dataset.column_names)
    is_text = "prompt" in names and getattr(dataset.features["prompt"], "dtype", None) in ("string", "large_string")
    if chat_template is None or not is_text or not any(columns <= names for columns in _SETS):
        return dataset
    prompts = [_messages(text) for text in dataset["prompt"]]
    return dataset.remove_columns("prompt").add_column("prompt", prompts)


def only_prompts(dataset: Dataset) -> Dataset:
    r"""Leave the prompts of HelpSteer3, UltraFeedback, Nectar and RewardBench 2 as the reward stage reads them.

    Args:
        dataset: Rows of any kind.

    Returns:
        The rows, with the column `prompt` (those of HelpSteer3 call it `context`, those of UltraFeedback
        `instruction`), without the space that ends a prompt of Nectar and begins its answers, and without the lists of
        right and wrong answers of RewardBench 2. Other rows stay as they are.

    Example:
        >>> answers = [{"answer": "Hello!", "rank": 1.0}]
        >>> rows = Dataset.from_list([{"prompt": "\n\nHuman: Hi\n\nAssistant: ", "answers": answers}])
        >>> only_prompts(rows)["prompt"][0]
        '\n\nHuman: Hi\n\nAssistant:'
    """
    names = set(dataset.column_names)
    for name, answers in _ASKED.items():
        if {name, *answers} <= names and "prompt" not in names:
            return dataset.rename_column(name, "prompt")
    if {"prompt", "answers"} <= names:
        prompts = [without_space(prompt) for prompt in dataset["prompt"]]
        return dataset.remove_columns("prompt").add_column("prompt", prompts)
    if {"prompt", "chosen", "rejected", "num_correct"} <= names:
        return dataset.remove_columns(["chosen", "rejected"])
    return dataset


def without_space(prompt: Any) -> Any:
    r"""Leave out the spaces after the last "\n\nAssistant:" of a dialogue in text: they begin its answers.

    Example:
        >>> without_space("\n\nHuman: Hi\n\nAssistant: "), without_space("Hi ")
        ('\n\nHuman: Hi\n\nAssistant:', 'Hi ')
    """
    shorter = prompt.rstrip(" ") if isinstance(prompt, str) else ""
    return shorter if shorter.endswith(_ASSISTANT) else prompt


def _messages(text: str | None) -> list[dict[str, str]] | None:
    if text is None or not text.strip():
        return None
    first, *rest = _TURN.split(text)
    turns = [("User", first), *zip(rest[::2], rest[1::2], strict=True)]
    return [{"role": role.lower(), "content": content.strip()} for role, content in turns if content.strip()]
