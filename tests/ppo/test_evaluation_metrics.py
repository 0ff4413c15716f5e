"""What an evaluation logs is over all of its rows, each once, however they are cut into batches."""

import pytest
import torch
from datasets import Dataset, IterableDataset
from torch.testing import assert_close

from rlhf_recipes.ppo.passes import policy_pass, reference_pass
from tests.ppo.support import answer, texts_of_ids, without_chance

WORDS = ["the film was", "a story", "this actor felt so", "that ending is", "the plot", "a good", "it"]
OF_CHANCE = ("_runtime", "_per_second", "_spread", "_time")  # `off_policy_spread` is measured on a part of each batch


def count(completion_ids, **kwargs):
    """A reward that leaves some completions out."""
    return [None if len(ids) == 3 else 0.5 * len(ids) for ids in completion_ids]


def zero(completion_ids, **kwargs):
    return [0.0] * len(completion_ids)


@pytest.fixture(scope="module")
def rows():
    return Dataset.from_list([{"prompt": text} for text in WORDS])


def evaluated(make_trainer, rows, batch_size, **fields):
    reward_funcs = [count, zero]
    trainer = without_chance(
        make_trainer(reward_funcs=reward_funcs, per_device_eval_batch_size=batch_size, critic_init="policy", **fields)
    )
    with torch.no_grad():
        trainer.roles.heads["critic"].weight.normal_(generator=torch.Generator().manual_seed(0))
        for name, parameter in trainer.model.named_parameters():
            if "lora_B.default" in name:
                parameter.add_(0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    metrics = trainer.evaluate(rows)
    return trainer, {name: value for name, value in metrics.items() if not name.endswith(OF_CHANCE)}


FIELDS = {
    "token": {},
    "sequence_in_loss": {
        "loss_aggregation": "sequence",
        "kl_placement": "loss",
        "kl_estimator": "full",
        "kl_coef": 0.3,
        "critic": "head",
        "length_penalty": 0.1,
    },
}


@pytest.mark.parametrize("fields", FIELDS.values(), ids=FIELDS)
def test_metrics_do_not_depend_on_the_batches(make_trainer, rows, fields):
    _, together = evaluated(make_trainer, rows, 7, **fields)
    assert {"eval_loss", "eval_kl", "eval_reward", "eval_critic/value_loss", "eval_rlhf_reward"} <= together.keys()
    for size in (1, 2, 4):
        _, apart = evaluated(make_trainer, rows, size, **fields)
        assert apart == pytest.approx(together, rel=1e-4, abs=1e-6), size


def test_metrics_by_hand(make_trainer, rows):
    trainer, metrics = evaluated(make_trainer, rows, 3)
    tokenizer = trainer.processing_class
    prompts = [tokenizer(text)["input_ids"] for text in WORDS]
    answers = [answer(prompt) for prompt in prompts]
    lengths = [len(ids) for ids in answers]
    kls, entropies = [], []
    for prompt, ids in zip(prompts, answers, strict=True):
        texts = texts_of_ids(torch.tensor([[*prompt, *ids]]), len(prompt))
        with torch.no_grad():
            ours = policy_pass(trainer, trainer.model, texts)
            theirs = reference_pass(trainer, trainer.roles, trainer.reference, texts)
        kls.append((ours.logps - theirs.logps).sum().item())
        entropies += ours.entropies.flatten().tolist()
    scores = [0.0 if length == 3 else 0.5 * length for length in lengths]
    judged = [0.5 * length for length in lengths if length != 3]
    assert 0 < len(judged) < 7, "some are left out by one function"
    mean = lambda values: sum(values) / len(values)  # noqa: E731
    expected = {
        "eval_kl": mean(kls),
        "eval_kl_per_token": sum(kls) / sum(lengths),
        "eval_entropy": mean(entropies),
        "eval_reward": mean(scores),
        "eval_rewards/count/mean": mean(judged),
        "eval_rewards/zero/mean": 0.0,
        "eval_completions/mean_length": mean(lengths),
        "eval_completions/max_length": max(lengths),
        "eval_completions/clipped_ratio": mean([float(ids[-1] != 1) for ids in answers]),
        "eval_rlhf_reward": mean([score - 0.05 * kl for score, kl in zip(scores, kls, strict=True)]),
    }
    assert {name: metrics[name] for name in expected} == pytest.approx(expected, rel=1e-4, abs=1e-6)
    assert abs(mean(kls)) > 1e-3


def test_a_second_evaluation_begins_anew(make_trainer, rows):
    trainer, first = evaluated(make_trainer, rows, 2)
    trainer.evaluation_loop(trainer.get_eval_dataloader(rows), "left unfinished")  # without a log
    again = trainer.evaluate(rows)
    assert {name: again[name] for name in first} == pytest.approx(first)
    named = trainer.evaluate({"first": rows, "second": rows.select(range(3))})
    assert named["eval_first_kl"] == pytest.approx(first["eval_kl"])
    assert named["eval_second_kl"] != pytest.approx(first["eval_kl"])
    assert named["eval_first_loss"] == pytest.approx(first["eval_loss"])


def test_each_prompt_may_have_several_completions_and_come_from_a_stream(make_trainer, rows):
    _, metrics = evaluated(make_trainer, rows, 4, num_generations_eval=2)
    _, others = evaluated(make_trainer, rows, 14, num_generations_eval=2)
    assert metrics == pytest.approx(others, rel=1e-4, abs=1e-6)
    stream = IterableDataset.from_generator(lambda: iter([{"prompt": text} for text in WORDS]))
    _, streamed = evaluated(make_trainer, stream, 4)
    _, listed = evaluated(make_trainer, rows, 4)
    assert streamed == pytest.approx(listed, rel=1e-4, abs=1e-6)
    assert_close(torch.tensor(streamed["eval_kl"]), torch.tensor(listed["eval_kl"]))
