"""The pass that scores a rollout of one micro-batch is also the first update's: the run is the same without it."""

import pytest
import torch
from torch.testing import assert_close

from rlhf_recipes.ppo import anchor
from tests.ppo.support import logged, rollout, trained, without_chance

ONE = {"per_device_train_batch_size": 8, "gradient_accumulation_steps": 1, "num_iterations": 2, "max_steps": 6}
CRITICS = {"head": {"critic": "head"}, "adapter": {}, "upper_half": {"critic_layers": 1}}


def run(make_trainer, monkeypatch, shared, **fields):
    """Three rollouts of two epochs; returns the trainer and the policy's passes, with gradients and without."""
    with monkeypatch.context() as patch:
        if not shared:
            patch.setattr(anchor, "first_pass", lambda trainer: ())
        trainer = without_chance(make_trainer(**ONE, **fields))
        passes = []
        trunk = trainer.model.get_base_model().model
        active = trainer.roles._layers[0]
        trunk.register_forward_hook(lambda *args: passes.append((active._active_adapter[0], torch.is_grad_enabled())))
        trainer.train()
    return trainer, passes.count(("default", True)), passes.count(("default", False))


@pytest.mark.parametrize(
    ("critic", "checkpointing"),
    [
        ("adapter", False),
        ("head", True),
        ("upper_half", True),
        pytest.param("adapter", True, marks=pytest.mark.slow),
        pytest.param("head", False, marks=pytest.mark.slow),
        pytest.param("upper_half", False, marks=pytest.mark.slow),
    ],
)
def test_the_same_run_with_a_pass_less_in_each_rollout(make_trainer, monkeypatch, critic, checkpointing):
    fields = {**CRITICS[critic], "activation_checkpointing": checkpointing, "learning_rate": 1e-2}
    one, with_gradient, without = run(make_trainer, monkeypatch, True, **fields)
    two, with_gradient_before, without_before = run(make_trainer, monkeypatch, False, **fields)
    assert (with_gradient, with_gradient_before) == (6, 6)
    # The first rollout is scored and trained on apart, and compared; each has a row more for `ppo/off_policy_spread`
    assert (without, without_before) == (1 + 3, 3 + 3)
    weights = trained(two)
    assert all(torch.isfinite(value).all() for value in weights.values())
    for name, value in trained(one).items():
        assert_close(value, weights[name], atol=1e-7, rtol=1e-5)
    for key in ("ppo/policy_loss", "critic/value_loss", "ppo/approx_kl", "entropy", "kl", "grad_norm"):
        assert logged(one, key) == pytest.approx(logged(two, key), rel=1e-4, abs=1e-7)
    assert logged(one, "ppo/approx_kl")[2::2] == pytest.approx([0.0, 0.0], abs=1e-12)
    assert min(logged(one, "ppo/approx_kl")[1::2]) > 1e-9


def test_the_rollout_that_trl_keeps_loses_the_graph_with_the_first_update(make_trainer):
    trainer = without_chance(make_trainer(**ONE, critic="head", save_strategy="steps", save_steps=1))
    kept = []
    compute = trainer._compute_loss

    def recorded(model, inputs):
        before = set(anchor.FIRST_PASS) & inputs.keys()
        loss = compute(model, inputs)
        kept.append((before, {name for batch in trainer._buffered_inputs for name in batch}))
        return loss

    trainer._compute_loss = recorded
    trainer.train()
    assert [len(before) for before, _ in kept] == [0, 0, 3, 0, 3, 0]
    assert all(not set(anchor.FIRST_PASS) & after for _, after in kept)


@pytest.mark.parametrize(
    "fields",
    [
        {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 4},
        {"kl_estimator": "full"},
    ],
    ids=["two_micro_batches", "exact_kl"],
)
def test_where_a_pass_cannot_be_shared(make_trainer, fields):
    trainer = make_trainer(**{**ONE, **fields})
    trainer._step = 1
    trainer.model.train()
    assert anchor.first_pass(trainer) == ()


def test_it_is_shared_in_training_only_and_not_in_the_first_update(make_trainer):
    trainer = without_chance(make_trainer(**ONE))
    trainer.model.train()
    assert anchor.first_pass(trainer) == ()
    trainer._step = 1
    assert anchor.first_pass(trainer) == ("first_logps", "first_entropies")  # the critic has an adapter of its own
    assert rollout(trainer)["old_per_token_logps"].requires_grad is False
    trainer.model.eval()
    assert anchor.first_pass(trainer) == ()
