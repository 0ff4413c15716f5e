"""Run a stage's script in this process, as it is, with a tiny model."""

import importlib.util
import json
from types import SimpleNamespace

import pytest

import rlhf_recipes
from rlhf_recipes.config import parse_stage, read_setting

_TRAINERS = {
    "sft": "CompletionTrainer",
    "reward": "PreferenceTrainer",
    "grpo": "GRPOAdapterTrainer",
    "r1/train": "GRPOAdapterTrainer",
}

# Small and fast; a test overrides what it is about.
_TINY = {
    "use_cpu": True,
    "bf16": False,
    "gradient_checkpointing": False,
    "report_to": "none",
    "save_strategy": "no",
    "max_steps": 2,
    "per_device_train_batch_size": 4,
    "learning_rate": 1e-2,
    "lora_r": 4,
    "disable_tqdm": True,
}


def arguments_of(script, argv):
    """The dataclasses that a script reads its command line into."""
    return script.ARGUMENTS_OF_RLOO if read_setting("algorithm", argv) == "rloo" else script.ARGUMENTS


@pytest.fixture
def load_script(monkeypatch):
    """Import a script anew."""

    def load(path):
        monkeypatch.syspath_prepend(str(path.parent))  # as a script's own folder is
        spec = importlib.util.spec_from_file_location(f"recipes_{path.stem}", path)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module

    return load


@pytest.fixture
def load_stage(load_script, repo_root):
    """Import `recipes/<stage>.py` anew."""
    return lambda stage: load_script(repo_root / "recipes" / f"{stage}.py")


@pytest.fixture
def run_stage(load_stage, tiny_model_path, tmp_path, monkeypatch):
    """Run a stage: `run_stage("sft", dataset_name=..., max_steps=3)` gives its folder, files and trainer."""

    def run(stage, **options):
        folder = tmp_path / "tiny" / stage.partition("/")[0]
        options = {**_TINY, "model_name_or_path": tiny_model_path, "output_dir": str(folder), **options}
        argv = [text for name, value in options.items() for text in (f"--{name}", str(value))]
        module = load_stage(stage)
        made = []
        # Scripts that train on rewards import their trainer in `main`, from the package
        trainer = _TRAINERS.get(stage, "PPOTrainer")
        if arguments_of(module, argv) is not module.ARGUMENTS:
            trainer = "RLOOAdapterTrainer"
        place = module if hasattr(module, trainer) else rlhf_recipes
        original = getattr(place, trainer)
        with monkeypatch.context() as patch:
            patch.setattr(place, trainer, lambda **arguments: made.append(original(**arguments)) or made[-1])
            module.main(*parse_stage(arguments_of(module, argv), argv))
        folder = type(folder)(options["output_dir"])
        return SimpleNamespace(
            folder=folder, trainer=made[0], evaluation=json.loads((folder / "evaluation.json").read_text())
        )

    return run


@pytest.fixture(scope="session")
def small_world(repo_root, tmp_path_factory):
    """Folder of the quickstart's world, with a base of one layer that has read little."""
    spec = importlib.util.spec_from_file_location("recipes_world", repo_root / "recipes" / "quickstart" / "world.py")
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    folder = tmp_path_factory.mktemp("small") / "world"
    script.main(script.WorldArguments(str(folder), corpus_size=640, sft_size=80, hidden_size=64, layers=1, heads=2))
    return folder


@pytest.fixture
def run_script(load_stage):
    """Run a script beside the stages: `run_script("instructgpt/rank", prompts=8)`."""

    def run(name, **options):
        script = load_stage(name)
        words = {f"--{option}": value if isinstance(value, list) else [value] for option, value in options.items()}
        argv = [str(word) for name, values in words.items() for word in (name, *values)]
        script.main(*parse_stage(script.ARGUMENTS, argv))

    return run


@pytest.fixture
def write_rows(tmp_path):
    """Write rows as a jsonl file and return its path."""

    def write(rows, name="rows.jsonl"):
        path = tmp_path / name
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return str(path)

    return write
