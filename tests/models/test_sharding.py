"""FSDP2 on one process, where everything but the exchange is as on several; those are in tests/ppo/test_sharded.py."""

from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from rlhf_recipes.models.sharding import (
    call_inside,
    gathered,
    is_sharded,
    load_whole,
    part_like,
    whole,
    whole_weights,
    write,
)
from rlhf_recipes.ppo.sharded import ReductionCheck

ACCELERATOR = SimpleNamespace(
    state=SimpleNamespace(fsdp_plugin=SimpleNamespace(reshard_after_forward=True)),
    reduce=lambda tensor, reduction: tensor,
    device=torch.device("cpu"),
)


class Policy(nn.Module):
    """A trunk in two layers that the critic reads too, and its head."""

    def __init__(self):
        super().__init__()
        self.trunk = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
        self.critic_model = nn.Linear(2, 1)

    def forward(self, states):
        return self.trunk(states).sum()

    def value(self, states):
        return self.critic_model(self.trunk(states)).sum()


@pytest.fixture(scope="module", autouse=True)
def _one_process():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.fixture
def plain():
    return Policy()


@pytest.fixture
def sharded(plain):
    model = Policy()
    model.load_state_dict(plain.state_dict())
    for layer in model.trunk:
        fully_shard(layer)
    return fully_shard(model)


def backward(model, states, factor=1.0):
    (model(states) + factor * call_inside(model, lambda: model.value(states))).backward()


def test_what_runs_inside_has_the_gradients_of_a_model_that_is_not_sharded(plain, sharded):
    assert is_sharded(sharded)
    assert not is_sharded(plain)
    states = torch.randn(5, 3)
    with gathered(ACCELERATOR, sharded):  # a rollout comes first
        assert torch.equal(sharded.trunk(states), plain.trunk(states))
    for model in (plain, sharded):
        backward(model, states)
    for (name, weight), other in zip(plain.named_parameters(), sharded.parameters(), strict=True):
        assert isinstance(other, DTensor)
        torch.testing.assert_close(whole(other.grad), weight.grad, msg=name)


def test_weights_are_whole_within_the_block_only_and_as_they_are_now(plain, sharded):
    states = torch.randn(2, 3)
    with gathered(ACCELERATOR, sharded), gathered(ACCELERATOR, sharded):
        assert not any(isinstance(weight, DTensor) for weight in sharded.parameters())
    optimizer = torch.optim.SGD(sharded.parameters(), lr=0.5)
    backward(sharded, states)
    optimizer.step()
    expected = [whole(weight.detach()) for weight in sharded.parameters()]
    assert not torch.equal(expected[0], plain.trunk[0].weight)
    with gathered(ACCELERATOR, sharded):
        held = whole_weights(sharded)
        assert list(held) == [name for name, _ in plain.named_parameters()]
        assert all(torch.equal(*pair) for pair in zip(held.values(), expected, strict=True))
    assert all(isinstance(weight, DTensor) for weight in sharded.parameters())


def test_an_error_in_the_block_shards_the_weights_again(sharded):
    with pytest.raises(KeyError), gathered(ACCELERATOR, sharded):
        raise KeyError
    assert all(isinstance(weight, DTensor) for weight in sharded.parameters())


def test_weights_are_written_where_fsdp_reads_them(plain, sharded):
    states, other = torch.randn(2, 3), Policy()
    load_whole(sharded, other.state_dict())
    assert sharded(states).item() == pytest.approx(other(states).item())
    write(sharded.critic_model.bias, torch.tensor([7.0]))
    with gathered(ACCELERATOR, sharded):
        assert sharded.critic_model.bias.item() == 7.0
    part = part_like(sharded.critic_model.weight, torch.ones(1, 2))
    assert isinstance(part, DTensor)
    assert whole(part).tolist() == [[1.0, 1.0]]
    load_whole(plain, other.state_dict())
    assert plain(states).item() == other(states).item()


def test_right_gradients_pass_the_check_also_over_two_micro_batches(sharded):
    check = ReductionCheck(ACCELERATOR, sharded)
    for factor in (1.0, -2.0):
        backward(sharded, torch.randn(5, 3), factor)
    check.check()


def test_a_gradient_that_is_taken_past_fsdp_is_found(sharded):
    """As `autograd.grad` takes it: by the weights as they lie there between two passes."""
    check, states = ReductionCheck(ACCELERATOR, sharded), torch.randn(5, 3)
    of_policy = [*sharded.trunk.parameters()]
    loss = sharded(states)
    taken = torch.autograd.grad(loss, of_policy, allow_unused=True)
    assert taken == (None,) * 4
    call_inside(sharded, lambda: sharded.critic_model(states[:, :2]).sum()).backward()
    with pytest.raises(RuntimeError, match="The policy got no gradient in the first step: it was taken past FSDP"):
        check.check()


def test_a_gradient_that_is_averaged_wrongly_is_found(sharded):
    sharded.trunk[1].set_gradient_divide_factor(2.0)
    check = ReductionCheck(ACCELERATOR, sharded)
    backward(sharded, torch.randn(5, 3))
    with pytest.raises(RuntimeError, match=r"'trunk.1.(weight|bias)' is not the mean of those of the processes"):
        check.check()


def test_a_gradient_that_waits_for_its_reduction_is_found(sharded):
    check = ReductionCheck(ACCELERATOR, sharded)
    sharded.set_requires_gradient_sync(False)
    backward(sharded, torch.randn(5, 3))
    with pytest.raises(RuntimeError, match="got no gradient"):
        check.check()


def test_a_weight_outside_of_fsdp_is_found(plain):
    model = fully_shard(plain, ignored_params={plain.critic_model.bias})
    with pytest.raises(RuntimeError, match=r"1 trained weights are outside of FSDP, 'critic_model.bias' among them"):
        ReductionCheck(ACCELERATOR, model)
