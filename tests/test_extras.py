"""The core runs without what the extras bring, and what needs an extra names the command that installs it."""

import json
import os
import re
import subprocess
import sys
import tomllib
from importlib.metadata import requires
from pathlib import Path

import pytest

from rlhf_recipes.extras import from_extra

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS = {name: packages for name, packages in PROJECT["optional-dependencies"].items() if name not in ("all", "dev")}
EXTRA_OF = {
    "report": "report",
    "certificate": "report",
    "dashboards": "wandb",
    "ranking": "ranking",
    "self-BLEU": "report",
    "baseline": "report",
    "judge": "judges",
    "remote reward": "judges",
    "reward of a judge": "judges",
    "W&B": "wandb",
    "W&B run": "wandb",
    "labelling page": "label",
}


def module_of(requirement):
    name = re.match(r"[\w-]+", requirement)[0]
    return {"scikit-learn": "sklearn"}.get(name, name.replace("-", "_"))


def command(extra):
    return f"pip install 'rlhf-recipes[{extra}]'"


@pytest.fixture(scope="module")
def core(tiny_model_path, tmp_path_factory):
    """What the core did without the extras."""
    if any(module_of(each) == "httpx" and "extra ==" not in each for each in requires("huggingface_hub")):
        pytest.skip("huggingface_hub 1 itself needs httpx, so that nobody is without it")
    modules = sorted({module_of(requirement) for packages in EXTRAS.values() for requirement in packages})
    folder = tmp_path_factory.mktemp("core")
    finished = subprocess.run(
        [sys.executable, str(ROOT / "tests/core_worker.py"), " ".join(modules), tiny_model_path, folder, ROOT],
        env=os.environ | {"PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert finished.returncode == 0, finished.stderr
    return json.loads(finished.stdout.splitlines()[-1]) | {"stderr": finished.stderr}


def test_all_of_the_core_is_imported_and_ppo_runs_to_its_end(core):
    files = [path.relative_to(ROOT / "rlhf_recipes") for path in (ROOT / "rlhf_recipes").rglob("*.py")]
    assert core["imported"] == sum(path.parts[0] != "tools" for path in files) - 1  # all but the package itself
    assert core["steps"] == 2


def test_what_cannot_be_measured_is_left_out_and_said_once(core):
    assert [evaluation["step"] for evaluation in core["evaluations"]] == [1, 2]
    for evaluation in core["evaluations"]:
        assert "policy/distinct_2" in evaluation
        assert "policy/self_bleu" not in evaluation
    assert core["baselines"] == ["longer", "shorter"]
    assert [message.split(", which")[0] for message in core["messages"]] == [
        "Left out: Self-BLEU needs sacrebleu",
        "Left out: The baseline `tfidf` needs sklearn",
    ]
    assert all(message.endswith(command("report")) for message in core["messages"])


def test_what_needs_an_extra_says_how_to_install_it(core):
    assert core["refused"].keys() == EXTRA_OF.keys()
    for name, extra in EXTRA_OF.items():
        assert core["refused"][name].endswith(f"which is not installed. Install it with: {command(extra)}"), name


def test_commands_say_it_without_a_traceback(core):
    assert core["codes"] == {"report": 2, "rank": 2, "rate": 2, "label": 2}
    for name, extra in (("report", "report"), ("rank", "ranking"), ("rate", "ranking"), ("label", "label")):
        [line] = [line for line in core["stderr"].splitlines() if line.startswith(f"rlhf-recipes {name}: ")]
        assert line.endswith(command(extra))


def test_all_has_every_extra():
    [requirement] = PROJECT["optional-dependencies"]["all"]
    apart = ("docs", "reasoning", "deepspeed")
    assert requirement == f"rlhf-recipes[{','.join(name for name in EXTRAS if name not in apart)}]"
    assert "rlhf-recipes[all,docs,reasoning]" in PROJECT["optional-dependencies"]["dev"]


def test_an_installed_package_is_imported_and_other_errors_pass():
    with from_extra("report", needed_by="It"):
        import math
    assert math.pi > 3
    with pytest.raises(ImportError, match="cannot import name") as caught, from_extra("report", needed_by="It"):
        from math import no_such_name  # noqa: F401
    assert "rlhf-recipes" not in str(caught.value)
