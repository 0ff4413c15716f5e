"""The adaptive KL coefficient in both units of its target, and what is said of a target in the wrong one."""

import logging

import pytest

import rlhf_recipes.ppo.trainer as ppo_trainer
from rlhf_recipes.ppo import checks

ADAPTIVE = {"kl_controller": "adaptive", "kl_coef": 0.1, "kl_horizon": 16}
THREE_ROLLOUTS = {"max_steps": 6, "learning_rate": 5e-3}  # two optimizer steps on each


def logged(trainer, name):
    return [line[name] for line in trainer.state.log_history if name in line]


@pytest.fixture
def rollouts(monkeypatch):
    """KL of each rollout's completions, token by token, without padding."""
    original, found = ppo_trainer.policy_and_reference, []

    def watched(trainer, batch, batch_size):
        made = original(trainer, batch, batch_size)
        counts = batch["completion_mask"].bool()
        rows = zip(made["kl"], counts, strict=True)
        found.append([[value.item() for value in row[kept]] for row, kept in rows])
        return made

    monkeypatch.setattr(ppo_trainer, "policy_and_reference", watched)
    return found


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


def test_a_target_in_the_wrong_unit_is_reported_once(make_trainer, caplog):
    trainer = make_trainer(**ADAPTIVE, kl_target=0.1)
    with caplog.at_level(logging.WARNING, logger="rlhf_recipes.ppo.checks"):
        trainer._check_kl_unit({"kl": 0.4, "kl_per_token": 0.05})
        assert not caplog.records, "missed, but not by the length of a completion"
        for _ in range(2):
            trainer._check_kl_unit({"kl": 3.6, "kl_per_token": 0.12})
    (said,) = [record.getMessage() for record in caplog.records]
    assert "`kl_target` is 0.1 nats per completion, but completions are 3.6 nats from the reference, 0.12 for" in said
    assert "`kl_target_per: token`" in said


@pytest.mark.parametrize(
    "fields", [{"kl_controller": "fixed"}, {"kl_controller": "adaptive", "kl_target_per": "token"}]
)
def test_a_target_that_is_not_read_or_is_per_token_is_not_reported(make_trainer, caplog, fields):
    trainer = make_trainer(kl_target=0.1, **fields)
    with caplog.at_level(logging.WARNING, logger="rlhf_recipes.ppo.checks"):
        trainer._check_kl_unit({"kl": 3.6, "kl_per_token": 0.12})
    assert not caplog.records
