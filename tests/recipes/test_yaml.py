"""Scripts read what the files of a recipe say: every YAML, and every command in run.sh and in the pages."""

import re
import shlex
from dataclasses import is_dataclass
from pathlib import Path

import pytest
import yaml

from rlhf_recipes.config import parse_stage

ROOT = Path(__file__).resolve().parents[2]
STAGES = ("sft", "reward", "ppo", "grpo", "rloo")  # the other scripts, which train nothing, have tests of their own
LIBRARIES = ("trl112", "verl", "openrlhf")  # several of one stage, named by whose settings they have
MORE = ("safety", "rejection", "winners")  # a second reward model, the best of K completions, SFT on them


def stage_of(path):
    """The stage that a YAML is named after; `paper_ppo.yaml` has the settings of a paper for a real model."""
    return path.stem.removeprefix("paper_")


NAMES = {*STAGES, *LIBRARIES, *MORE}
CONFIGS = [path for path in sorted(ROOT.glob("recipes/*/*.yaml")) if stage_of(path) in NAMES]
RECIPES = sorted({path.parent for path in CONFIGS})
WHOLE = [folder for folder in RECIPES if (folder / "sft.yaml").exists()]  # others start from another's stages
PAGES = [folder / name for folder in RECIPES for name in ("run.sh", "README.md")]
ON_THE_CPU = ["--use_cpu", "true", "--bf16", "false"]


def name_of(path):
    return path.relative_to(ROOT).as_posix()


def script_of(path):
    """The stage that a YAML is for, as its first line says: a recipe may have several of one stage."""
    return re.match(r"# accelerate launch recipes/([\w/]+)\.py", path.read_text())[1]


def commands(page):
    """Yield script and arguments of every Python command in a bash script or in the bash blocks of a page.

    A command in a loop is read once, with the first value.
    """
    text = page.read_text()
    if page.suffix == ".md":
        text = "\n".join(re.findall(r"(?ms)^```bash\n(.*?)^```", text))
    variables = {}
    for line in text.replace("\\\n", " ").splitlines():
        for name, value in variables.items():
            line = line.replace(f"${name}", value)
        words = shlex.split(line, comments=True)
        if len(words) == 1 and re.fullmatch(r"\w+=.*", words[0]):
            name, variables[name] = words[0].split("=", 1)
        if words[:1] == ["for"]:
            variables[words[1]] = words[3]
        scripts = [index for index, word in enumerate(words) if re.fullmatch(r"recipes/.*\.py", word)]
        if scripts:
            yield words[scripts[0]], words[scripts[0] + 1 :]


@pytest.mark.parametrize("path", CONFIGS, ids=name_of)
def test_yaml_is_read_by_its_script(path, load_stage):
    arguments = parse_stage(load_stage(script_of(path)).ARGUMENTS, ["--config", str(path), *ON_THE_CPU])
    (training,) = [one for one in arguments if hasattr(one, "output_dir")]
    assert training.output_dir == f"outputs/{path.parent.name}/{path.stem}"
    assert training.use_cpu
    assert not training.bf16


@pytest.mark.parametrize("path", CONFIGS, ids=name_of)
def test_yaml_starts_with_its_command_and_has_four_blocks(path):
    lines = path.read_text().splitlines()
    own = script_of(path) == f"{path.parent.name}/train"
    assert own or stage_of(path) in (script_of(path), "rloo", "encoder", "decoder", *LIBRARIES, *MORE)
    assert lines[0].startswith(f"# accelerate launch recipes/{script_of(path)}.py --config {name_of(path)}")
    assert [line[:4] for line in lines if re.match(r"# \d\.", line)] == ["# 1.", "# 2.", "# 3.", "# 4."]
    assert len(lines) <= 45


@pytest.mark.parametrize("folder", WHOLE, ids=name_of)
def test_stages_of_a_recipe_fit_together(folder):
    sft, reward, ppo = (yaml.safe_load((folder / f"{stage}.yaml").read_text()) for stage in ("sft", "reward", "ppo"))
    assert sft["model_name_or_path"] == reward["model_name_or_path"] == ppo["model_name_or_path"]
    last = folder / "winners.yaml" if (folder / "winners.yaml").exists() else folder / "sft.yaml"
    assert ppo["sft_adapter"] == yaml.safe_load(last.read_text())["output_dir"]
    assert sft["output_dir"] == f"outputs/{folder.name}/sft"
    assert ppo["reward_adapter"] == reward["output_dir"]


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_commands_are_read_by_the_scripts_that_they_name(page, load_stage):
    found = list(commands(page))
    assert found
    for script, argv in found:
        module = load_stage(script.removeprefix("recipes/").removesuffix(".py"))
        own = [one for one in vars(module).values() if is_dataclass(one) and one.__module__ == module.__name__]
        from_here = [str(ROOT / word) if word.startswith("recipes/") else word for word in argv]
        parse_stage(getattr(module, "ARGUMENTS", own), [*from_here, *(ON_THE_CPU if "--config" in argv else [])])


@pytest.mark.parametrize("folder", RECIPES, ids=name_of)
def test_run_sh_runs_every_stage_in_order(folder):
    run = commands(folder / "run.sh")
    configs = [argv[argv.index("--config") + 1] for _, argv in run if "--config" in argv]
    order = ("sft", "reward", *MORE, "encoder", "decoder", "minilm", *STAGES[2:], *LIBRARIES)
    stages = [folder / f"{stage}.yaml" for stage in order]
    assert list(dict.fromkeys(configs)) == [name_of(stage) for stage in stages if stage.exists()]
    assert (folder / "run.sh").stat().st_mode & 0o100, "run.sh must be executable"


@pytest.mark.parametrize("folder", RECIPES, ids=name_of)
def test_recipe_is_in_the_index(folder):
    assert f"[{folder.name}]({folder.name}/README.md)" in (ROOT / "recipes" / "README.md").read_text()
