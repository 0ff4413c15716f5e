"""A policy with several end tokens: the same ones for rewards, penalties and evaluations."""

import asyncio

import pytest
import torch
from transformers import AutoModelForCausalLM, GenerationConfig

from rlhf_recipes.evaluation.policy import evaluate_policy
from rlhf_recipes.rewards import ClassifierReward, RemoteReward
from rlhf_recipes.rewards.encoding import which_ended
from tests.ppo.support import rollout_and_record, without_chance

EOS, TURN = 1, 8


@pytest.fixture(scope="module")
def two_ends_path(tiny_model_path, tiny_tokenizer, tmp_path_factory):
    """The tiny model, whose completions may also end at token 8."""
    folder = str(tmp_path_factory.mktemp("two_ends"))
    model = AutoModelForCausalLM.from_pretrained(tiny_model_path)
    model.generation_config = GenerationConfig(eos_token_id=[EOS, TURN], pad_token_id=0)
    model.save_pretrained(folder)
    tiny_tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def classifier_path(tiny_tokenizer, tmp_path_factory):
    """A random reward model of its own."""
    from transformers import LlamaConfig, LlamaForSequenceClassification

    torch.manual_seed(4)
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = LlamaConfig(vocab_size=len(tiny_tokenizer), num_labels=1, pad_token_id=0, initializer_range=0.3, **sizes)
    folder = tmp_path_factory.mktemp("classifier")
    LlamaForSequenceClassification(config).save_pretrained(folder)
    tiny_tokenizer.save_pretrained(folder)
    return str(folder)


def finished(finished, **kwargs):
    """A reward that shows what the trainer says."""
    return [float(one) for one in finished]


# One row that the tokenizer's end token ends, one that the model's own ends, two that were cut off
ROWS = [[6, 7, EOS], [6, 7, TURN], [6, 7, 9, 10, 11, 12, 13, 14], [6, 9, 10, 11, 12, 13, 14, 6]]


def made_up(trainer):
    rows = iter([ROWS[i % 4] for i in range(10_000)])
    return without_chance(trainer, lambda prompt, repeat: list(next(rows)))


def test_penalties_rewards_and_the_critics_targets_know_all_ends(make_trainer, two_ends_path):
    fields = {"critic_init": "policy", "missing_eos_penalty": 5.0, "kl_coef": 0.0}
    trainer = made_up(make_trainer(model=two_ends_path, reward_funcs=finished, **fields))
    assert trainer.eos_token_ids == [EOS, TURN]
    batch, record = rollout_and_record(trainer)
    assert record.scores.tolist() == [1.0, 1.0, 0.0, 0.0] * 2
    ended = (batch["completion_mask"].sum(dim=1) == 3).tolist()
    last = batch["completion_mask"].sum(dim=1) - 1
    paid = batch["returns"].gather(1, last[:, None]).squeeze(1)  # the last token's target is its own reward
    assert paid.tolist() == [1.0 if end else -5.0 for end in ended]


@pytest.mark.parametrize("by", ["path", "object"])
def test_a_reward_model_of_its_own_sees_every_end(make_trainer, two_ends_path, classifier_path, by):
    """A text that the second end token ended is scored as one that the first ended, in a run and by itself."""
    reward = classifier_path
    if by == "object":
        from rlhf_recipes.models import load_reward_model

        reward = ClassifierReward(*load_reward_model(classifier_path))
    trainer = made_up(make_trainer(model=two_ends_path, reward_funcs=[reward], critic_init="policy"))
    _, record = rollout_and_record(trainer)
    prompts = trainer.train_dataset["prompt"][:8]
    own = trainer.reward_funcs[0]
    texts = [trainer.processing_class.decode(ids, skip_special_tokens=True) for ids in ROWS * 2]
    expected = own.scores(list(prompts), texts, [True, True, False, False] * 2)
    assert record.scores.tolist() == pytest.approx(expected, abs=1e-6)
    assert own.scores(["the "], ["a film"], [True]) != own.scores(["the "], ["a film"], [False])


def test_evaluations_count_every_end(make_trainer, two_ends_path):
    trainer = make_trainer(model=two_ends_path, reward_funcs=finished, critic_init="policy", max_completion_length=24)
    with torch.no_grad():  # make the second end token likely
        trainer.model.lm_head.weight[TURN] *= 3
    found = evaluate_policy(trainer, trainer.train_dataset, rows=64)["policy"]
    assert found["eos_rate"] == pytest.approx(found["reward_score"])
    assert found["eos_rate"] > 0.3
    assert found["length"] < 24


def test_a_remote_reward_hears_from_the_trainer_which_ended():
    seen = []

    class Recorded(RemoteReward):
        async def _ask(self, client, rows):
            seen.extend(done for _, _, done in rows)
            return [0.0] * len(rows)

    rows = {"prompts": ["a"] * 4, "completions": ["b"] * 4, "completion_ids": ROWS}
    asyncio.run(Recorded("http://127.0.0.1:9/score")(**rows, finished=[True, True, False, False]))
    asyncio.run(Recorded("http://127.0.0.1:9/score", eos_token_ids={EOS})(**rows, finished=[True, True, False, False]))
    asyncio.run(Recorded("http://127.0.0.1:9/score")(**rows))
    assert seen == [True, True, False, False, True, False, False, False, True, True, True, True]
    assert which_ended(2, None, {EOS}, None) == [True, True]
