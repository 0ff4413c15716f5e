"""Code for a model card that loads an exported folder without this package, and runs as it stands."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from rlhf_recipes.models.readout import Readout

_LOAD = """\
import torch
{imports}

path = {path!r}  # {what}
tokenizer = AutoTokenizer.from_pretrained(path)
model = {cls}.from_pretrained(path, {options}).eval()
"""
_GENERATE = """\
{inputs}
with torch.no_grad():
    output = model.generate(**inputs, max_new_tokens=64, eos_token_id={ends}, pad_token_id={padding})
print(tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))
"""
_TEXT = 'inputs = tokenizer("Once upon a time", return_tensors="pt")'
_CHAT = """\
messages = [{"role": "user", "content": "Tell me a story."}]
inputs = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)"""
_DECODER = """\
{prompt}
ids = tokenizer(prompt + completion + {end!r}, {plain})["input_ids"]
with torch.no_grad():
    score = {score}
print({gain!r} * score.item() + {bias!r})
"""
_ENCODER = """\
prompt, completion = "How was the film?", "It was good."
inputs = tokenizer(prompt, completion, return_tensors="pt")
with torch.no_grad():
    score = model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]).logits[0, 0]
print({gain!r} * score.item() + {bias!r})
"""
_PROMPT_TEXT = 'prompt, completion = "How was the film?", " It was good."'
_PROMPT_CHAT = """\
messages, completion = [{"role": "user", "content": "How was the film?"}], "It was good."
prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)"""


def was_trained_on_chats(tokenizer: PreTrainedTokenizerBase, rows: Sequence[Sequence[int]]) -> bool:
    """Return whether rows of a training were written in the tokenizer's chat template.

    Args:
        tokenizer: The tokenizer.
        rows: Token ids of texts of the training.

    Returns:
        Whether one of them has the tokens that the template writes before a user's message.

    Example:
        >>> from rlhf_recipes.models.tiny import word_tokenizer
        >>> tokenizer = word_tokenizer(["user", "hi", "you"])
        >>> tokenizer.chat_template = "{% for m in messages %}{{ m.role }} {{ m.content }} {% endfor %}"
        >>> was_trained_on_chats(tokenizer, [tokenizer("user you")["input_ids"]])
        True
        >>> was_trained_on_chats(tokenizer, [tokenizer("hi you")["input_ids"]])
        False
    """
    if tokenizer.chat_template is None:
        return False
    chats = [tokenizer.apply_chat_template([{"role": "user", "content": text}], tokenize=False) for text in "01"]
    before = str(chats[0])[: next((i for i, (a, b) in enumerate(zip(*chats, strict=False)) if a != b), 0)]
    ids: Any = tokenizer(before.rstrip(" "), add_special_tokens=False)["input_ids"]
    lead = list(ids[-3:])  # what comes further before may be a system message
    return bool(lead) and any(
        list(row[start : start + len(lead)]) == lead for row in rows for start in range(len(row))
    )


def policy_usage(path: str, what: str, *, adapter: bool, chat: bool, ends: Sequence[int], padding: int | None) -> str:
    """Write code that loads a policy and generates.

    Args:
        path: Folder or hub id.
        what: What the path is, for a comment.
        adapter: Whether the folder holds an adapter.
        chat: Whether its prompts are chats.
        ends: Ids that end a completion.
        padding: Id of the padding token.
    """
    cls = "AutoPeftModelForCausalLM" if adapter else "AutoModelForCausalLM"
    load = _load(path, what, cls, adapter=adapter, options='dtype="auto"')
    return load + _GENERATE.format(inputs=_CHAT if chat else _TEXT, ends=list(ends), padding=padding)


def reward_usage(path: str, what: str, *, adapter: bool, chat: bool, encoder: bool, end: str, readout: Readout) -> str:
    """Write code that loads a reward model and scores one completion.

    Args:
        path: Folder or hub id.
        what: What the path is, for a comment.
        adapter: Whether the folder holds an adapter.
        chat: Whether its texts are chats.
        encoder: Whether it is an encoder.
        end: The token that ends a completion.
        readout: How the score is read.
    """
    cls = "AutoPeftModelForSequenceClassification" if adapter else "AutoModelForSequenceClassification"
    load = _load(path, what, cls, adapter=adapter, options='dtype="auto", num_labels=1')
    numbers = {"gain": readout.gain, "bias": readout.bias}
    if encoder:
        return load + _ENCODER.format(**numbers)
    plain = f"add_special_tokens={not chat}"
    if readout.readout == "last":
        score = "model(input_ids=torch.tensor([ids])).logits[0, 0]"
        return load + _DECODER.format(
            prompt=_PROMPT_CHAT if chat else _PROMPT_TEXT, end=end, plain=plain, score=score, **numbers
        )
    network = "model.get_base_model()" if adapter else "model"
    lines = [
        _PROMPT_CHAT if chat else _PROMPT_TEXT,
        f'before = tokenizer(prompt, {plain})["input_ids"]',
        f"network = {network}",
    ]
    score = f"network.score(states)[0, start:, 0].float().{readout.readout}()  # over the completion's tokens"
    code = _DECODER.format(prompt="\n".join(lines), end=end, plain=plain, score=score, **numbers)
    first = "start = ([a == b for a, b in zip(before, ids)] + [False]).index(False)\nwith torch.no_grad():\n"
    states = "    states = network.base_model(input_ids=torch.tensor([ids])).last_hidden_state\n"
    return load + code.replace("with torch.no_grad():\n", first + states)


def _load(path: str, what: str, cls: str, *, adapter: bool, options: str) -> str:
    imports = f"from peft import {cls}\nfrom transformers import AutoTokenizer"
    if not adapter:
        imports = f"from transformers import {cls}, AutoTokenizer"
    return _LOAD.format(imports=imports, path=path, what=what, cls=cls, options=options)
