"""Margins and labels of rows, checked before any of them is trained on."""

import copy
import json
import math

import pytest
from datasets import Dataset

from rlhf_recipes.data.chat_templates import encode_answer, options_of
from rlhf_recipes.reward_modeling import PreferenceConfig, check_rows
from rlhf_recipes.reward_modeling.table import prompt_lengths, token_labels

PAIR = {"prompt": "Hi", "chosen": " good", "rejected": " bad"}
GROUP = {"prompt": "Hi", "completions": [" good", " bad"]}


@pytest.fixture(scope="module")
def config():
    return lambda **fields: PreferenceConfig("out", use_cpu=True, bf16=False, report_to="none", **fields)


BAD_MARGINS = [
    (["1.5", "2"], 0),
    (["much", "little"], 0),
    ([1.5, None], 1),
    ([None, None], 0),
    ([1, math.nan], 1),
    ([1, math.inf], 1),
    ([0, -0.5], 1),
    ([True, False], 0),
    ([[1.5], [2.0]], 0),
    ([{"value": 1}, {"value": 2}], 0),
]


@pytest.mark.parametrize(("margins", "row"), BAD_MARGINS)
@pytest.mark.parametrize("fields", [{}, {"label_noise": 0.1}], ids=["TRL's loss", "ours"])
@pytest.mark.parametrize("stored", [None, "numpy", "torch"])
def test_margins_of_pairs_are_numbers(config, margins, row, fields, stored):
    rows = Dataset.from_list([PAIR | {"margin": margin} for margin in margins]).with_format(stored)
    with pytest.raises(
        ValueError, match=f"Train row {row} has the `margin` .* Give a finite number .*`margin_use: ign"
    ):
        check_rows(rows, config(**fields), "train")
    assert check_rows(rows, config(margin_use="ignore"), "train") is rows


@pytest.mark.parametrize("margins", [[0, 2], [0.0, 1.5]])
@pytest.mark.parametrize("use", ["margin", "scale"])
def test_numbers_of_at_least_0_pass(config, margins, use):
    rows = Dataset.from_list([PAIR | {"margin": margin} for margin in margins])
    assert check_rows(rows, config(margin_use=use), "train") is rows


def test_a_missing_weight_counts_1(config):
    rows = Dataset.from_list([PAIR | {"margin": margin} for margin in (1.0, None)])
    assert check_rows(rows, config(margin_use="scale"), "train") is rows


@pytest.mark.parametrize("label", ["chosen", "1", True, 1.5, -0.1, math.nan, [1.0]])
def test_labels_of_pairs_are_probabilities(config, label):
    rows = Dataset.from_list([PAIR | {"label": label}])
    with pytest.raises(ValueError, match="Eval row 0 has the `label` .* Give the probability"):
        check_rows(rows, config(), "eval")


@pytest.mark.parametrize("margin", ["1.5", math.nan, math.inf, -1.0, True, [1.0]])
def test_margins_of_a_table_are_numbers(config, margin):
    rows = Dataset.from_list([GROUP | {"label": 1.0, "margin": margin}])
    with pytest.raises(ValueError, match="`margin` is not a number of at least 0 .first: row 0"):
        check_rows(rows, config(), "train")


def test_margins_of_a_table_are_there_for_all_decided_pairs_or_for_none(config):
    def table(*rows):
        return Dataset.from_list([GROUP | {"label": label, "margin": margin} for label, margin in rows])

    for whole in ([(1.0, 2.0), (0.0, 1.0)], [(1.0, None), (0.2, None)], [(1.0, 2.0), (0.5, None)]):
        assert len(check_rows(table(*whole), config(), "train")) == 2
    part = table((1.0, 2.0), (0.5, None), (0.0, None))
    with pytest.raises(ValueError, match="Train row 2 has no `margin`, but other rows have one. Give every pair"):
        check_rows(part, config(), "train")
    for use in ("scale", "ignore"):
        assert len(check_rows(part, config(margin_use=use), "train")) == 3


@pytest.mark.parametrize(
    "options",
    [{}, {"tools": json.dumps([{"name": "so"}])}, {"chat_template_kwargs": {"slowly": True}}],
    ids=["nothing", "tools", "template"],
)
def test_prompts_and_steps_are_found_in_chats_as_their_rows_render_them(tiny_tokenizer, options):
    tokenizer = copy.deepcopy(tiny_tokenizer)
    tokenizer.chat_template = (
        "{% for tool in tools or [] %}{{ tool.name + ' very ' }}{% endfor %}{% if slowly %}slow {% endif %}"
        "{% for m in messages %}{{ m.content + ' ' }}{% endfor %}"
        "{% if not add_generation_prompt %}<eos>{% endif %}"
    )
    prompt, answer = [{"role": "user", "content": "the film was"}], [{"role": "assistant", "content": "good and warm"}]
    row = {"prompt": prompt, "completions": [answer], "steps": [["good and", " warm"]], "step_labels": [[1.0, 0.0]]}
    row |= options
    seen = encode_answer(tokenizer, prompt, answer, {tokenizer.eos_token_id}, **options_of(row))
    rows = Dataset.from_list([row | {"completion_ids": [[*seen.prompt_ids, *seen.ids]]}])
    assert prompt_lengths(rows, tokenizer) == [[len(seen.prompt_ids)]]
    assert len(seen.prompt_ids) == 3 + {"tools": 2, "chat_template_kwargs": 1}.get(next(iter(options), ""), 0)
    assert token_labels(rows, tokenizer, "bce")[0][0][len(seen.prompt_ids) :] == [1.0, 1.0, 0.0, 0.0]
