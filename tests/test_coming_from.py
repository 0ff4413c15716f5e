"""docs/coming_from.md: what other libraries compute, and that the fields it names give the same here.

The numbers of the other libraries are those of their own code; `benchmarks/coming_from.py` installs each of them
and holds the page to them. Here nothing is installed: the page's numbers are the oracle for ours.
"""

import importlib.util
import re
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from torch import tensor
from torch.testing import assert_close

from rlhf_recipes import PPOConfig
from rlhf_recipes.ppo.functional import aggregate, clipped_policy_loss, clipped_value_loss, gae, whiten
from rlhf_recipes.ppo.objective import critic_loss, policy_loss
from rlhf_recipes.ppo.passes import PolicyPass
from rlhf_recipes.ppo.setup import make_kl_controller
from rlhf_recipes.ppo.token_rewards import Scored, TokenRewards, configured_advantages
from rlhf_recipes.shaping import (
    AdaptiveKLController,
    ClipScores,
    Completions,
    SubtractReferenceMean,
    apply_transforms,
    kl_estimate,
    steered_kl,
)

ROOT = Path(__file__).resolve().parents[1]
RECIPES = {"TRL": "trl112", "verl": "verl", "OpenRLHF": "openrlhf"}


def load(name):
    spec = importlib.util.spec_from_file_location(name, ROOT / "benchmarks" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


page = load("coming_from_page")


@cache
def configuration(library):
    """Our configuration with block 3 of the library's recipe, or with the fields that the page names."""
    if library in RECIPES:
        recipe = (ROOT / "recipes" / "coming_from" / f"{RECIPES[library]}.yaml").read_text()
        named = yaml.safe_load(re.search(r"(?ms)^# 3\..*?(?=^# 4\.)", recipe)[0])
    else:
        named = page.settings(page.heading(library))
    here = {"output_dir": "unused", "use_cpu": True, "bf16": False, "report_to": "none", "max_completion_length": 3}
    return PPOConfig(**(named | here))


def completions_of(mask):
    rows = [[7] * int(length) for length in mask.sum(dim=1)]
    return Completions(rows, finished=torch.ones(len(mask), dtype=torch.bool), max_length=mask.shape[1])


def ours(args, batch):
    """What the trainer makes of a rollout and of its first minibatch."""
    mask, old = batch["mask"], batch["old_logps"]
    rewards, _, _ = TokenRewards(args)(Scored(batch["scores"]), mask, completions_of(mask))
    kl = kl_estimate(old, batch["ref_logps"], args.kl_estimator).masked_fill(mask == 0, 0.0)
    assert args.kl_placement == "reward"
    rewards = rewards - make_kl_controller(args).value * kl
    advantages, returns, value_mask = configured_advantages(args, rewards, batch["old_values"], mask)
    assert args.whiten_advantages
    advantages = whiten(advantages, mask, unbiased=args.whiten_unbiased)
    inputs = SimpleNamespace(
        completion_mask=mask,
        old_per_token_logps=old,
        ref_per_token_logps=batch["ref_logps"],
        advantages=advantages,
        value_mask=value_mask,
        old_values=batch["old_values"],
        returns=returns,
    )
    policy, _ = policy_loss(PolicyPass(batch["logps"], torch.zeros_like(old)), inputs, args, 0.0, args.entropy_coef)
    value, _ = critic_loss(batch["values"], inputs, args)
    return {
        "token rewards": rewards,
        "returns": returns,
        "advantages": advantages,
        "policy loss": policy,
        "value loss": value / args.vf_coef,
        "loss": policy + value,
    }


def check(found, written, what):
    """A number on the page has six digits after the point."""
    assert_close(torch.as_tensor(found).reshape(-1).double(), tensor(written).double(), rtol=0, atol=6e-7, msg=what)


@pytest.mark.parametrize("rows", page.ROWS)
@pytest.mark.parametrize("library", page.PINNED)
def test_the_named_fields_give_the_same_numbers(library, rows):
    found = ours(configuration(library), page.batch(rows))
    lines = [line[1:] for line in page.lines(library) if line[0] == rows]
    assert {name for name, _, _ in lines} >= set(found) - {"loss"}
    for name, _, here in lines:
        check(found[name], page.numbers(here), f"{library}, {rows}, {name}")


def test_whole_rows_give_what_they_give_in_trl_verl_and_openrlhf():
    """The promise of the page, which no table may take back."""
    for library in ("TRL", "verl", "OpenRLHF"):
        lines = page.lines(library)
        assert all(here == theirs for rows, _, theirs, here in lines if rows == "whole")
        assert library == "TRL" or all(here == theirs for *_, theirs, here in lines)


ONE, FIVE = torch.ones(1, 1), tensor([[5.0]]).log()
TOKENS, ONES = tensor([[1.0, 2.0, 3.0, 4.0]]), torch.ones(1, 4)
TOOL = tensor([[1, 1, 0, 0, 1]])
LOSSES = torch.ones(2, 10).index_put((tensor([0, 1]), tensor([4, 9])), tensor(10.0))
LENGTHS = tensor([[1] * 5 + [0] * 5, [1] * 10])
SCORES = tensor([30.0, 20.0, 1.0, 0.0])


def estimate(name, difference):
    return kl_estimate(tensor([0.0]), tensor([difference]), name)


def gradient_of_k3():
    logps = torch.zeros(1, requires_grad=True)
    kl_estimate(logps, tensor([3.0]), "k3").sum().backward()
    return logps.grad


def adaptive():
    controller = AdaptiveKLController(0.15, 6.0, 10_000)
    controller.update(12.0, 512)
    return controller.value


def value_loss(target):
    return clipped_value_loss(tensor([[0.8]]), tensor([[0.3]]), target * ONE, ONE, 0.2)[0]


FORMULAS = {
    "whiten": lambda: whiten(TOKENS, ONES),
    "whiten, `n - 1`": lambda: whiten(TOKENS, ONES, unbiased=True),
    "whiten, mean kept": lambda: whiten(TOKENS, ONES, center=False),
    "whiten, mean kept, `n - 1`": lambda: whiten(TOKENS, ONES, center=False, unbiased=True),
    "whiten, one token counted": lambda: whiten(TOKENS, tensor([[1, 0, 0, 0]]), unbiased=True)[0, :1],
    "whiten, all equal": lambda: whiten(ONES, ONES, unbiased=True),
    "policy loss at ratio 5, A -1": lambda: clipped_policy_loss(FIVE, 0 * FIVE, -ONE, ONE, 0.2, 0.2)[0],
    "the same with dual clip 3": lambda: clipped_policy_loss(FIVE, 0 * FIVE, -ONE, ONE, 0.2, 0.2, dual_clip=3.0)[0],
    "no token counted": lambda: clipped_policy_loss(FIVE, 0 * FIVE, -ONE, 0 * ONE, 0.2, 0.2)[0],
    "value loss, R 1": lambda: value_loss(1.0),
    "value loss, R 0.6": lambda: value_loss(0.6),
    "k1 at 12": lambda: estimate("k1", -12.0),
    "k2 at 12": lambda: estimate("k2", -12.0),
    "k3 at -1": lambda: estimate("k3", 1.0),
    "k3 at -3": lambda: estimate("k3", 3.0),
    "gradient of k3 at -3": gradient_of_k3,
    "returns around a tool": lambda: gae(
        tensor([[0.0, 0.0, 0.0, 0.0, 1.0]]), tensor([[0.5, 0.6, 9.0, 9.0, 0.7]]), TOOL, 1.0, 0.95
    )[1][TOOL.bool()],
    "mean over tokens": lambda: aggregate(LOSSES, LENGTHS, "token"),
    "mean over completions": lambda: aggregate(LOSSES, LENGTHS, "sequence"),
    "fixed length 10": lambda: aggregate(LOSSES, LENGTHS, "fixed", 10),
    "fixed length, padded to 20": lambda: aggregate(
        torch.nn.functional.pad(LOSSES, (0, 10)), torch.nn.functional.pad(LENGTHS, (0, 10)), "fixed", 10
    ),
    "adaptive coefficient": adaptive,
    "baseline and clip at 10": lambda: transformed([SubtractReferenceMean(), ClipScores(-10.0, 10.0)]),
    "clip at 10 and baseline": lambda: transformed([ClipScores(-10.0, 10.0), SubtractReferenceMean()]),
}


def transformed(transforms):
    return apply_transforms(SCORES, completions_of(torch.ones(4, 1)), transforms)[0]


def test_the_order_of_baseline_and_clip_is_that_of_the_page():
    """The configuration subtracts first; `score_transforms` of the trainer come in any order."""
    args = configuration("verl")
    lines = {name: page.numbers(values["here"]) for name, values in page.formulas().items()}
    both = PPOConfig("unused", use_cpu=True, bf16=False, subtract_reference_mean=True, score_clip=10.0)
    batch = Scored(SCORES), torch.ones(4, 1, dtype=torch.long), completions_of(torch.ones(4, 1))
    check(TokenRewards(both)(*batch)[1], lines["baseline and clip at 10"], "configuration")
    given = [ClipScores(-10.0, 10.0), SubtractReferenceMean()]
    check(TokenRewards(args, None, given)(*batch)[1], lines["clip at 10 and baseline"], "score_transforms")


def test_formulas_are_those_of_the_page():
    lines = {name: values["here"] for name, values in page.formulas().items()}
    assert set(lines) == {*FORMULAS, "return, reward on padding"}
    for name, formula in FORMULAS.items():
        check(formula(), page.numbers(lines[name]), name)


def test_a_reward_on_padding_is_refused_as_the_page_says():
    assert page.formulas()["return, reward on padding"]["here"] == "refused"
    rewards = TokenRewards(configuration("verl"), placement=lambda scores, mask: tensor([[0.0, 1.0]]))
    with pytest.raises(ValueError, match="no token counts"):
        rewards(Scored(ONE[0]), tensor([[1, 0]]), completions_of(tensor([[1, 0]])))


@pytest.mark.parametrize("rows", page.ROWS)
def test_the_adaptive_coefficient_has_the_unit_that_the_page_says(rows):
    fields, batch = page.settings("## The adaptive KL coefficient"), page.batch(rows)
    written = {
        row[0]: [page.numbers(cell) for cell in row[1:]] for row in page.table("## The adaptive KL coefficient")
    }
    here = []
    for unit in ("token", "completion"):
        args = PPOConfig("unused", use_cpu=True, bf16=False, **fields | {"kl_target_per": unit})
        controller, kl = make_kl_controller(args), kl_estimate(batch["old_logps"], batch["ref_logps"], "k1")
        controller.update(steered_kl(kl, batch["mask"], args.kl_target_per).mean().item(), len(kl))
        here.append([round(controller.value, 6)])
    verl, openrlhf, per_token, per_completion = written[rows]
    assert [per_token, per_completion] == here
    assert verl == openrlhf == per_token != per_completion
