"""The pass that scores a rollout of one micro-batch is also the first update's: the run is the same without it."""

from types import SimpleNamespace

import pytest
import torch
from torch.testing import assert_close

from rlhf_recipes.ppo.passes import KeptPass, PolicyPass
from tests.ppo.support import logged, trained, without_chance

ONE = {"per_device_train_batch_size": 8, "gradient_accumulation_steps": 1, "num_iterations": 2, "max_steps": 6}
CRITICS = {"head": {"critic": "head"}, "adapter": {}, "upper_half": {"critic_layers": 1}}


def run(make_trainer, monkeypatch, shared, **fields):
    """Three rollouts of two epochs; returns the trainer and the policy's passes, with gradients and without."""
    with monkeypatch.context() as patch:
        if not shared:
            patch.setattr(KeptPass, "take", lambda self, batch: None)
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
    # Without sharing, two rollouts keep a pass in vain, and their first updates make their own
    assert (with_gradient, with_gradient_before) == (6, 6 + 2)
    # The first rollout is scored and trained on apart, and compared; each has a row more for `ppo/off_policy_spread`
    assert (without, without_before) == (1 + 3, 1 + 3)
    weights = trained(two)
    assert all(torch.isfinite(value).all() for value in weights.values())
    for name, value in trained(one).items():
        assert_close(value, weights[name], atol=1e-7, rtol=1e-5)
    for key in ("ppo/policy_loss", "critic/value_loss", "ppo/approx_kl", "entropy", "kl", "grad_norm"):
        assert logged(one, key) == pytest.approx(logged(two, key), rel=1e-4, abs=1e-7)
    assert logged(one, "ppo/approx_kl")[2::2] == pytest.approx([0.0, 0.0], abs=1e-12)
    assert min(logged(one, "ppo/approx_kl")[1::2]) > 1e-9


def test_the_pass_is_handed_over_once_and_no_batch_holds_it(make_trainer):
    trainer = without_chance(make_trainer(**ONE, critic="head", save_strategy="steps", save_steps=1))
    taken, take, compute = [], trainer.kept_pass.take, trainer._compute_loss

    def recorded(*arguments):
        taken.append(take(*arguments))
        return taken[-1]

    def without_graph(model, inputs):
        assert not any(value.requires_grad for value in inputs.values())
        return compute(model, inputs)

    trainer.kept_pass.take, trainer._compute_loss = recorded, without_graph
    trainer.train()
    assert [outputs is not None for outputs in taken] == [False, False, True, False, True, False]
    assert all(outputs.kept is not None for outputs in taken if outputs is not None), "the values of the head"
    assert take(None) is None


def test_the_kept_rows_are_taken_in_the_order_of_the_batch():
    kept, logps = KeptPass(), torch.arange(6.0).view(2, 3).requires_grad_()
    kept.keep(PolicyPass(logps, logps + 10, logps + 20))
    batch = SimpleNamespace(row=torch.tensor([1, 0]), completion_mask=torch.ones(2, 2))
    taken = kept.take(batch)
    assert taken.logps.tolist() == [[3.0, 4.0], [0.0, 1.0]]
    assert (taken.entropies - taken.logps == 10).all()
    assert (taken.kept - taken.logps == 20).all()
    taken.logps.sum().backward()
    assert logps.grad.tolist() == [[1.0, 1.0, 0.0], [1.0, 1.0, 0.0]]
    assert kept.take(batch) is None
    kept.keep(PolicyPass(logps, logps))
    kept.keep(None)
    assert kept.take(batch) is None


@pytest.mark.parametrize(
    "fields",
    [
        {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 4},
        {"kl_estimator": "full"},
    ],
    ids=["two_micro_batches", "exact_kl"],
)
def test_where_a_pass_cannot_be_shared(make_trainer, fields):
    trainer = without_chance(make_trainer(**{**ONE, **fields}))
    trainer._step = 1
    assert kept_of(trainer) is None


def test_it_is_shared_in_training_only_and_not_in_the_first_update(make_trainer):
    trainer = without_chance(make_trainer(**ONE))
    assert kept_of(trainer) is None
    trainer._step = 1
    outputs = kept_of(trainer)
    assert outputs.logps.requires_grad
    assert outputs.kept is None, "the critic has an adapter of its own"
    assert kept_of(trainer, training=False) is None


def kept_of(trainer, training=True):
    """What a rollout keeps for the first update."""
    trainer.model.train(training)
    trainer._generate_and_score_completions([trainer.train_dataset[i] for i in range(8)])
    order = SimpleNamespace(row=torch.arange(8), completion_mask=torch.ones(8, 8))
    return trainer.kept_pass.take(order)
