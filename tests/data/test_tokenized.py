"""What is said about the rows that a trainer tokenized."""

import logging
from types import SimpleNamespace

import pytest
from datasets import Dataset, DatasetDict
from transformers import LlamaConfig, T5Config

from rlhf_recipes.data.tokenized import check_tokenized

CONTEXT_4 = LlamaConfig(max_position_embeddings=4, vocab_size=10)
PAIRS = Dataset.from_dict({"chosen_ids": [[1, 2], [1]], "rejected_ids": [[3], [1, 2, 3, 9]]})
SFT_ROWS = Dataset.from_dict({"input_ids": [[0, 2], [1, 2, 3, 9]]})
ONE_PAIR = Dataset.from_dict({"chosen_ids": [[1, 2]], "rejected_ids": [[1]]})


def trainer_with(train, test=ONE_PAIR, max_length=4, config=CONTEXT_4):
    return SimpleNamespace(
        train_dataset=train,
        eval_dataset=test,
        args=SimpleNamespace(max_length=max_length),
        model=SimpleNamespace(config=config),
    )


def given_rows(train, test=1):
    return DatasetDict(train=Dataset.from_dict({"x": [0] * train}), test=Dataset.from_dict({"x": [0] * test}))


@pytest.mark.parametrize("rows", [PAIRS, SFT_ROWS])
def test_rows_that_all_fit_need_no_word(rows, caplog):
    check_tokenized(trainer_with(rows, rows), given_rows(2, 2))
    assert not caplog.records


@pytest.mark.parametrize("rows", [PAIRS, SFT_ROWS])
def test_rows_that_were_left_out_are_counted_per_split(rows, caplog):
    with caplog.at_level(logging.WARNING):
        check_tokenized(trainer_with(rows, rows), given_rows(5, 3))
    assert [record.getMessage() for record in caplog.records] == [
        "3 of 5 train rows do not fit into `max_length` (4 tokens) and are left out.",
        "1 of 3 test rows do not fit into `max_length` (4 tokens) and are left out.",
    ]


def test_losing_all_rows_of_a_split_is_refused():
    with pytest.raises(ValueError, match=r"None of the 7 train rows fits into `max_length` \(2 tokens\)"):
        check_tokenized(trainer_with(PAIRS.select([]), max_length=2), given_rows(7))
    with pytest.raises(ValueError, match="None of the 3 test rows fits"):
        check_tokenized(trainer_with(ONE_PAIR, PAIRS.select([])), given_rows(1, 3))


@pytest.mark.parametrize(("rows", "column"), [(PAIRS, "rejected_ids"), (SFT_ROWS, "input_ids")])
def test_rows_longer_than_the_context_are_refused(rows, column):
    trainer = trainer_with(rows, max_length=None, config=LlamaConfig(max_position_embeddings=3, vocab_size=10))
    with pytest.raises(ValueError, match=f"`{column}` of the train rows.* 4 tokens.*context is 3.*`max_length` to 3"):
        check_tokenized(trainer, given_rows(2))


def test_a_model_without_a_fixed_context_takes_any_length():
    check_tokenized(trainer_with(SFT_ROWS, max_length=None, config=T5Config(vocab_size=10)), given_rows(2))


def test_packed_rows_are_not_counted(caplog):
    packed = Dataset.from_dict({"input_ids": [[1, 2, 3, 4]], "seq_lengths": [[2, 2]]})
    check_tokenized(trainer_with(packed, packed), given_rows(2, 2))
    assert not caplog.records


@pytest.mark.parametrize("wrong", [10, -1])
def test_tokens_of_another_vocabulary_are_refused(wrong):
    pairs = Dataset.from_dict({"chosen_ids": [[1], [2]], "rejected_ids": [[3], [wrong, 5]]})
    with pytest.raises(ValueError, match=rf"`rejected_ids` of the test rows have .*{wrong}.*knows 0 to 9.*tokenizer"):
        check_tokenized(trainer_with(ONE_PAIR, pairs), given_rows(1, 2))


def test_rows_without_tokens_are_refused():
    pairs = Dataset.from_dict({"chosen_ids": [[1], [2]], "rejected_ids": [[3], []]})
    with pytest.raises(ValueError, match="`rejected_ids` of the train rows: row 1 has no tokens"):
        check_tokenized(trainer_with(pairs), given_rows(2))
