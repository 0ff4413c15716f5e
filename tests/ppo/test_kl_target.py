"""The adaptive KL coefficient in both units of its target, and what is said of a target in the wrong one."""

import logging

import pytest

from rlhf_recipes import PPOTrainer
from rlhf_recipes.ppo import checks

ADAPTIVE = {"kl_controller": "adaptive", "kl_coef": 0.1, "kl_horizon": 16}
THREE_ROLLOUTS = {"max_steps": 6, "learning_rate": 5e-3}  # two optimizer steps on each


def logged(trainer, name):
    return [line[name] for line in trainer.state.log_history if name in line]


@pytest.fixture
def rollouts(monkeypatch):
    """KL of each rollout's completions, token by token, without padding."""
    original, rollouts = PPOTrainer._run_networks, []

    def watched(trainer, texts):
        outputs = original(trainer, texts)
        rows = zip(outputs[-1], texts.completion_mask.bool(), strict=True)
        rollouts.append([[value.item() for value in row[counts]] for row, counts in rows])
        return outputs

    monkeypatch.setattr(PPOTrainer, "_run_networks", watched)
    return rollouts


@pytest.mark.parametrize("unit", ["completion", "token"])
def test_the_coefficient_follows_the_kl_in_the_unit_of_its_target(make_trainer, rollouts, unit, monkeypatch):
    target, seen = 1e-3, []
    trainer = make_trainer(**ADAPTIVE, **THREE_ROLLOUTS, kl_target=target, kl_target_per=unit)
    monkeypatch.setattr(checks, "looks_like_per_token", lambda *given: seen.append(given))
    trainer.train()
    assert len({len(row) for row in rollouts[1]}) > 1, "the test needs completions of different lengths"
    expected, value = [], 0.1
    for rows in rollouts:
        expected.append(value)
        kls = [sum(row) / (len(row) if unit == "token" else 1) for row in rows]
        value *= 1 + min(max(sum(kls) / len(kls) / target - 1, -0.2), 0.2) * len(rows) / 16
    assert logged(trainer, "kl_coef") == pytest.approx(expected, rel=1e-5)
    assert trainer.kl_controller.value == pytest.approx(value, rel=1e-5)
    measured = zip(logged(trainer, "kl"), logged(trainer, "kl_per_token"), strict=True)
    assert seen == ([(target, *both) for both in measured] if unit == "completion" else [])


def test_a_target_in_the_wrong_unit_is_reported(make_config, caplog):
    args = make_config(**ADAPTIVE, kl_target=0.1)
    with caplog.at_level(logging.WARNING, logger="rlhf_recipes.ppo.checks"):
        assert not checks.warn_of_kl_unit(args, 0.4, 0.05), "missed, but not by the length of a completion"
        assert not caplog.records
        assert checks.warn_of_kl_unit(args, 3.6, 0.12)
    (said,) = [record.getMessage() for record in caplog.records]
    assert "`kl_target` is 0.1 nats per completion, but completions are 3.6 nats from the reference, 0.12 for" in said
    assert "`kl_target_per: token`" in said


@pytest.mark.parametrize(
    "fields", [{"kl_controller": "fixed"}, {"kl_controller": "adaptive", "kl_target_per": "token"}]
)
def test_a_target_that_is_not_read_or_is_per_token_is_not_reported(make_config, caplog, fields):
    with caplog.at_level(logging.WARNING, logger="rlhf_recipes.ppo.checks"):
        assert not checks.warn_of_kl_unit(make_config(kl_target=0.1, **fields), 3.6, 0.12)
    assert not caplog.records


def test_a_run_reports_it_once(make_trainer, caplog, monkeypatch):
    trainer = make_trainer(**ADAPTIVE, **THREE_ROLLOUTS)
    monkeypatch.setattr(checks, "looks_like_per_token", lambda *numbers: True)
    with caplog.at_level(logging.WARNING, logger="rlhf_recipes.ppo.checks"):
        trainer.train()
    assert len(logged(trainer, "kl")) == 3
    assert len(caplog.records) == 1
