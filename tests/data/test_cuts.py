"""Prompts that end where a sentence or a paragraph does, against loops written another way."""

import logging
import random

import pytest
from datasets import Dataset

from rlhf_recipes.data import fit_paragraphs, single_token_id, to_sentence_prompts
from rlhf_recipes.data.cuts import whole_sentences
from rlhf_recipes.models.tiny import bpe_tokenizer, word_tokenizer

STOP = 9
TEXTS = [
    "Intro here. The film was long. It had no end and no middle. Nobody laughed",
    "No end at all",
    "Only one at the end.",
    "First.  Then a sentence which is far too long to fit into the few tokens that a prompt has, and no more.",
]


@pytest.fixture(scope="module")
def bpe():
    return bpe_tokenizer(TEXTS * 20, 400)


def by_hand(ids, limit):
    """Every prefix of what follows the first stop that ends with one, the longest of those that fit."""
    tail = ids[ids.index(STOP) + 1 :] or ids if STOP in ids else []
    fitting = [tail[:n] for n in range(1, min(limit, len(tail)) + 1) if tail[n - 1] == STOP]
    return fitting[-1] if fitting else []


def test_whole_sentences_equal_a_search_of_all_prefixes():
    rng = random.Random(0)
    for _ in range(500):
        ids = [rng.choice([STOP, 1, 2, 3]) for _ in range(rng.randrange(1, 12))]
        limit = rng.randrange(1, 8)
        start, end = whole_sentences(ids, STOP, limit)
        assert ids[start:end] == by_hand(ids, limit)


def test_prompts_begin_behind_a_stop_and_end_with_one(bpe, caplog):
    rows = Dataset.from_dict({"text": TEXTS, "label": [0, 1, 2, 3]})
    with caplog.at_level(logging.WARNING):
        found = to_sentence_prompts(rows, bpe, max_tokens=20)
    assert found["label"][:] == [0, 2]
    assert found["prompt"][:] == [" The film was long. It had no end and no middle.", "Only one at the end."]
    assert all(len(ids) <= 20 for ids in bpe(found["prompt"][:])["input_ids"])
    assert "2 of 4 rows cannot be used: 2 x no '.', or none within 20 tokens" in caplog.text


def test_tokens_of_a_prompt_are_those_of_the_text(bpe):
    """What is cut out of the text is tokenized as it was in it: the space before the first word stays."""
    (prompt,) = to_sentence_prompts(Dataset.from_dict({"text": TEXTS[:1]}), bpe, max_tokens=8)["prompt"]
    whole, own = (bpe(text)["input_ids"] for text in (TEXTS[0], prompt))
    start = whole.index(single_token_id(bpe, ".")) + 1
    assert own == whole[start : start + len(own)]


def test_what_cannot_be_cut_is_refused(bpe):
    rows = Dataset.from_dict({"text": ["no stop", "none here"]})
    with pytest.raises(ValueError, match="No row is left. 2 of 2 rows cannot be used: 2 x no '.'"):
        to_sentence_prompts(rows, bpe)
    with pytest.raises(ValueError, match="a column `text`; the rows have prompt"):
        to_sentence_prompts(Dataset.from_dict({"prompt": ["a."]}), bpe)
    with pytest.raises(ValueError, match="`max_tokens` must be at least 1, got 0"):
        to_sentence_prompts(rows, bpe, max_tokens=0)
    with pytest.raises(ValueError, match="' and so' is not one token"):
        to_sentence_prompts(rows, word_tokenizer(["a"]), stop=" and so")


TEMPLATE = "TITLE: {title}\n\nPOST: {post}\n\nTL;DR:"


def one_character_at_a_time(fields, tokenizer, limit):
    """The rule of the original: whole paragraphs, and where there is none a character, until it fits."""
    post = fields["post"]
    while len(tokenizer(TEMPLATE.format(**{**fields, "post": post}))["input_ids"]) > limit:
        post = post[: post.rindex("\n")] if "\n" in post else post[:-1]
    return TEMPLATE.format(**{**fields, "post": post})


def test_a_post_loses_whole_paragraphs_and_then_characters(bpe):
    paragraphs = ["It was long.", "Nobody laughed at the end.", "The film had no middle, and no more."]
    for limit in range(26, 80, 3):
        fields = {"title": "A film", "post": "\n".join(paragraphs)}
        found = fit_paragraphs(TEMPLATE, fields, "post", bpe, limit)
        assert found == one_character_at_a_time(fields, bpe, limit)
        assert len(bpe(found)["input_ids"]) <= limit
        assert fields["post"] == "\n".join(paragraphs)


def test_characters_of_several_tokens_are_not_cut_too_early(bpe):
    fields = {"title": "", "post": "🙂🙃" * 40}
    for limit in (30, 45, 61):
        found = fit_paragraphs(TEMPLATE, fields, "post", bpe, limit)
        assert found == one_character_at_a_time(fields, bpe, limit)


def test_prompts_that_cannot_fit_are_refused(bpe):
    fields = {"title": "A film that was long", "post": "It was."}
    with pytest.raises(ValueError, match="tokens more than 5 even without `post`. Allow more"):
        fit_paragraphs(TEMPLATE, fields, "post", bpe, 5)
    with pytest.raises(ValueError, match="`text`, which is shortened, must be a field"):
        fit_paragraphs(TEMPLATE, fields, "text", bpe, 50)
    with pytest.raises(ValueError, match="names the field 'title', and there are post"):
        fit_paragraphs(TEMPLATE, {"post": "a"}, "post", bpe, 50)


def test_a_token_is_found_by_its_name_or_by_what_it_becomes(tiny_tokenizer):
    tokenizer = bpe_tokenizer(["a film .\n" * 9], 300)
    assert tokenizer.decode([single_token_id(tokenizer, "\n")]) == "\n"  # its entry has another name
    assert tokenizer.decode([single_token_id(tokenizer, ".")]) == "."
    with pytest.raises(ValueError, match=r"'zq' is not one token of this tokenizer: it becomes \['z', 'q'\]"):
        single_token_id(tokenizer, "zq")
    with pytest.raises(ValueError, match="'!' is not one token"):
        single_token_id(tiny_tokenizer, "!")  # unknown to it
