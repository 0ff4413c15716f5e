"""The comparison of a policy with its reference, against counts and sums made by hand."""

import json
import math
import re

import pytest
import torch
from datasets import Dataset

from rlhf_recipes.evaluation.policy import evaluate_policy, side_by_side, write_evaluation
from rlhf_recipes.models import load_causal_lm, load_policy


def gold_length(completion_ids, **kwargs):
    return [float(len(ids)) for ids in completion_ids]


@pytest.fixture
def trainer(make_trainer, reward_adapter):
    return make_trainer(reward_funcs=[str(reward_adapter), gold_length], reward_weights=[1.0, 0.0])


def nudge(trainer):
    """Move the policy off its reference."""
    with torch.no_grad():
        for name, parameter in trainer.model.named_parameters():
            if ".default." in name:
                parameter.add_(torch.randn_like(parameter) * 0.05)


def test_an_untrained_policy_is_no_better_than_its_reference(trainer, prompts):
    evaluation = evaluate_policy(trainer, prompts, gold="gold_length", rows=120)
    assert evaluation["policy"]["kl"] == evaluation["reference"]["kl"] == 0.0
    low, high = evaluation["win_rate_ci"]
    assert low < 0.5 < high
    assert [row["policy"] for row in evaluation["samples"]] != [row["reference"] for row in evaluation["samples"]]
    assert (evaluation["rows"], evaluation["prompts"], evaluation["win_rate_by"]) == (120, 16, "gold_score")


def test_the_numbers_equal_sums_made_by_hand(make_trainer, reward_adapter, sft_adapter, tiny_model_path, prompts):
    seen = []

    def spy(prompt_ids, completion_ids, **kwargs):
        seen.extend(zip(prompt_ids, completion_ids, strict=True))
        return [float(len(ids)) for ids in completion_ids]

    trainer = make_trainer(reward_funcs=[str(reward_adapter), spy], reward_weights=[1.0, 0.0])
    nudge(trainer)
    evaluation = evaluate_policy(trainer, prompts, gold="spy", rows=16)
    policy, reference = seen[:16], seen[16:]
    assert len(reference) == 16
    original = load_policy(load_causal_lm(tiny_model_path), sft_adapter)
    kl = 0.0
    for prompt, completion in policy:
        ids = torch.tensor([prompt + completion])
        with torch.no_grad():
            logps = [model(input_ids=ids).logits[0].log_softmax(-1) for model in (trainer.model, original)]
        for position, token in enumerate(completion, start=len(prompt) - 1):
            kl += (logps[0][position, token] - logps[1][position, token]).item() / 16
    scores = trainer.roles.scores("reward_0", [prompt + completion for prompt, completion in policy], 0, 16)
    eos = trainer.processing_class.eos_token_id
    assert evaluation["policy"]["kl"] == pytest.approx(kl, rel=1e-3)
    assert evaluation["policy"]["reward_score"] == pytest.approx(scores.mean().item(), abs=1e-5)
    for side, rows in (("policy", policy), ("reference", reference)):
        lengths = [len(ids) for _, ids in rows]
        assert evaluation[side]["length"] == evaluation[side]["gold_score"] == pytest.approx(sum(lengths) / 16)
        assert evaluation[side]["eos_rate"] == sum(ids[-1] == eos for _, ids in rows) / 16
    wins = [(len(a) > len(b)) + (len(a) == len(b)) / 2 for (_, a), (_, b) in zip(policy, reference, strict=True)]
    assert evaluation["win_rate"] == sum(wins) / 16
    assert evaluation["win_rate_ci"][0] <= evaluation["win_rate"] <= evaluation["win_rate_ci"][1]


def test_the_same_seed_gives_the_same_evaluation_and_training_goes_on_unchanged(trainer, prompts):
    nudge(trainer)
    torch.manual_seed(5)
    expected_next = torch.rand(3)
    torch.manual_seed(5)
    first = evaluate_policy(trainer, prompts, rows=8, seed=1)
    assert torch.equal(torch.rand(3), expected_next), "the evaluation must not use the training's random numbers"
    assert evaluate_policy(trainer, prompts, rows=8, seed=1) == first
    assert evaluate_policy(trainer, prompts, rows=8, seed=2)["samples"] != first["samples"]
    assert trainer.model.training


def test_wins_only_have_the_interval_of_as_many_prompts(make_trainer, reward_adapter, prompts):
    """Which is Wilson's, `16 / (16 + z^2)` to 1: a bootstrap of equal outcomes would say [1, 1]."""
    calls = []

    def falling(completion_ids, **kwargs):
        calls.append(None)  # the policy is sampled before its reference
        return [-float(len(calls))] * len(completion_ids)

    trainer = make_trainer(reward_funcs=[str(reward_adapter), falling], reward_weights=[1.0, 0.0])
    evaluation = evaluate_policy(trainer, prompts, gold="falling", rows=32)
    assert (evaluation["win_rate"], evaluation["prompts"]) == (1.0, 16)
    assert evaluation["win_rate_ci"] == pytest.approx([16 / (16 + 1.959964**2), 1.0], abs=1e-6)


def test_without_gold_the_reward_judges(trainer, prompts):
    evaluation = evaluate_policy(trainer, prompts, rows=8)
    assert evaluation["win_rate_by"] == "reward_score"
    assert evaluation["policy"]["gold_score"] is None


def test_more_rows_than_batches_are_cut_to_the_asked_number(trainer, prompts):
    evaluation = evaluate_policy(trainer, prompts.select(range(3)), rows=11)
    assert (evaluation["rows"], evaluation["prompts"], len(evaluation["samples"])) == (11, 3, 11)


def test_the_file_holds_the_evaluation_and_the_table_its_numbers(trainer, prompts, tmp_path):
    evaluation = evaluate_policy(trainer, prompts, gold="gold_length", rows=8)
    table = write_evaluation(evaluation, tmp_path)
    assert json.loads((tmp_path / "evaluation.json").read_text()) == evaluation
    low, high = evaluation["win_rate_ci"]
    win = f"win rate of the policy by gold score: {evaluation['win_rate']:.3f}, 95 % interval [{low:.3f}, {high:.3f}]"
    assert win in table.splitlines()
    low, high = evaluation["length_controlled_win_rate_ci"]
    fair = f"{evaluation['length_controlled_win_rate']:.3f}, 95 % interval [{low:.3f}, {high:.3f}]"
    assert f"if both sides wrote texts of equal length: {fair}" in table.splitlines()
    cells = {row[0]: row[1:] for row in (re.split(" {2,}", line) for line in table.splitlines())}
    means = {side: evaluation[side] for side in ("policy", "reference")}
    assert cells["held-out prompts"] == list(means)
    assert cells["length (tokens)"] == [f"{mean['length']:.1f}" for mean in means.values()]
    assert cells["ended by themselves"] == [f"{100 * mean['eos_rate']:.1f}%" for mean in means.values()]
    assert cells["KL (nats)"][1] == "0.000"
    assert cells["gold score"] == [f"{mean['gold_score']:.3f}" for mean in means.values()]
    rewards = evaluation["policy"].pop("rewards")
    assert all(math.isfinite(value) for value in evaluation["policy"].values())
    assert rewards["reward"] == pytest.approx(evaluation["policy"]["reward_score"], rel=1e-6)
    assert rewards["gold_length"] == evaluation["policy"]["length"]


def test_a_reward_that_a_row_does_not_have_is_not_in_its_mean(make_trainer, reward_adapter, prompts):
    def of_every_second(completion_ids, **kwargs):
        return [float(row) if row % 2 else None for row in range(len(completion_ids))]

    trainer = make_trainer(reward_funcs=[str(reward_adapter), of_every_second], per_device_eval_batch_size=8)
    evaluation = evaluate_policy(trainer, prompts, rows=8)
    assert evaluation["policy"]["rewards"]["of_every_second"] == (1 + 3 + 5 + 7) / 4


def test_errors(trainer, prompts):
    with pytest.raises(ValueError, match=r"named 'truth'; there are \['reward', 'gold_length'\]"):
        evaluate_policy(trainer, prompts, gold="truth")
    with pytest.raises(ValueError, match="at least one held-out prompt"):
        evaluate_policy(trainer, Dataset.from_dict({"prompt": []}))


def test_side_by_side_says_who_wins_by_the_gold_score_or_else_the_reward():
    def row(text, reward, gold):
        return {"completion": text, "reward_score": reward, "gold_score": gold}

    policy = [row("a", 1.0, 2.0), row("b", 9.0, 1.0), row("c", 0.0, 3.0), row("not asked for", 0.0, 0.0)]
    reference = [row("d", 5.0, 1.0), row("e", 0.0, 4.0), row("f", 1.0, 3.0)]
    rows = side_by_side(["p", "q", "r"], policy, reference)
    assert [one["outcome"] for one in rows] == ["win", "loss", "tie"]
    assert list(rows[1]) == [
        *("prompt", "policy", "policy_reward", "policy_gold"),
        *("reference", "reference_reward", "reference_gold", "outcome"),
    ]
    assert list(rows[1].values()) == ["q", "b", 9.0, 1.0, "e", 0.0, 4.0, "loss"]

    no_gold = [[one | {"gold_score": None} for one in side] for side in (policy, reference)]
    assert [one["outcome"] for one in side_by_side(["p", "q", "r"], *no_gold)] == ["loss", "win", "loss"]
    no_score = [[one | {"reward_score": None} for one in side] for side in no_gold]
    assert [one["outcome"] for one in side_by_side(["p"], *no_score)] == [None]
    assert list(side_by_side(["p"], policy, None)[0]) == ["prompt", "policy", "policy_reward", "policy_gold"]
