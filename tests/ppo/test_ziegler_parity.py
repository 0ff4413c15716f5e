"""PPO with the settings of Ziegler et al. against the formulas of their code, written down here in float64.

The formulas are those of `train_policy.py` and `lm_tasks.py` in openai/lm-human-preferences, which
vwxyzjn/lm-human-preference-details has in PyTorch: the fixed score, the reward with the KL, whitening, GAE, the two
clipped losses and the controller of the KL.
"""

import numpy as np
import pytest
import torch
import yaml

from rlhf_recipes.ppo.objective import critic_loss, policy_loss
from rlhf_recipes.ppo.passes import PolicyPass
from rlhf_recipes.ppo.rollout import Rollout
from rlhf_recipes.shaping import AdaptiveKLController
from tests.ppo.support import rollout_and_record, without_chance

LENGTH, AFTER, STOP = 8, 3, 9  # of the completions here; the recipe's: 24, 16 and the full stop
KL_COEF, TARGET, HORIZON, LAMBDA, CLIP, VF_COEF, MISSING = 0.15, 6.0, 10_000, 0.95, 0.2, 0.1, -1.0
SEED = 7


# 1. Their formulas
def fixed_score(scores, responses):
    """`filter_fn`: without the token at or behind a position the score is -1."""
    valid = (responses[:, AFTER:] == STOP).any(axis=1)
    return np.where(valid, scores, MISSING)


def rewards_of(scores, logprobs, ref_logprobs, kl_coef):
    """`compute_rewards`: the KL at every token, the score on the last one."""
    rewards = -kl_coef * (logprobs - ref_logprobs)
    rewards[:, -1] += scores
    return rewards


def whitened(values, shift_mean=True):
    """`whiten`, with the population variance of `tf.nn.moments`."""
    mean, variance = values.mean(), ((values - values.mean()) ** 2).mean()
    result = (values - mean) / np.sqrt(variance + 1e-8)
    return result if shift_mean else result + mean


def advantages_and_returns(rewards, values):
    """`loss`: GAE from the last token to the first, with gamma 1; the returns are not whitened."""
    last, found = np.zeros(len(rewards)), np.zeros_like(rewards)
    for t in reversed(range(rewards.shape[1])):
        following = values[:, t + 1] if t + 1 < rewards.shape[1] else 0.0
        last = rewards[:, t] + following - values[:, t] + LAMBDA * last
        found[:, t] = last
    return whitened(found), found + values


def losses_of(new_logprobs, logprobs, new_values, values, advantages, returns):
    """`loss`: the clipped policy loss, the clipped value loss, and their sum."""
    ratio = np.exp(new_logprobs - logprobs)
    policy = np.maximum(-advantages * ratio, -advantages * np.clip(ratio, 1 - CLIP, 1 + CLIP)).mean()
    clipped = np.clip(new_values, values - CLIP, values + CLIP)
    value = 0.5 * np.maximum((new_values - returns) ** 2, (clipped - returns) ** 2).mean()
    return policy, value, policy + VF_COEF * value


def controlled(value, kl, episodes):
    """`AdaptiveKLController.update`."""
    return value * (1 + np.clip(kl / TARGET - 1, -0.2, 0.2) * episodes / HORIZON)


# 2. The same run through the trainer
@pytest.fixture(scope="module")
def settings(repo_root):
    """What the recipe sets that is not about size, as the paper's YAML has it."""
    fields = yaml.safe_load((repo_root / "recipes/lm_human_preferences/paper_ppo.yaml").read_text())
    names = ("temperature", "missing_eos_penalty", "missing_eos_mode", "kl_coef", "kl_controller", "kl_target")
    names += ("kl_horizon", "whiten_rewards", "critic", "num_iterations", "tensorflow_adam")
    return {name: fields[name] for name in names}


def response(prompt, repeat):
    """A completion of fixed length; about half of them have the token in the window."""
    generator = torch.Generator().manual_seed(sum(prompt) * 31 + repeat)
    return torch.randint(6, 18, (LENGTH,), generator=generator).tolist()


def moved(model):
    """Move the policy from its reference, so that there is a KL, and give the critic values."""
    generator = torch.Generator().manual_seed(SEED)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            size = 1.0 if "critic" in name else 0.3
            parameter.data += size * torch.randn(parameter.shape, generator=generator)


@pytest.fixture
def found(make_trainer, tiny_tokenizer, settings):
    """One rollout: the trainer, its tensors in float64, the raw scores, and the responses."""
    word = tiny_tokenizer.convert_ids_to_tokens(STOP)
    fields = {**settings, "max_completion_length": LENGTH, "truncate_tokens": [word], "truncate_after": AFTER}
    trainer = without_chance(make_trainer(**fields, gradient_accumulation_steps=4), response)
    trainer.state.global_step = 1  # before the first step policy and reference must be the same
    batch, record = rollout_and_record(trainer, rows=16, prepare=moved)
    names = ("old_per_token_logps", "ref_per_token_logps", "old_values", "advantages", "returns")
    tensors = {name: batch[name].double().numpy() for name in names}
    return trainer, batch, tensors, record.rewards[:, 0].double().numpy(), batch["completion_ids"].numpy()


def test_advantages_and_returns(found):
    trainer, _, ours, raw, responses = found
    logprobs, ref_logprobs, values = (
        ours[f"{name}"] for name in ("old_per_token_logps", "ref_per_token_logps", "old_values")
    )
    scores = fixed_score(raw, responses)
    assert 0 < (scores == MISSING).sum() < len(scores), "both kinds are in the rollout"
    assert np.abs((logprobs - ref_logprobs).sum(axis=1)).mean() > 0.5
    assert values.std() > 0.1
    rewards = whitened(rewards_of(scores, logprobs, ref_logprobs, KL_COEF), shift_mean=False)
    advantages, returns = advantages_and_returns(rewards, values)
    np.testing.assert_allclose(ours["returns"], returns, rtol=1e-4, atol=2e-5)
    np.testing.assert_allclose(ours["advantages"], advantages, rtol=1e-4, atol=2e-5)
    kl = (logprobs - ref_logprobs).sum(axis=1).mean()
    assert trainer.kl_controller.value == pytest.approx(controlled(KL_COEF, kl, len(scores)), rel=1e-6)


def test_losses(found):
    trainer, batch, ours, _, _ = found
    generator = torch.Generator().manual_seed(SEED)
    noise = [torch.randn(batch["advantages"].shape, generator=generator) for _ in range(2)]
    new = PolicyPass(batch["old_per_token_logps"] + 0.3 * noise[0], torch.zeros_like(noise[0]))
    values = batch["old_values"] + 0.4 * noise[1]
    rollout = Rollout.from_batch(batch)
    policy, _ = policy_loss(new, rollout, trainer.args, kl_coef=0.0, entropy_coef=0.0)
    critic, metrics = critic_loss(values, rollout, trainer.args)
    old_logprobs, _, old_values, advantages, returns = ours.values()
    ours = new.logps.double().numpy(), old_logprobs, values.double().numpy(), old_values, advantages, returns
    expected = losses_of(*ours)
    assert policy.item() == pytest.approx(expected[0], rel=1e-5, abs=1e-6)
    assert metrics.means["critic/value_loss"][0].item() == pytest.approx(expected[1], rel=1e-5)
    assert (policy + critic).item() == pytest.approx(expected[2], rel=1e-5, abs=1e-6)


def test_the_controller_over_many_rollouts():
    kls = np.random.default_rng(SEED).gamma(2.0, 6.0, size=200)
    controller, value = AdaptiveKLController(KL_COEF, TARGET, HORIZON), KL_COEF
    for kl in kls:
        controller.update(float(kl), 512)
        value = controlled(value, kl, 512)
        assert controller.value == pytest.approx(value, rel=1e-12)
    assert value != pytest.approx(KL_COEF, rel=0.1)


def test_the_papers_settings_are_those_of_the_code(repo_root):
    """`launch.py`, `train_policy.py` and `utils/core.py` of openai/lm-human-preferences, task sentiment."""
    folder = repo_root / "recipes" / "lm_human_preferences"
    ppo, reward = (yaml.safe_load((folder / f"paper_{name}.yaml").read_text()) for name in ("ppo", "reward"))
    batch = ppo["per_device_train_batch_size"] * ppo["gradient_accumulation_steps"]
    assert (batch, ppo["max_steps"] // ppo["num_iterations"]) == (512, 1_000_000 // 512)
    expected = {
        "temperature": 0.7,
        "max_completion_length": 24,
        "truncate_tokens": ["."],
        "truncate_after": 16,
        "missing_eos_penalty": 1.0,
        "learning_rate": "1e-5",
        "critic_learning_rate": "1e-5",
        "kl_coef": 0.15,
        "kl_target": 6.0,
        "kl_horizon": 10_000,
        "num_iterations": 4,
        "max_grad_norm": 0.0,
    }
    assert {name: ppo[name] for name in expected} == expected
    assert (reward["max_train_rows"], reward["per_device_train_batch_size"], reward["learning_rate"]) == (
        4992,
        32,
        "5e-5",
    )
