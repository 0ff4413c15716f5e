"""Rewards per token of a model that cuts texts into other tokens than the policy does."""

from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import BertConfig, BertForTokenClassification, PreTrainedTokenizerFast

from rlhf_recipes.rewards import TokenClassifierReward, checked, token_spans
from rlhf_recipes.rewards.record import RewardRecord

TEXTS = ["the film was good and warm", "this story felt dull, très bien, 日本"]


def byte_level(vocab_size):
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=vocab_size, special_tokens=["<pad>", "<eos>"], initial_alphabet=alphabet)
    tokenizer.train_from_iterator(TEXTS * 4, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>")


POLICY, OTHER = byte_level(300), byte_level(270)


class CharactersScore(torch.nn.Module):
    """Says of each token how many characters of it are vowels, in a way that a test can count."""

    config = SimpleNamespace(num_labels=1)
    device = torch.device("cpu")

    def forward(self, input_ids, attention_mask, **kwargs):
        vowels = [[sum(c in "aeiou" for c in OTHER.decode([i])) for i in row] for row in input_ids.tolist()]
        return SimpleNamespace(logits=torch.tensor(vowels, dtype=torch.float32)[..., None])


@pytest.mark.parametrize("text", TEXTS)
def test_spans_cover_the_text_in_order(text):
    ids = [*POLICY(text)["input_ids"], POLICY.eos_token_id]
    spans = token_spans(POLICY, ids)
    assert "".join(text[start:end] for start, end in spans) == text
    assert spans[-1] == (len(text), len(text))
    for (_, end), (start, _) in pairwise(spans):
        assert start == end


def test_each_policy_token_gets_the_rewards_of_its_characters():
    reward = TokenClassifierReward(CharactersScore(), OTHER, POLICY, batch_size=1)
    prompts, completions = ["you see: ", "a "], TEXTS
    ids = [[*POLICY(text)["input_ids"], POLICY.eos_token_id] for text in completions]
    given = reward(prompts=prompts, completion_ids=ids)
    for text, row, rewards in zip(completions, ids, given, strict=True):
        assert len(rewards) == len(row)
        assert sum(rewards) == sum(c in "aeiou" for c in text), "nothing is lost, and the prompt's vowels do not count"
        for start, end in ((i, i + 1) for i in range(len(row))):
            # up to every token, what was paid is what the other tokenizer's tokens that end there hold
            paid, place = sum(rewards[:end]), token_spans(POLICY, row)[start][1]
            ends = [e for _, e in OTHER(text, return_offsets_mapping=True)["offset_mapping"]]
            done = max((e for e in ends if e <= place), default=0)
            assert paid == sum(c in "aeiou" for c in text[:done]) or end == len(row)


def test_ids_that_the_tokenizer_would_not_choose():
    spaced = [i for character in "good" for i in POLICY(character)["input_ids"]]
    assert [end - start for start, end in token_spans(POLICY, spaced)] == [1, 1, 1, 1]


def test_it_is_a_reward_function_with_a_real_model():
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    config = BertConfig(vocab_size=len(OTHER), num_labels=1, pad_token_id=0, **sizes)
    reward = checked(TokenClassifierReward(BertForTokenClassification(config), OTHER, POLICY))
    ids = [POLICY(text)["input_ids"] for text in TEXTS]
    chat = [[{"role": "user", "content": "go"}]] * 2
    POLICY.chat_template = "{{ messages[0]['content'] }}:"
    record = RewardRecord()
    sums = reward(prompts=chat, completions=TEXTS, completion_ids=ids, reward_record=[record])
    [rows] = record.token_rewards.values()
    assert [sum(row) for row in rows] == pytest.approx(sums)
    assert [len(row) for row in rows] == [len(row) for row in ids]


def test_models_that_do_not_fit_are_refused():
    two = SimpleNamespace(config=SimpleNamespace(num_labels=2))
    with pytest.raises(ValueError, match="has 2 outputs"):
        TokenClassifierReward(two, OTHER, POLICY)
    one, slow = SimpleNamespace(config=SimpleNamespace(num_labels=1)), SimpleNamespace(is_fast=False)
    with pytest.raises(ValueError, match="no character offsets"):
        TokenClassifierReward(one, slow, POLICY)
