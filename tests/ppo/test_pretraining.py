"""PPO-ptx: the language-model loss of a second data set against models and loops of their own."""

import copy

import pytest
import torch
from datasets import Dataset
from torch.testing import assert_close

from rlhf_recipes.models import load_causal_lm, load_policy
from rlhf_recipes.models.roles import is_critic_parameter
from rlhf_recipes.ppo.pretraining import PretrainingTexts
from tests.ppo.support import EOS, logged, rollout, trained, without_chance

TEXTS = ["the film was good", "a story", "this actor felt very slow and cold", "it", "i liked that ending so"]
ONE = {"per_device_train_batch_size": 8, "gradient_accumulation_steps": 1, "max_completion_length": 8}


@pytest.fixture
def texts():
    return Dataset.from_list([{"text": text} for text in TEXTS])


def sequences(tokenizer, texts, longest=512):
    return [[*tokenizer(text).input_ids, EOS][:longest] for text in texts]


def rows_of(batch):
    lengths = batch["attention_mask"].sum(dim=1)
    return [ids[:length] for ids, length in zip(batch["input_ids"].tolist(), lengths, strict=True)]


def loss_by_hand(model, rows):
    """Mean over all tokens but the first of each text, one text at a time."""
    losses = []
    for ids in rows:
        logps = model(input_ids=torch.tensor([ids])).logits[0].double().log_softmax(-1)
        losses += [-logps[t - 1, ids[t]] for t in range(1, len(ids))]
    return torch.stack(losses).mean()


def gradients(trainer, batch):
    trainer.model.zero_grad()
    trainer.model.train()
    trainer._step = 1
    loss = trainer._compute_loss(trainer.model, batch)
    loss.backward()
    return loss.item(), {n: p.grad.clone() for n, p in trainer.model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("whole", [False, True], ids=["adapter", "whole"])
def test_it_adds_the_gradient_of_a_language_model_loss(make_trainer, texts, tiny_model_path, sft_adapter, whole):
    """InstructGPT's objective: PPO's gradient plus `ptx_coef` times that of the mean negative log-likelihood."""

    def count(completion_ids, **kwargs):
        return [0.1 * len(ids) for ids in completion_ids]

    fields = {"model": tiny_model_path, "reward_funcs": count, "critic_init": "policy"} if whole else {}
    trainer = make_trainer(**ONE, **fields, ptx_dataset=texts, ptx_coef=0.7, ptx_batch_size=3)
    trainer.current_gradient_accumulation_steps, trainer.state.global_step, trainer._step = 1, 1, 1
    batch = rollout(without_chance(trainer))
    loss, found = gradients(trainer, batch)
    trainer.ptx_texts, drawn = None, trainer.ptx_texts.batch(1)
    loss_without, without = gradients(trainer, batch)

    rows = rows_of(drawn)
    tokenizer = trainer.processing_class
    assert len(rows) == 3
    assert all(row in sequences(tokenizer, TEXTS) for row in rows)
    assert len({len(row) for row in rows}) > 1, "the test needs texts of several lengths"
    policy = load_causal_lm(tiny_model_path)
    policy = policy.train() if whole else load_policy(policy, sft_adapter).train()
    expected = loss_by_hand(policy, rows)
    expected.backward()
    assert loss - loss_without == pytest.approx(0.7 * expected.item(), rel=1e-4)
    assert trainer.step_metrics["train"].collect()["ppo/ptx_loss"] == pytest.approx(expected.item(), rel=1e-4)
    for name, parameter in policy.named_parameters():
        if parameter.grad is not None:
            assert_close(found[name] - without[name], 0.7 * parameter.grad, atol=1e-5, rtol=1e-3)
    for name, gradient in found.items():
        if is_critic_parameter(name):
            assert torch.equal(gradient, without[name]), "the critic is no part of it"


def test_the_micro_batches_of_a_step_are_averaged(make_trainer, texts):
    trainer = without_chance(make_trainer(ptx_dataset=texts, ptx_coef=1.0, max_steps=1, num_iterations=1))
    trainer.model.train()
    numbers = []
    batch = trainer.ptx_texts.batch
    trainer.ptx_texts.batch = lambda number: numbers.append(number) or batch(number)
    trainer.train()
    assert numbers == [0, 1]
    plain = without_chance(make_trainer(max_steps=1, num_iterations=1))
    plain.train()
    ptx_loss = logged(trainer, "ppo/ptx_loss")[0]
    assert logged(trainer, "loss")[0] == pytest.approx(logged(plain, "loss")[0] + ptx_loss, abs=1e-5)


def test_every_text_comes_once_in_each_pass(make_config, tiny_tokenizer, texts):
    args = make_config(ptx_coef=1.0, ptx_batch_size=2)
    source = PretrainingTexts(texts, tiny_tokenizer, args)
    rows = []
    for number in range(10):  # four passes over five texts, in batches that do not fit into one
        batch = source.batch(number)
        assert batch["input_ids"].shape == batch["attention_mask"].shape == (2, batch["attention_mask"].sum(1).max())
        rows += map(tuple, rows_of(batch))
    passes = [rows[start : start + 5] for start in range(0, 20, 5)]
    everything = sorted(map(tuple, sequences(tiny_tokenizer, TEXTS)))
    assert all(sorted(each) == everything for each in passes)
    assert len({tuple(each) for each in passes}) > 1, "each pass has an order of its own"
    again = PretrainingTexts(texts, tiny_tokenizer, args).batch(7)
    assert torch.equal(again["input_ids"], source.batch(7)["input_ids"]), "the order depends on the number alone"
    other = PretrainingTexts(texts, tiny_tokenizer, make_config(ptx_coef=1.0, ptx_batch_size=5, seed=7)).batch(0)
    first = PretrainingTexts(texts, tiny_tokenizer, make_config(ptx_coef=1.0, ptx_batch_size=5)).batch(0)
    assert not torch.equal(other["input_ids"], first["input_ids"]), "and on the seed"


def test_long_texts_are_cut_off_and_only_whole_ones_end(make_config, tiny_tokenizer, texts):
    source = PretrainingTexts(texts, tiny_tokenizer, make_config(ptx_coef=1.0, ptx_batch_size=5, ptx_max_length=4))
    batch = source.batch(0)
    assert batch["input_ids"].size(1) == 4
    found = rows_of(batch)
    assert sorted(found) == sorted(sequences(tiny_tokenizer, TEXTS, longest=4))
    assert sum(ids[-1] == EOS for ids in found) == 2


def test_by_default_there_are_as_many_texts_as_completions(make_config, tiny_tokenizer, texts):
    source = PretrainingTexts(texts, tiny_tokenizer, make_config(ptx_coef=1.0))
    assert len(source.batch(0)["input_ids"]) == 4


def test_texts_without_a_token_to_predict_add_nothing(make_trainer):
    empty = Dataset.from_list([{"text": ""}] * 3)
    trainer = without_chance(make_trainer(ptx_dataset=empty, ptx_coef=1.0, max_steps=1, num_iterations=1))
    before = trained(trainer)
    trainer.train()
    assert logged(trainer, "ppo/ptx_loss") == [0.0]
    assert all(weight.isfinite().all() for weight in trained(trainer).values())
    assert any(not torch.equal(weight, before[name]) for name, weight in trained(trainer).items())


def test_training_on_texts_makes_them_likelier(make_trainer, texts):
    trainer = make_trainer(
        ptx_dataset=texts, ptx_coef=1.0, max_steps=12, learning_rate=5e-3, lr_scheduler_type="constant"
    )
    trainer.train()
    losses = logged(trainer, "ppo/ptx_loss")
    assert sum(losses[-4:]) < sum(losses[:4]) - 1.0


@pytest.mark.parametrize("rows", [[{"prompt": "it was"}], []])
def test_data_without_texts_are_refused(make_trainer, rows):
    dataset = Dataset.from_list(rows) if rows else Dataset.from_dict({"text": []})
    with pytest.raises(ValueError, match="pretraining data set needs rows with a column 'text'"):
        make_trainer(ptx_dataset=dataset, ptx_coef=1.0)


def test_data_of_another_kind_are_refused(make_trainer, tiny_tokenizer):
    texts = Dataset.from_list([{"text": "it was <new>"}])
    with pytest.raises(TypeError, match="`ptx_dataset` must be a `datasets.Dataset`.* got list"):
        make_trainer(ptx_dataset=[{"text": "it was"}], ptx_coef=1.0)
    with pytest.raises(TypeError, match="`ptx_dataset` is a stream"):
        make_trainer(ptx_dataset=texts.to_iterable_dataset(), ptx_coef=1.0)
    tokenizer = copy.deepcopy(tiny_tokenizer)
    tokenizer.add_tokens(["<new>"])
    with pytest.raises(ValueError, match="A text of `ptx_dataset` has the token 42, and the embeddings .* end at 41"):
        make_trainer(ptx_dataset=texts, ptx_coef=1.0, processing_class=tokenizer).train()
