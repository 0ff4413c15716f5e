"""The wheel alone, in an empty folder outside the clone: a copied recipe runs, by its commands and by run.sh."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from zipfile import ZipFile

import pytest

pytestmark = pytest.mark.slow

# Smaller than the quickstart: what a user would change in the files of the copy.
SMALLER = {
    "world.py": {"default=20_000": "default=800", "default=1_500": "default=80"},
    "annotate.py": {"default=4_500": "default=60"},
    "sft.yaml": {"num_train_epochs: 1": "max_steps: 2"},
    "reward.yaml": {"num_train_epochs: 1": "max_steps: 2"},
    "ppo.yaml": {
        "max_steps: 640": "max_steps: 2",
        "steps_per_generation: 8": "steps_per_generation: 1",
        "evaluation_rows: 1024": "evaluation_rows: 8",
    },
    "reward_report.yaml": {"seed: 0": "seed: 0\ntrain_rows: 8\nprobe_rows: 8"},
}


@pytest.fixture(scope="module")
def wheel(repo_root, tmp_path_factory):
    """The wheel, built from a copy of the files: a build leaves folders behind."""
    source, target = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for name in ("rlhf_recipes", "recipes"):
        shutil.copytree(repo_root / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        shutil.copy(repo_root / name, source / name)
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
    command = [*pip, "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", str(target), str(source)]
    subprocess.run(command, check=True, capture_output=True)
    [path] = target.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def run(wheel, tmp_path_factory):
    """Run a command in an empty folder, where only the installed wheel is to be found."""
    site, here = tmp_path_factory.mktemp("site"), tmp_path_factory.mktemp("here")
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "install", "--no-deps", "--target", str(site)]
    subprocess.run([*pip, str(wheel)], check=True, capture_output=True)
    path = f"{site / 'bin'}:{Path(sys.executable).parent}:{os.environ['PATH']}"
    environment = {**os.environ, "PYTHONPATH": str(site), "PATH": path}

    def run(*words, code=0):
        done = subprocess.run(words, cwd=here, env=environment, capture_output=True, text=True, timeout=600)
        assert done.returncode == code, done.stdout[-3000:] + done.stderr[-3000:]
        return done

    run.here, run.site = here, site
    return run


def test_the_wheel_has_every_file_of_the_library_and_of_the_recipes(wheel, repo_root):
    def files(folder, top):
        paths = (repo_root / folder).rglob("*")
        return {f"{top}/{path.relative_to(repo_root / folder)}" for path in paths if path.is_file()}

    expected = files("rlhf_recipes", "rlhf_recipes") | files("recipes", "rlhf_recipes/recipes")
    with ZipFile(wheel) as archive:
        packed = {name for name in archive.namelist() if ".dist-info/" not in name}
        assert "rlhf-recipes = rlhf_recipes.tools.cli:main" in "".join(
            archive.read(name).decode() for name in archive.namelist() if name.endswith("entry_points.txt")
        )
    assert packed == {name for name in expected if "__pycache__" not in name}


def test_a_copied_recipe_runs_outside_the_clone(run):
    where = run("python", "-c", "import rlhf_recipes; print(rlhf_recipes.__file__)").stdout
    assert where.startswith(str(run.site))
    run("rlhf-recipes", "new", "my_run", "--from", "quickstart")
    for name, changes in SMALLER.items():
        path = run.here / "my_run" / name
        text = path.read_text()
        for old, new in changes.items():
            assert text.count(old) == 1, f"{old!r} in {name}"
            text = text.replace(old, new)
        path.write_text(text)

    # All of it, with the scripts of the copy.
    assert "outputs/my_run/report/report.html" in run("bash", "my_run/run.sh").stdout
    outputs = run.here / "outputs" / "my_run"
    for stage in ("sft", "reward", "ppo"):
        state = json.loads((outputs / stage / "trainer_state.json").read_text())
        assert state["global_step"] == 2
        assert "my_run/" in json.loads((outputs / stage / "run.json").read_text())["command"]
    assert "is there: nothing to do" in run("bash", "my_run/run.sh").stdout, "a second run does nothing again"

    # The stages again, with the scripts of the package: the same numbers.
    adapters = ["--sft_adapter", "outputs/again/sft", "--reward_adapter", "outputs/again/reward"]
    for stage, more in (("sft", []), ("reward", []), ("ppo", adapters)):
        words = ["--config", f"my_run/{stage}.yaml", "--output_dir", f"outputs/again/{stage}", *more]
        run("rlhf-recipes", stage, "--accelerate_config", "single_process", *words)
        first, second = (
            json.loads((folder / stage / "evaluation.json").read_text())
            for folder in (outputs, run.here / "outputs" / "again")
        )
        for name in ("loss", "accuracy", "win_rate", "kl"):
            assert first.get(name) == second.get(name)

    assert "per update" in run("rlhf-recipes", "plan", "--config", "my_run/ppo.yaml").stdout
    assert "report.html" in run("rlhf-recipes", "report", "outputs/my_run", "outputs/again").stdout
    printed = run("rlhf-recipes", "certificate", "--config", "my_run/reward_report.yaml").stdout
    assert "outputs/my_run/reward_report/certificate.html" in printed
    assert (outputs / "reward_report" / "certificate.json").is_file()


def test_mistakes_are_told_in_a_line(run):
    assert "There are: " in run("rlhf-recipes", "new", "other", "--from", "nothing", code=2).stderr
    assert not (run.here / "other").exists()
    assert "no config file" in run("rlhf-recipes", "sft", "--config", "nothing.yaml", code=1).stderr
