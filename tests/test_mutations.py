"""Tests of the tests: a bug put into each pure function on purpose must be caught by a test of that function.

To cover a new function, add a row to `BUGS`. The test that it names stands in the file that mirrors the module
(`rlhf_recipes/ppo/functional.py` -> `tests/ppo/test_functional.py`), imports the function from that module itself, and
takes neither fixtures nor parameters.
"""

import ast
import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parents[1]

PPO = "rlhf_recipes/ppo/functional.py"
PLACEMENT = "rlhf_recipes/shaping/placement.py"
KL = "rlhf_recipes/shaping/kl.py"
METRICS = "rlhf_recipes/evaluation/metrics.py"


class Bug(NamedTuple):
    """Put `replacement` in the place of `snippet`, which occurs once in `module`, and `test` must fail."""

    module: str
    snippet: str
    replacement: str
    test: str


BUGS = [
    Bug(PPO, "mask.bool().sum().clamp(min=1)", "mask.numel()", "test_masked_mean_weighs_every_token_alike"),
    Bug(PPO, "counted.square().sum()", "counted.sum().square()", "test_masked_moments_are_sums"),
    Bug(PPO, "if not center:", "if center:", "TestWhiten.test_numbers"),
    Bug(PPO, "torch.rsqrt(variance + 1e-8)", "1.0 / (variance + 1e-8)", "TestWhiten.test_numbers"),
    Bug(PPO, "gamma * next_value - values[:, t]", "next_value - values[:, t]", "TestGae.test_discount_numbers"),
    Bug(PPO, "delta + gamma * lam * advantage", "delta + gamma * advantage", "TestGae.test_numbers"),
    Bug(PPO, "mask, gamma, lam=1.0)[1]", "mask, gamma, lam=0.0)[1]", "TestDiscountedReturns.test_numbers"),
    Bug(PPO, "torch.maximum(plain, clipped)", "torch.minimum(plain, clipped)", "TestClippedPolicyLoss.test_numbers"),
    Bug(PPO, "(logps - old_logps.detach(), mask)", "(logps, mask)", "TestClippedPolicyLoss.test_numbers"),
    Bug(PPO, "torch.maximum(error, clipped_error)", "clipped_error", "TestClippedValueLoss.test_numbers"),
    Bug(PPO, "return -(logps.exp() * logps", "return (logps.exp() * logps", "TestEntropy.test_numbers"),
    Bug(PPO, "(returns - values).detach()", "(returns + values).detach()", "TestExplainedVariance.test_scale"),
    Bug(PLACEMENT, "counted_from_here == 1", "counted_from_here == 2", "test_terminal_pays_the_last_counted_token"),
    Bug(
        PLACEMENT,
        "counts.sum(-1, keepdim=True).clamp(min=1)",
        "mask.size(1)",
        "test_uniform_pays_counted_tokens_alike",
    ),
    Bug(KL, "log_ratio = ref_logps - logps", "log_ratio = logps - ref_logps", "test_numbers"),
    Bug(KL, "return -log_ratio", "return (-log_ratio).clamp(min=0)", "test_numbers"),
    Bug(METRICS, "policy > reference)", "policy >= 0)", "TestWinRate.test_numbers"),
    Bug(METRICS, "reference_scores).mean())", "reference_scores).sum())", "TestWinRate.test_numbers"),
    Bug(
        METRICS, "(draws @ sums) / (draws @ sizes)", "(draws @ sums) / len(rows)", "TestBootstrapInterval.test_numbers"
    ),
    Bug(METRICS, 'method="wilson"', 'method="exact"', "TestProportionInterval.test_numbers"),
]


def source_of(module):
    return (ROOT / module).read_text()


def name_of(module):
    return module.removesuffix(".py").replace("/", ".")


def public_functions(module):
    functions = [node for node in ast.parse(source_of(module)).body if isinstance(node, ast.FunctionDef)]
    return {function.name: function for function in functions if not function.name.startswith("_")}


def place_of(bug):
    """The public function that a bug is in."""
    before, _, _ = source_of(bug.module).partition(bug.snippet)
    line = before.count("\n") + 1
    inside = [name for name, node in public_functions(bug.module).items() if node.lineno <= line <= node.end_lineno]
    return inside[0] if inside else "none"


def mutant_of(bug):
    mutant = ModuleType(name_of(bug.module))
    source = source_of(bug.module).replace(bug.snippet, bug.replacement)
    exec(compile(source, bug.module, "exec"), mutant.__dict__)
    return mutant


def run_test_of(bug):
    """Run the test of a bug from a fresh import of its file, which takes the module under test from `sys.modules`."""
    file = ROOT / "tests" / Path(bug.module).relative_to("rlhf_recipes")
    spec = importlib.util.spec_from_file_location("oracle", file.with_name(f"test_{file.name}"))
    found = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(found)
    *group, name = bug.test.split(".")
    getattr(getattr(found, group[0])() if group else found, name)()


@pytest.mark.parametrize("bug", BUGS, ids=lambda bug: f"{place_of(bug)}-{bug.replacement}")
def test_bug_is_caught(bug, monkeypatch):
    assert source_of(bug.module).count(bug.snippet) == 1, "the snippet must name one place"
    run_test_of(bug)  # passes without the bug, and imports from true modules whatever the test needs
    monkeypatch.setitem(sys.modules, name_of(bug.module), mutant_of(bug))
    with pytest.raises(AssertionError):
        run_test_of(bug)


PURE_FILES = ("functional.py", "losses.py", "metrics.py", "shaping/*.py")


def test_every_pure_function_has_a_bug():
    modules = {str(path.relative_to(ROOT)) for name in PURE_FILES for path in ROOT.glob(f"rlhf_recipes/**/{name}")}
    functions = {(module, name) for module in modules for name in public_functions(module)}
    assert functions - {(bug.module, place_of(bug)) for bug in BUGS} == set()
    assert {bug.module for bug in BUGS} <= modules
