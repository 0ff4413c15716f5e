"""Where a reward model reads its score."""

import copy
from types import SimpleNamespace

import pytest
import torch
from datasets import Dataset

from rlhf_recipes.reward_modeling import check_score_head
from rlhf_recipes.reward_modeling.preparation import cut_after_eos


def trainer_with(tokenizer, dtype=torch.float32, bf16=False, fp16=False, last=1):
    args = SimpleNamespace(bf16=bf16, fp16=fp16)
    rows = Dataset.from_dict({"chosen_ids": [[5, last]], "rejected_ids": [[6, 7, last]]})
    return SimpleNamespace(
        processing_class=tokenizer, model=SimpleNamespace(dtype=dtype), args=args, train_dataset=rows
    )


@pytest.mark.parametrize(
    ("dtype", "mixed"),
    [
        (torch.float32, {}),
        (torch.float32, {"bf16": True}),
        (torch.bfloat16, {"bf16": True}),
        (torch.float16, {"fp16": True}),
    ],
)
def test_what_works_passes(tiny_tokenizer, dtype, mixed):
    check_score_head(trainer_with(tiny_tokenizer, dtype, **mixed))


def test_padding_with_the_end_token_is_refused_with_other_tokens_to_use(tiny_tokenizer):
    tokenizer = copy.deepcopy(tiny_tokenizer)
    tokenizer.pad_token = tokenizer.eos_token
    with pytest.raises(ValueError, match=r"'<eos>'.*Set `pad_token`.*'<unk>'"):
        check_score_head(trainer_with(tokenizer))


def test_padding_with_the_token_that_ends_the_rows_is_refused_too(tiny_tokenizer):
    """Padding with a token that only may end a completion (Qwen's `<|endoftext|>`) does no harm."""
    with pytest.raises(ValueError, match=r"The padding token is the token that ends a text \('<pad>'\).*'<unk>'"):
        check_score_head(trainer_with(tiny_tokenizer, last=tiny_tokenizer.pad_token_id))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_without_autocast_is_refused(tiny_tokenizer, dtype):
    with pytest.raises(ValueError, match=rf"computes in {dtype}.*Set `bf16: true`, or `dtype: float32`"):
        check_score_head(trainer_with(tiny_tokenizer, dtype))


@pytest.mark.parametrize(
    ("ids", "expected"),
    [
        ([7, 8, 1, 9], [7, 8, 1]),  # a line break of the chat template after the end token
        ([7, 1, 8, 1, 9, 9], [7, 1, 8, 1]),  # earlier turns end too; only the last end counts
        ([7, 8, 1], [7, 8, 1]),
        ([7, 8], [7, 8]),
        ([1], [1]),
    ],
)
def test_texts_end_at_their_last_end_token(ids, expected):
    assert cut_after_eos(ids, eos_token_id=1) == expected
