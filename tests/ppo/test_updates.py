"""Which updates are made: early stop, dropped minibatches, warm-up of the critic, adaptive entropy."""

from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch
from transformers import TrainerCallback

from rlhf_recipes.models.roles import is_critic_parameter
from rlhf_recipes.ppo.updates import UpdateControl
from tests.ppo.support import logged, trained

# Two minibatches and three epochs: six optimizer steps for each rollout
SIX_STEPS = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 1, "steps_per_generation": 2}
SIX_STEPS |= {"num_iterations": 3, "critic_learning_rate": 1e-3}


class Steps(TrainerCallback):
    """Keep weights and Adam's moments after every optimizer step, those of the critic in the policy's tree too."""

    def __init__(self):
        self.weights, self.moments, self.network = [], [], None

    def on_train_begin(self, args, state, control, **kwargs):
        model = self.network
        self.weights.append({name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad})
        self.moments.append({})

    def on_step_end(self, args, state, control, optimizer=None, **kwargs):
        model = self.network
        names = {p: name for name, p in model.named_parameters()}
        self.weights.append({name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad})
        self.moments.append({names[p]: s["exp_avg"].clone() for p, s in optimizer.state.items()})

    def moved(self, step, critic):
        """Whether weights of the policy or of the critic moved in a step, from 1; moments must say the same."""
        before, after = self.weights[step - 1], self.weights[step]
        names = [name for name in before if is_critic_parameter(name) == critic]
        weights = any(not torch.equal(before[name], after[name]) for name in names)
        old, new = self.moments[step - 1], self.moments[step]
        moments = any(name in new and (name not in old or not torch.equal(old[name], new[name])) for name in names)
        assert moments == weights, f"in step {step} only one of weights and Adam's moments moved"
        return weights


def watched(make_trainer, **fields):
    steps = Steps()
    trainer = make_trainer(**SIX_STEPS | fields, callbacks=[steps])
    steps.network = trainer.model
    trainer.train()
    return trainer, steps


def count(completion_ids, **kwargs):
    return [0.1 * len(ids) for ids in completion_ids]


def test_target_kl_leaves_out_the_rest_of_the_rollout(make_trainer):
    free, _ = watched(make_trainer, max_steps=6)
    kl = logged(free, "ppo/approx_kl")
    assert kl[0] < 1e-12
    first = next(step for step in range(1, 6) if kl[step] > max(kl[:step]) and step >= 2)
    limit = (max(kl[:first]) + kl[first]) / 2
    trainer, steps = watched(make_trainer, max_steps=12, target_kl=limit)
    made = [True] * first + [False] * (6 - first)  # until the first one above the limit, which is left out too
    for critic in (False, True):
        assert [steps.moved(step, critic) for step in range(1, 7)] == made
        assert steps.moved(7, critic), "the next rollout trains again"
    assert logged(trainer, "loss")[first + 1 : 6] == [0.0] * (5 - first)


def test_ratio_threshold_drops_single_minibatches(make_trainer):
    limit = 1.00001  # so that rounding decides about no update
    trainer, steps = watched(make_trainer, max_steps=12, ratio_threshold=limit)
    ratios = logged(trainer, "ppo/ratio_mean")
    dropped = [ratio > limit for ratio in ratios]
    assert len(ratios) == 12
    assert 0 < sum(dropped) < 11
    again = [first and not second for rollout in (dropped[:6], dropped[6:]) for first, second in pairwise(rollout)]
    assert any(again), "the test needs an update after a dropped one in the same rollout"
    for critic in (False, True):
        assert [not steps.moved(step, critic) for step in range(1, 13)] == dropped


@pytest.mark.parametrize("whole", [False, True], ids=["adapter", "whole"])
def test_warm_up_trains_only_the_critic(make_trainer, tiny_model_path, whole):
    model = {"model": tiny_model_path, "reward_funcs": count, "critic_init": "policy"} if whole else {}
    fields = {"gradient_accumulation_steps": 2, "critic_warmup_steps": 2, "max_steps": 6, **model}
    _, steps = watched(make_trainer, **fields)
    # Three steps for each rollout: the warm-up ends before the second one
    assert [steps.moved(step, critic=False) for step in range(1, 7)] == [False] * 3 + [True] * 3
    assert all(steps.moved(step, critic=True) for step in range(1, 7))


def test_warm_up_ends_early_where_the_critic_explains_enough(make_trainer):
    fields = {"gradient_accumulation_steps": 2, "critic_warmup_steps": 11, "max_steps": 12, "seed": 3}
    trainer, steps = watched(make_trainer, **fields, critic_warmup_explained_variance=1.1)  # it is never more than 1
    explained = logged(trainer, "critic/explained_variance")
    assert len(explained) == 4
    assert not any(steps.moved(step, critic=False) for step in range(1, 13))
    enough = max(explained)
    first = explained.index(enough)
    assert first > 0, "the test needs a critic that gets better"
    # Until then nothing differs, so that the same rollout is the first that is good enough
    _, steps = watched(make_trainer, **fields, critic_warmup_explained_variance=enough)
    moved = [steps.moved(step, critic=False) for step in range(1, 13)]
    assert moved == [False] * (3 * first) + [True] * (12 - 3 * first)


def control(**fields):
    defaults = {
        "target_kl": None,
        "ratio_threshold": None,
        "critic_warmup_steps": 0,
        "critic_warmup_explained_variance": None,
        "entropy_coef": 0.0,
        "use_adaptive_entropy": False,
    }
    accelerator = SimpleNamespace(reduce=lambda tensor, reduction: tensor)
    return UpdateControl(SimpleNamespace(**defaults | fields), accelerator)


def decide(updates, *micro_batches):
    for log_ratios, entropy in micro_batches:
        row = torch.tensor([[*log_ratios, 1e3]])  # and one token of padding
        mask = torch.tensor([[1] * len(log_ratios) + [0]])
        updates.record(row, torch.full(row.shape, entropy), mask)
    updates.decide()
    return updates.made


@pytest.mark.parametrize(("limit", "made"), [(0.019, False), (0.021, True)])
def test_the_micro_batches_of_a_step_count_by_their_tokens(limit, made):
    """KL: 0.5 x 2 x 0.4^2 over 8 tokens = 0.02. Either micro-batch alone has 0.08 or 0; the mean of both is 0.04."""
    assert decide(control(target_kl=limit), ([0.4, 0.4], 0.0), ([0.0] * 6, 0.0)) is made
    # Ratio: (2 x e^0.4 + 6) / 8 = 1.123
    ratio = 1.0 + (limit - 0.02) * 10 + 0.123
    assert decide(control(ratio_threshold=ratio), ([0.4, 0.4], 0.0), ([0.0] * 6, 0.0)) is made


def test_a_step_does_not_remember_the_one_before():
    updates = control(ratio_threshold=1.1)
    assert not decide(updates, ([1.0], 0.0))
    assert decide(updates, ([0.0], 0.0))


def test_a_stop_lasts_until_the_next_rollout():
    updates = control(target_kl=0.01)
    assert not decide(updates, ([1.0], 0.0))
    assert not decide(updates, ([0.0], 0.0))
    updates.begin_rollout(explained_variance=0.0, step=3)
    assert decide(updates, ([0.0], 0.0))


def trls_controller(entropies, target, coef, delta, low, high):
    """The rule of TRL's GRPO, by hand: the weight that each step is computed with."""
    used, last = [], float("inf")
    for entropy in entropies:
        used.append(coef if last <= target else 0.0)
        coef = min(coef + delta, high) if entropy <= target else max(coef - delta, low)
        last = entropy
    return used


def test_adaptive_entropy_is_trls():
    numbers = {"entropy_target": 1.5, "entropy_coef_delta": 0.01, "entropy_coef_min": 0.005, "entropy_coef_max": 0.03}
    entropies = [2.0, 1.0, 1.5, 3.0, 0.5, 0.5, 0.5, 0.5, 2.0, 2.0, 2.0, 1.0]
    updates = control(use_adaptive_entropy=True, entropy_coef=0.01, **numbers)
    used = []
    for entropy in entropies:
        used.append(updates.entropy_coef)
        decide(updates, ([0.0] * 3, entropy), ([0.0], entropy))
    expected = trls_controller(entropies, 1.5, 0.01, 0.01, 0.005, 0.03)
    assert used == pytest.approx(expected)
    # As numbers: 2.0 took 0.01 down to its minimum; 1.0 and 1.5 raised it; 3.0 turned it off; ...
    assert expected[:6] == pytest.approx([0.0, 0.0, 0.015, 0.025, 0.0, 0.025])


def test_adaptive_entropy_follows_the_entropies_of_the_run(make_trainer):
    fields = {"use_adaptive_entropy": True, "entropy_coef": 0.02, "entropy_target": 3.449, "entropy_coef_delta": 0.003}
    free, _ = watched(make_trainer, max_steps=1)
    fields["entropy_target"] = logged(free, "entropy")[0] + 1e-4
    trainer, _ = watched(make_trainer, max_steps=12, **fields)
    entropies = logged(trainer, "entropy")
    assert len({entropy <= fields["entropy_target"] for entropy in entropies}) == 2, "needs both sides of the target"
    args = trainer.args
    limits = (args.entropy_coef_delta, args.entropy_coef_min, args.entropy_coef_max)
    after = trls_controller([*entropies, 0.0], fields["entropy_target"], 0.02, *limits)
    assert trainer.updates.entropy_coef == pytest.approx(after[-1])


def test_nothing_is_dropped_without_limits(make_trainer):
    trainer, steps = watched(make_trainer, max_steps=6)
    assert all(steps.moved(step, critic) for step in range(1, 7) for critic in (False, True))
    assert logged(trainer, "ppo/updates_made") == [1.0] * 6
    assert trained(trainer).keys() == steps.weights[0].keys()
