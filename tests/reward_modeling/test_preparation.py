"""Where a reward model reads its score."""

import copy
from types import SimpleNamespace

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoTokenizer

from rlhf_recipes.data.preferences import to_preference_table
from rlhf_recipes.models import load_sequence_classifier
from rlhf_recipes.reward_modeling import (
    PreferenceConfig,
    PreferenceTrainer,
    check_score_head,
    normalize_score_head,
    score_sequences,
)
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


def test_scores_vary_by_one_before_the_training(tiny_model_path, tiny_texts, tmp_path):
    """A choice among four: after the scaling, transformers' own scores of the first completions vary by one."""
    rows = [
        {"prompt": text, "completions": [" good", " dull", " slow", " funny"], "best": index % 4}
        for index, text in enumerate(tiny_texts)
    ]
    trainer = PreferenceTrainer(
        model=load_sequence_classifier(tiny_model_path),
        args=PreferenceConfig(str(tmp_path), objective="best_of_k", report_to="none", use_cpu=True, bf16=False),
        train_dataset=to_preference_table(Dataset.from_list(rows)),
        processing_class=AutoTokenizer.from_pretrained(tiny_model_path),
        peft_config=LoraConfig(task_type="SEQ_CLS", r=4, target_modules="all-linear"),
    )
    sequences = [ids for row in trainer.train_dataset for ids in row["completion_ids"]][:24]
    before = score_sequences(trainer.model, sequences)
    gain = normalize_score_head(trainer, samples=24)
    after = score_sequences(trainer.model, sequences)
    assert after.std(correction=0).item() == pytest.approx(1.0, abs=1e-4)
    torch.testing.assert_close(after, gain * before, rtol=1e-4, atol=1e-5)
    assert abs(gain - 1.0) > 0.05
    for name, weight in trainer.model.named_parameters():
        if "score" in name:
            torch.nn.init.zeros_(weight.data)
    with pytest.raises(ValueError, match="All 24 reference samples score 0"):
        normalize_score_head(trainer, samples=24)


def test_a_head_of_several_layers_is_not_scaled():
    model = torch.nn.ModuleDict({"classifier": torch.nn.Linear(2, 1)})
    with pytest.raises(ValueError, match="one linear layer, but 0 trained weights are named `score`"):
        normalize_score_head(SimpleNamespace(model=model))
