"""What each token is paid in a rollout, against scores of models that are loaded one by one and loops in float64.

With gamma 1, lambda 1 and no KL, a token's return is the sum of the rewards from it on: their differences are the
token rewards.
"""

import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, PeftModel, get_peft_model
from torch.testing import assert_close
from transformers import AutoModelForSequenceClassification

from rlhf_recipes import PPOConfig
from rlhf_recipes.models import load_causal_lm, load_policy
from rlhf_recipes.ppo.setup import configured_transforms
from rlhf_recipes.ppo.token_rewards import Scored, TokenRewards, pad_rows
from rlhf_recipes.shaping import Completions
from tests.ppo.support import EOS, logged, rollout, unpadded, without_chance

PLAIN = {"kl_coef": 0.0, "gae_lambda": 1.0, "whiten_advantages": False}


@pytest.fixture(scope="module")
def classifier(tiny_model_path, reward_adapter):
    base = AutoModelForSequenceClassification.from_pretrained(
        tiny_model_path, num_labels=1, attn_implementation="eager"
    )
    return PeftModel.from_pretrained(base, reward_adapter).eval()


@torch.no_grad()
def score_of(classifier, ids):
    return classifier(input_ids=torch.tensor([ids])).logits.item()


def rows(trainer):
    """Prompt, completion, token rewards and values of each row of a rollout."""
    batch = rollout(without_chance(trainer))
    for row in range(8):
        prompt, completion = unpadded(batch, row)
        returns = batch["returns"][row, : len(completion)].double().tolist()
        rewards = [here - after for here, after in zip(returns, [*returns[1:], 0.0], strict=True)]
        yield prompt, completion, rewards


def spread(name, score, prompt, completion, classifier):
    """Token rewards by hand."""
    length = len(completion)
    if name == "terminal":
        return [0.0] * (length - 1) + [score]
    if name == "uniform":
        return [score / length] * length
    if name == "every_token":
        return [score] * length
    if name == "discounted":
        weights = [0.5 ** (length - 1 - t) for t in range(length)]
        return [score * weight / sum(weights) for weight in weights]
    if name == "redistributed":
        prefixes = [0.0] + [score_of(classifier, prompt + completion[:t]) for t in range(1, length + 1)]
        return [after - before for before, after in pairwise(prefixes)]
    with torch.no_grad():
        output = classifier(input_ids=torch.tensor([prompt + completion]), output_attentions=True)
    paid = output.attentions[-1][0].double().mean(dim=0)[-1, len(prompt) :]
    shares = (paid / paid.sum()).tolist()
    return [0.7 * score * share + 0.3 * score * (t == length - 1) for t, share in enumerate(shares)]


@pytest.mark.parametrize(
    "placement", ["terminal", "uniform", "every_token", "discounted", "redistributed", "attention"]
)
def test_each_placement_pays_what_it_says(make_trainer, classifier, placement):
    trainer = make_trainer(reward_placement=placement, placement_gamma=0.5, attention_weight=0.7, **PLAIN)
    lengths = set()
    for prompt, completion, rewards in rows(trainer):
        score = score_of(classifier, prompt + completion)
        lengths.add(len(completion))
        expected = spread(placement, score, prompt, completion, classifier)
        assert rewards == pytest.approx(expected, rel=1e-4, abs=1e-5)
        total = score * len(completion) if placement == "every_token" else score
        assert sum(rewards) == pytest.approx(total, rel=1e-4, abs=1e-5)
    assert len(lengths) > 3


@pytest.mark.parametrize("placement", ["redistributed", "attention"])
def test_dense_placements_on_a_model_with_absolute_positions(make_trainer, gpt2_path, tmp_path, placement):
    base = AutoModelForSequenceClassification.from_pretrained(gpt2_path, num_labels=1, attn_implementation="eager")
    lora = LoraConfig(task_type="SEQ_CLS", target_modules=["c_attn", "c_fc"], init_lora_weights=False)
    classifier = get_peft_model(base, lora).eval()
    classifier.save_pretrained(tmp_path / "reward")
    trainer = make_trainer(
        model=gpt2_path,
        peft_config=LoraConfig(task_type="CAUSAL_LM", target_modules=["c_attn"]),
        reward_funcs=str(tmp_path / "reward"),
        reward_placement=placement,
        attention_weight=0.7,
        **PLAIN,
    )
    for prompt, completion, rewards in rows(trainer):
        score = score_of(classifier, prompt + completion)
        assert abs(score) > 1e-3
        expected = spread(placement, score, prompt, completion, classifier)
        assert rewards == pytest.approx(expected, rel=1e-4, abs=1e-5)


@pytest.mark.parametrize("placement", ["redistributed", "attention"])
def test_weights_and_other_rewards_beside_a_dense_placement(make_trainer, classifier, reward_adapter, placement):
    """Half the adapter's score as it is placed; the function's at the end, or by the same attention."""

    def count(completion_ids, **kwargs):
        return [float(len(ids)) for ids in completion_ids]

    rewards_and_weights = {"reward_funcs": [str(reward_adapter), count], "reward_weights": [0.5, 2.0]}
    trainer = make_trainer(reward_placement=placement, attention_weight=0.7, **rewards_and_weights, **PLAIN)
    for prompt, completion, rewards in rows(trainer):
        score = score_of(classifier, prompt + completion)
        if placement == "redistributed":
            expected = [0.5 * r for r in spread(placement, score, prompt, completion, classifier)]
            expected[-1] += 2.0 * len(completion)
        else:
            expected = spread(placement, 0.5 * score + 2.0 * len(completion), prompt, completion, classifier)
        assert rewards == pytest.approx(expected, rel=1e-4, abs=1e-5)


def test_a_placement_of_ones_own(make_trainer, classifier):
    """The mean over the batch is something that only a callable can do."""
    trainer = make_trainer(placement=lambda scores, mask: scores.mean() * mask, **PLAIN)
    found = list(rows(trainer))
    mean = sum(score_of(classifier, prompt + completion) for prompt, completion, _ in found) / 8
    for _, completion, rewards in found:
        assert rewards == pytest.approx([mean] * len(completion), rel=1e-4, abs=1e-5)


def test_a_placement_of_another_shape_is_refused(make_trainer):
    trainer = make_trainer(placement=lambda scores, mask: scores[:, None], **PLAIN)
    with pytest.raises(ValueError, match=r"placement returned token rewards of shape \(8, 1\); expected \(B, T\)"):
        rollout(trainer)


def completions_of(mask):
    ids = [[7] * int(row.sum()) for row in mask]
    return Completions(ids, torch.ones(len(mask), dtype=torch.bool), 8, lambda tensor: tensor, training=True)


@pytest.mark.parametrize(
    ("placed", "where"),
    [
        (lambda scores, mask: scores[:, None] + 0.0 * mask, r"1 on position 2 of completion 1"),
        (lambda scores, mask: scores[:, None] * (torch.arange(3) == 2), "1 on position 2 of completion 1"),
        (lambda scores, mask: torch.full_like(scores[:, None] * mask, math.inf), "on position 2 of completion 1"),
    ],
    ids=["everywhere", "last column", "infinite"],
)
def test_a_placement_that_loses_rewards_is_refused_with_the_row(make_config, placed, where):
    """Row 0 has three tokens, row 1 two, and row 2, which was masked as a whole, none: nothing is lost of that."""
    mask, scores = torch.tensor([[1, 1, 1], [1, 1, 0], [0, 0, 0]]), torch.tensor([2.0, 1.0, 3.0])
    own = TokenRewards(make_config(), placed)
    with pytest.raises(ValueError, match=f"The placement put .*{where}, where no token counts: its 2 tokens"):
        own(Scored(scores), mask, completions_of(mask))
    fine = TokenRewards(make_config(), lambda scores, mask: scores[:, None] * mask / mask.sum(dim=1, keepdim=True))
    rewards, _, _ = fine(Scored(scores), mask, completions_of(mask))  # 0 / 0 in a row without tokens is no reward
    assert_close(rewards, torch.tensor([[2 / 3] * 3, [0.5, 0.5, 0.0], [0.0] * 3]))


@given(st.data())
@settings(max_examples=60)
def test_what_is_placed_adds_up_to_the_transformed_score(data):
    """Every placement of ours, with penalties, rewards that were given per token, and attention over the tokens."""
    lengths = data.draw(st.lists(st.integers(0, 5), min_size=1, max_size=4))
    mask = (torch.arange(5) < torch.tensor(lengths)[:, None]).long()
    numbers = st.floats(-4, 4, width=32)
    scores = torch.tensor(data.draw(st.lists(numbers, min_size=len(lengths), max_size=len(lengths))))
    tokens = torch.tensor(data.draw(st.lists(numbers, min_size=mask.numel(), max_size=mask.numel()))).view(mask.shape)
    placement = data.draw(st.sampled_from(["terminal", "uniform", "discounted", "every_token", "attention"]))
    args = PPOConfig(
        "unused",
        use_cpu=True,
        bf16=False,
        report_to="none",
        reward_placement=placement,
        length_penalty=data.draw(st.sampled_from([None, 0.25])),
        score_clip=data.draw(st.sampled_from([None, 1.5])),
    )
    given_per_token = tokens if data.draw(st.booleans()) else None
    attention = tokens.abs().add(0.1) * mask if placement == "attention" else None
    rewards, transformed, _ = TokenRewards(args)(
        Scored(scores, given_per_token, attention), mask, completions_of(mask)
    )
    given_sum = torch.zeros(len(mask)) if given_per_token is None else (tokens * mask).sum(dim=1)
    times = mask.sum(dim=1) if placement == "every_token" else mask.any(dim=1)
    assert_close(
        rewards.sum(dim=1), given_sum * mask.any(dim=1) + (transformed - given_sum) * times, atol=1e-4, rtol=1e-5
    )
    assert not rewards[mask == 0].any()


def test_score_metrics_add_up(make_trainer):
    """`score/total` is the mean raw score and what every transform added to it (C42, C44)."""
    fields = {
        "score_scaling": "running",
        "score_clip": 0.8,
        "missing_eos_penalty": 1.0,
        "length_penalty": 0.05,
        "overlong_buffer": 4,
        "overlong_penalty": 0.5,
        "ngram_penalty": 0.3,
    }
    trainer = without_chance(make_trainer(**fields, max_steps=4, eval_strategy="steps", eval_steps=2))
    names = [transform.name for transform in configured_transforms(trainer.args)]
    assert len(names) == 6
    trainer.train()
    for prefix, count in (("", 2), ("eval_", 2)):
        raw, total = logged(trainer, f"{prefix}reward"), logged(trainer, f"{prefix}score/total")
        assert len(raw) == len(total) == count
        parts = [logged(trainer, f"{prefix}score/{name}") for name in names]
        assert all(len(part) == count for part in parts)
        for number in range(count):
            added = sum(part[number] for part in parts)
            assert total[number] == pytest.approx(raw[number] + added, abs=1e-5)
    assert sum(any(part) for part in parts) >= 5, "the test needs transforms that do something"


@pytest.mark.parametrize("mode", ["subtract", "replace"])
def test_a_missing_end_token_has_its_price(make_trainer, classifier, mode):
    """C42: TRL's `subtract`, and `replace`, which puts a constant in the score's place; the penalty comes last."""
    trainer = make_trainer(missing_eos_penalty=1.5, missing_eos_mode=mode, score_clip=0.2, **PLAIN)
    cut_off = 0
    for prompt, completion, rewards in rows(trainer):
        score = max(-0.2, min(0.2, score_of(classifier, prompt + completion)))
        if completion[-1] != EOS:
            cut_off += 1
            score = -1.5 if mode == "replace" else score - 1.5
        assert sum(rewards) == pytest.approx(score, rel=1e-4, abs=1e-5)
    assert 0 < cut_off < 8, "the test needs both kinds"


def test_potential_shaping_shifts_every_return_by_the_potential(make_trainer):
    """And so leaves every difference between two ways to go on what it was (gamma 0.9)."""

    def potential(completion_ids, prompt_ids, **kwargs):
        """Of the text before each token: something that depends on all of it."""
        return [
            [math.sin(sum(prompt) + sum(ids[:t])) for t in range(len(ids))]
            for prompt, ids in zip(prompt_ids, completion_ids, strict=True)
        ]

    fields = {**PLAIN, "gamma": 0.9}
    plain = rollout(without_chance(make_trainer(**fields)))
    shaped = rollout(without_chance(make_trainer(**fields, potential=potential)))
    for row in range(8):
        prompt, completion = unpadded(plain, row)
        assert (prompt, completion) == unpadded(shaped, row)
        (phi,) = potential([completion], [prompt])
        length = len(completion)
        expected = plain["returns"][row, :length] - torch.tensor(phi)
        assert_close(shaped["returns"][row, :length], expected, atol=1e-5, rtol=1e-5)
        assert not shaped["returns"][row, length:].any()


def logps_of(model, prompt, completion, temperature):
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([prompt + completion])).logits[0].double() / temperature
    return logits.log_softmax(-1)[len(prompt) - 1 : -1]


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3", "full"])
def test_the_kl_penalty_of_each_token(make_trainer, tiny_model_path, sft_adapter, classifier, estimator):
    """With a policy that has moved, models of its own for policy and reference, and a temperature."""
    fields = {"kl_estimator": estimator, "temperature": 0.7, "reward_placement": "uniform"}
    trainer = make_trainer(**PLAIN | {"kl_coef": 0.3}, **fields)
    policy, reference = (load_policy(load_causal_lm(tiny_model_path), sft_adapter) for _ in range(2))
    mine, theirs = dict(policy.named_parameters()), dict(trainer.model.named_parameters())
    with torch.no_grad():
        for name in [name for name in mine if "lora_B" in name]:
            noise = 0.05 * torch.randn_like(mine[name])
            mine[name].add_(noise)
            theirs[name].add_(noise)
    trainer.state.global_step = 1
    total_kl = 0.0
    for prompt, completion, rewards in rows(trainer):
        new, ref = (logps_of(model, prompt, completion, 0.7) for model in (policy, reference))
        penalties = []
        for t, token in enumerate(completion):
            log_ratio = (ref[t, token] - new[t, token]).item()
            pairs = zip(new[t].tolist(), ref[t].tolist(), strict=True)
            estimates = {
                "k1": -log_ratio,
                "k2": log_ratio**2 / 2,
                "k3": math.exp(log_ratio) - 1 - log_ratio,
                "full": sum(math.exp(p) * (p - q) for p, q in pairs),
            }
            penalties.append(estimates[estimator])
        share = score_of(classifier, prompt + completion) / len(completion)
        assert rewards == pytest.approx([share - 0.3 * penalty for penalty in penalties], rel=1e-4, abs=2e-5)
        total_kl += sum(penalties) / 8
    assert abs(total_kl) > 0.01
    assert trainer._metrics["train"]["kl"][-1] == pytest.approx(total_kl, rel=1e-3, abs=1e-5)


def test_whitened_rewards_keep_their_mean(make_trainer):
    """Divided by the standard deviation over all tokens of the rollout, as `whiten(shift_mean=False)` (C45)."""
    fields = {**PLAIN, "reward_placement": "uniform"}
    plain = [rewards for _, _, rewards in rows(make_trainer(**fields))]
    scaled = [rewards for _, _, rewards in rows(make_trainer(**fields, whiten_rewards=True))]
    tokens = [reward for rewards in plain for reward in rewards]
    mean = sum(tokens) / len(tokens)
    deviation = math.sqrt(sum((reward - mean) ** 2 for reward in tokens) / len(tokens))
    for before, after in zip(plain, scaled, strict=True):
        expected = [(reward - mean) / deviation + mean for reward in before]
        assert after == pytest.approx(expected, rel=1e-3, abs=1e-4)


@pytest.mark.parametrize("fields", [{"gae_lambda_alpha": 0.5}, {"gae_lambda": 0.8, "critic_lambda": 0.3}])
def test_lambda_of_the_length_and_of_the_critic(make_trainer, fields):
    """VAPO: lambda is 1 - 1 / (alpha x length) of each completion; the critic's targets may have another one."""
    rewards_by_text = {tuple(p + c): r for p, c, r in rows(make_trainer(**PLAIN, reward_placement="uniform"))}
    batch = rollout(without_chance(make_trainer(**PLAIN | {"gamma": 0.95} | fields, reward_placement="uniform")))
    for row in range(8):
        prompt, completion = unpadded(batch, row)
        rewards, length = rewards_by_text[tuple(prompt + completion)], len(completion)
        values = batch["old_values"][row, :length].double().tolist()
        lam = max(0.0, 1 - 1 / (0.5 * length)) if "gae_lambda_alpha" in fields else 0.8
        critic_lam = fields.get("critic_lambda", lam)
        after = [*values[1:], 0.0]
        deltas = [r + 0.95 * v1 - v0 for r, v1, v0 in zip(rewards, after, values, strict=True)]
        for t in range(length):
            advantage = sum((0.95 * lam) ** (k - t) * deltas[k] for k in range(t, length))
            target = values[t] + sum((0.95 * critic_lam) ** (k - t) * deltas[k] for k in range(t, length))
            assert batch["advantages"][row, t].item() == pytest.approx(advantage, rel=1e-4, abs=1e-5)
            assert batch["returns"][row, t].item() == pytest.approx(target, rel=1e-4, abs=1e-5)


def test_rows_are_padded_on_the_right_and_none_is_0():
    mask = torch.tensor([[1, 1, 0], [1, 1, 1], [1, 0, 0]])
    padded = pad_rows([[1.0, 2.0], torch.tensor([3.0, 4.0, 5.0]), None], mask)
    assert padded.tolist() == [[1.0, 2.0, 0.0], [3.0, 4.0, 5.0], [0.0, 0.0, 0.0]]
