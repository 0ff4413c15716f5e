"""Completions cut at a stop token, judged as if they had ended there, and trained on as they were sampled."""

import pytest
import torch

from rlhf_recipes.evaluation.policy import evaluate_policy
from rlhf_recipes.rewards import Truncation, truncate
from tests.ppo.support import rollout, rollout_and_record, unpadded, without_chance

STOP, EOS, PAD = 13, 1, 0


def completion(*stops, length=24):
    return [STOP if position in stops else 100 + position for position in range(length)]


@pytest.mark.parametrize(
    ("stops", "kept", "found"),
    [((5, 18), 19, True), ((5,), 24, False), ((16,), 17, True), ((15, 23), 24, True), ((), 24, False)],
)
def test_numbers(stops, kept, found):
    ids = completion(*stops)
    assert truncate(ids, [STOP], start=16) == (ids[:kept], found)
    assert len(ids) == 24, "the policy's own tokens stay"


@pytest.mark.parametrize("chat", [False, True])
def test_what_is_cut_is_a_whole_text(tiny_tokenizer, chat):
    texts = ["the film was good and warm", "this story", "the film good film <eos>"]
    ids = [tiny_tokenizer(text)["input_ids"] for text in texts]
    given = [[{"role": "assistant", "content": text}] for text in texts] if chat else texts
    cut = Truncation(tiny_tokenizer, [EOS], tokens=["and", "story"], start=2)
    judged, judged_ids, finished = cut(given, ids)
    expected = ["the film was good and", *texts[1:]]
    assert judged == ([[{"role": "assistant", "content": text}] for text in expected] if chat else expected)
    assert judged_ids == [[*ids[0][:5], EOS], ids[1], ids[2]]
    assert finished == [True, False, False], "an end token outside of the window is none"
    assert len(ids[0]) == 6, "the sampled tokens stay"


def test_without_tokens_nothing_is_cut_and_the_end_token_decides(tiny_tokenizer):
    ids = [[6, 7, EOS], [6, 7, 8], [6, 7, PAD]]
    cut = Truncation(tiny_tokenizer, [EOS, 8])
    assert cut(["a", "b", "c"], ids) == (["a", "b", "c"], ids, [True, True, False])
    assert cut.finished(ids, as_trl_counts=True) == [True, True, True]


# Of eight tokens each: cut at position 5, at 3 (the first one from there), never, and never but with an end token
STOPPED = 9  # the tiny tokenizer's "and"
ROWS = [
    [6, STOPPED, 7, 8, 10, STOPPED, 6, 7],
    [6, 7, 8, STOPPED, 6, STOPPED],
    [6, STOPPED, 7, 8, 10, 6, 7, 8],
    [6, EOS],
]
FIELDS = {"truncate_after": 3, "missing_eos_penalty": 1.0, "missing_eos_mode": "replace", "kl_coef": 0.0}


@pytest.fixture
def made_up(make_trainer, tiny_tokenizer):
    """A trainer whose completions are those of `ROWS`, in turn."""

    def make(**fields):
        rows = iter([ROWS[i % 4] for i in range(10_000)])
        word = tiny_tokenizer.convert_ids_to_tokens(STOPPED)
        fields = {"truncate_tokens": [word], "whiten_advantages": False, **FIELDS, **fields}
        return without_chance(make_trainer(**fields), lambda prompt, repeat: list(next(rows)))

    return make


def test_rewards_read_the_cut_text_and_ppo_trains_on_all_of_it(made_up):
    seen = {}

    def count(completions, completion_ids, finished, **kwargs):
        seen.update(completions=completions, ids=completion_ids, finished=finished)
        return [float(len(ids)) for ids in completion_ids]

    trainer = made_up(reward_funcs=count, critic_init="policy", gae_lambda=1.0)
    batch, record = rollout_and_record(trainer)
    assert seen["ids"][:4] == [[*ROWS[0][:6], EOS], [*ROWS[1][:4], EOS], ROWS[2], ROWS[3]]
    assert [len(text.split()) for text in seen["completions"][:4]] == [6, 4, 8, 1]
    assert seen["finished"][:4] == record.finished[:4] == [True, True, False, False]
    assert record.completion_ids[:4] == ROWS
    assert [unpadded(batch, row)[1] for row in range(4)] == ROWS
    # With a zero critic, lambda 1 and no KL a return is the score to come: at the first token all of it
    assert batch["returns"][:4, 0].tolist() == pytest.approx([7.0, 5.0, -1.0, -1.0], abs=1e-6)
    metrics = trainer._metrics["train"]
    assert metrics["completions/clipped_ratio"][-1] == 0.5
    assert metrics["score/missing_eos"][-1] == pytest.approx((-9.0 - 3.0) / 4)


def test_an_adapter_scores_the_cut_text_with_an_end_token(made_up):
    trainer = made_up()
    batch, record = rollout_and_record(trainer)
    role = trainer.reward_funcs[0].role
    judged = [[*ROWS[0][:6], EOS], [*ROWS[1][:4], EOS], *ROWS[2:]]
    sequences = [unpadded(batch, row)[0] + ids for row, ids in enumerate(judged)]
    expected = [scores[-1].item() for scores in trainer.roles.prefix_scores(role, sequences, PAD, 4)]
    assert record.rewards[:4, 0].tolist() == pytest.approx(expected, abs=1e-5)


def test_the_evaluation_reads_as_the_training_does(make_trainer, tiny_tokenizer):
    def finished(finished, **kwargs):
        return [float(one) for one in finished]

    words = [tiny_tokenizer.convert_ids_to_tokens(token) for token in range(9, 20)]
    trainer = make_trainer(reward_funcs=finished, critic_init="policy", truncate_tokens=words, truncate_after=6)
    found = evaluate_policy(trainer, trainer.train_dataset, rows=32)["policy"]
    assert found["eos_rate"] == pytest.approx(found["reward_score"])
    assert 0.1 < found["eos_rate"] < 1.0


def test_it_trains(made_up):
    trainer = made_up(max_steps=2)
    trainer.train()
    assert trainer.state.global_step == 2


def test_what_looks_at_single_tokens_is_refused(made_up, make_trainer):
    def per_token(completion_ids, **kwargs):
        return [[0.1] * len(ids) for ids in completion_ids]

    with pytest.raises(ValueError, match=r"'per_token' returned rewards per token, but `truncate_tokens`"):
        rollout(made_up(reward_funcs=per_token, critic_init="policy"))
    with pytest.raises(ValueError, match=r"`potential` .* `truncate_tokens`"):
        made_up(potential=per_token)
    with pytest.raises(ValueError, match="'one two' is not one token"):
        make_trainer(truncate_tokens=["one two"])


def test_the_rollout_is_the_same_without_truncation_where_no_score_is_read(made_up):
    """What the policy is trained on does not depend on the cut: with equal scores the rollouts are equal."""

    def nothing(completions, **kwargs):
        return [0.5] * len(completions)

    plain, cut = (
        rollout(made_up(reward_funcs=nothing, critic_init="policy", missing_eos_penalty=None, **fields))
        for fields in (
            {"truncate_tokens": None, "truncate_after": 0, "missing_eos_mode": "subtract"},
            {"missing_eos_mode": "subtract"},
        )
    )
    for name in ("completion_ids", "advantages", "returns", "old_per_token_logps"):
        torch.testing.assert_close(cut[name], plain[name], rtol=0, atol=0)
