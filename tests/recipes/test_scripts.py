"""The scripts of the recipes are short, say their command, and what they show as yours to change works."""

import ast
import json
from pathlib import Path

import pytest

from rlhf_recipes.config import parse_stage

RECIPES = Path(__file__).resolve().parents[2] / "recipes"
SCRIPTS = [path for path in sorted(RECIPES.rglob("*.py")) if "__main__" in path.read_text()]
BESIDE = {path.stem for path in RECIPES.rglob("*.py")}  # what a script could import from its own folder


def imports_of_ours(path):
    """Import statements from the library and from other scripts, wherever they stand."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            names = [node.module]
            assert "*" not in [alias.name for alias in node.names], f"line {node.lineno} hides what it imports"
        else:
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        if any(name.split(".")[0] in {"rlhf_recipes", "recipes", *BESIDE} for name in names):
            yield node


@pytest.mark.parametrize("stage", ["sft", "reward", "ppo", "grpo"])
def test_a_stage_is_read_on_one_page(stage):
    path = RECIPES / f"{stage}.py"
    assert len(path.read_text().splitlines()) <= 92
    assert 0 < len(list(imports_of_ours(path))) <= 8


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.relative_to(RECIPES).as_posix())
def test_a_script_says_its_command(path):
    command = path.relative_to(RECIPES.parent).as_posix()
    lines = ast.get_docstring(ast.parse(path.read_text())).splitlines()
    assert any(f"{start} {command} --" in line for line in lines for start in ("python", "accelerate launch"))


@pytest.fixture
def run_ppo(load_script, tiny_model_path, tiny_texts, sft_adapter, reward_adapter, tmp_path):
    """Run the PPO stage for two steps with lines of its script changed, and return what it logged."""

    def run(name, changed_lines, **options):
        text = (RECIPES / "ppo.py").read_text()
        for line, changed in changed_lines.items():
            assert text.count(line) == 1, f"{line!r} is shown once"
            text = text.replace(line, changed)
        path = tmp_path / f"{name}.py"
        path.write_text(text)
        script = load_script(path)
        prompts = tmp_path / "prompts.jsonl"
        prompts.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in tiny_texts))
        folder = tmp_path / name / "ppo"
        options = {
            "model_name_or_path": tiny_model_path,
            "sft_adapter": sft_adapter,
            "reward_adapter": reward_adapter,
            "dataset_name": prompts,
            "output_dir": folder,
            "max_steps": 2,
            "per_device_train_batch_size": 4,
            "steps_per_generation": 1,
            "max_completion_length": 6,
            "logging_steps": 1,
            "evaluation_rows": 4,
            "report_to": "none",
            "save_strategy": "no",
            "use_cpu": True,
            "bf16": False,
            "gradient_checkpointing": False,
            **options,
        }
        argv = [str(word) for field, value in options.items() for word in (f"--{field}", value)]
        script.main(*parse_stage(script.ARGUMENTS, argv))
        history = json.loads((folder / "trainer_state.json").read_text())["log_history"]
        return [entry for entry in history if "reward" in entry]

    return run


OWN_REWARD = {"    # reward_funcs.append(brevity)": "    reward_funcs.append(brevity)"}
OWN_PLACEMENT = {"placement = None": "placement = spread_evenly"}


def test_the_reward_and_the_placement_that_are_shown_work(run_ppo):
    own = run_ppo("own", OWN_REWARD | OWN_PLACEMENT)
    for entry in own:
        price = entry["rewards/brevity/mean"]
        assert price == pytest.approx(-0.01 * entry["completions/mean_length"], rel=1e-5)
        assert price < 0
        assert entry["reward"] == pytest.approx(entry["rewards/reward/mean"] + price, rel=1e-4, abs=1e-6)
    for placement in ("uniform", "terminal"):
        config = run_ppo(placement, OWN_REWARD, reward_placement=placement)
        losses = [[entry["critic/value_loss"] for entry in run] for run in (own, config)]
        assert (losses[0] == pytest.approx(losses[1], rel=1e-5)) == (placement == "uniform")


def test_a_reward_of_ones_own_is_enough(run_ppo):
    entry, *_ = run_ppo("alone", OWN_REWARD, reward_adapter="null")
    assert entry["reward"] == entry["rewards/brevity/mean"] < 0
