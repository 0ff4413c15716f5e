"""Gradients that are taken before the whole loss is known."""

import pytest
import torch
from torch.testing import assert_close

from rlhf_recipes.ppo.functional.gradients import backward_now


def test_backward_now_gives_the_value_and_the_gradient_and_frees_the_graph():
    torch.manual_seed(0)
    network = torch.nn.Sequential(torch.nn.Linear(4, 5), torch.nn.Tanh(), torch.nn.Linear(5, 1)).double()
    network[2].bias.requires_grad_(False)
    unused = torch.nn.Parameter(torch.ones(2))
    x = torch.randn(6, 4, dtype=torch.float64)
    loss = network(x).square().mean()
    expected = torch.autograd.grad(3.0 * loss, trained := [*network[0].parameters(), network[2].weight])

    again = network(x).square().mean()
    result = backward_now(again, [*network.parameters(), unused])
    assert result.item() == loss.item()
    for found, wanted in zip(torch.autograd.grad(3.0 * result, trained), expected, strict=True):
        assert_close(found, wanted, atol=1e-15, rtol=1e-12)
    with pytest.raises(RuntimeError, match="second time"):
        again.backward()  # what it kept is gone
