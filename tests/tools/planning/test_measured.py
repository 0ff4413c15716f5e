"""The plan against processes: peaks of whole runs, each in a process of its own."""

import importlib.util
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).resolve().parents[3] / "benchmarks"


@pytest.fixture(scope="module")
def benchmark():
    spec = importlib.util.spec_from_file_location("memory_plan", BENCHMARKS / "memory_plan.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def can_reset_peak():
    return sys.platform == "linux" and Path("/proc/self/clear_refs").exists()


@pytest.mark.slow
@pytest.mark.skipif(not can_reset_peak(), reason="the peak of a process is read from /proc, which is Linux's")
@pytest.mark.parametrize(
    "case",
    [("1.3M", "fp32", "adapter", 32), ("1.3M", "4-bit", "head", 32), ("27M", "bf16", "head", 32)],
    ids=lambda case: "-".join(map(str, case)),
)
def test_peak_is_within_15_percent(benchmark, case, tmp_path):
    case = benchmark.Case(*case)
    benchmark.make_world(case.size, tmp_path)
    predicted, measured = benchmark.predict(case, tmp_path), benchmark.measure(case, tmp_path)
    line, ratio = benchmark.row(case, predicted, measured)
    assert ratio == pytest.approx(1, abs=0.15), line
