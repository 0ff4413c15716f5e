"""READMEs, docs and the commands in scripts and YAMLs name files, flags and make targets that exist.

The examples in docstrings are run by pytest itself (`--doctest-modules` over `rlhf_recipes`).
"""

import argparse
import ast
import importlib.util
import itertools
import re
import shlex
from dataclasses import fields
from functools import cache
from pathlib import Path

import pytest

from rlhf_recipes.tools import planning
from rlhf_recipes.tools.commands.scripts import SCRIPTS as COMMANDS

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("recipes/**/*.md")])
SOURCES = sorted(path for suffix in ("py", "sh", "yaml") for path in ROOT.glob(f"recipes/**/*.{suffix}"))
SCRIPTS = [path for path in SOURCES if path.suffix == ".py" and "parse_stage(" in path.read_text()]

OURS = re.compile(r"(?<![\w/.-])(?:rlhf_recipes|recipes|tests|docs|\.github|\.ci)/[\w./{},-]*[\w}/]")
PLACEHOLDER = re.compile(r"[<>$*\[\]]|\.\.\.|…")
OTHER_FLAGS = {"config", "config_file", "num_processes", "num_machines"}  # of the parser and of `accelerate launch`
COPIES = ("mine/", "my_run/")  # what `rlhf-recipes new` makes in the pages
OF_A_COMMAND = {"accelerate_config", "num_processes", "help", "help-all"}


def ids(path):
    return str(path.relative_to(ROOT))


def expand(braces):
    """Spell out `a/{b,c}.py` as `a/b.py` and `a/c.py`."""
    parts = re.split(r"\{([^}]*)\}", braces)
    choices = [part.split(",") if index % 2 else [part] for index, part in enumerate(parts)]
    return ["".join(choice) for choice in itertools.product(*choices)]


def anchors(text):
    """The anchors that GitHub gives the headings of a page: of two equal ones the second ends in `-1`."""
    text = re.sub(r"(?ms)^```.*?^```", "", text)
    found = []
    for heading in re.findall(r"(?m)^#+ +(.+?) *$", text):
        heading = re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", heading).lower()
        found.append(re.sub(r"[^\w -]", "", heading).replace(" ", "-"))
    return {name if (before := found[:i].count(name)) == 0 else f"{name}-{before}" for i, name in enumerate(found)}


def missing_files(text):
    named = {path for match in OURS.findall(text) for path in expand(match)}
    return sorted(path for path in named if not (ROOT / path).exists())


def commands(text):
    """Launch commands in a page, a script, a docstring or a comment, one string each."""
    text = re.sub(r"(?m)^\s*(#|>) ?", "", text)
    text = re.sub(r"\\\n\s*", " ", text)
    text = re.sub(r'(?m)^\w+=".*"$', "", text)  # the start of a command, kept in a shell variable
    ours = "|".join(COMMANDS)
    return re.findall(rf"(?:accelerate launch |python (?=recipes/)|rlhf-recipes (?:{ours})\b)[^`\n]*", text)


@cache
def flags_of(script):
    """Flags that a script takes: the fields of the dataclasses that it hands to `parse_stage`."""
    source = script.read_text()
    calls = [
        node
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "parse_stage"
    ]
    assert len(calls) == 1, f"{script.name} must parse its arguments with one call of `parse_stage`"
    spec = importlib.util.spec_from_file_location(f"recipe_{script.stem}", script)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    parsed = eval(compile(ast.Expression(calls[0].args[0]), str(script), "eval"), vars(module))
    classes = parsed if isinstance(parsed, tuple | list) else [parsed]
    return {field.name for cls in classes for field in fields(cls) if field.init} | {"config"}


@cache
def flags_of_the_command():
    """Flags that `rlhf-recipes` takes."""
    sources = "".join(path.read_text() for path in sorted((ROOT / "rlhf_recipes" / "tools").rglob("*.py")))
    return set(re.findall(r'add_argument\(\s*(?:"-h", )?"--([a-z_-]+)"', sources))


def options_of_the_plan():
    parser = argparse.ArgumentParser(add_help=False)
    planning.add_arguments(parser)
    return set(vars(parser.parse_args([])))


def problems(command):
    """What a launch command names and is not there."""
    words = [word.strip("[]") for word in shlex.split(command, comments=True)]
    if words[0] == "rlhf-recipes":
        given = {word.removeprefix("--").split("=")[0] for word in words if word.startswith("--")}
        known = flags_of(ROOT / "recipes" / COMMANDS[words[1]]) | OF_A_COMMAND
        known |= options_of_the_plan() if words[1] == "plan" else set()
        files = [word for word in words if word.startswith("recipes/") and not PLACEHOLDER.search(word)]
        return [f"no file {file}" for file in files if not (ROOT / file).is_file()] + [
            f"no flag --{flag}" for flag in given - known
        ]
    scripts = [index for index, word in enumerate(words) if word.endswith(".py") and not PLACEHOLDER.search(word)]
    if not scripts:
        return []
    words = [f"recipes/{Path(word).name}" if word.startswith(COPIES) and ".py" in word else word for word in words]
    script = ROOT / words[scripts[0]]
    if not script.is_file():
        return [f"no script {words[scripts[0]]}"]
    files = [value for flag, value in itertools.pairwise(words) if flag in {"--config", "--config_file"}]
    files = [file for file in files if not PLACEHOLDER.search(file) and not file.startswith(COPIES)]
    given = {word.removeprefix("--").split("=")[0] for word in words[scripts[0] + 1 :] if word.startswith("--")}
    unknown = given - flags_of(script)
    return [f"no file {file}" for file in files if not (ROOT / file).is_file()] + [
        f"no flag --{flag}" for flag in unknown
    ]


def test_pages_and_scripts_are_found():
    assert ROOT / "README.md" in PAGES
    assert ROOT / "docs" / "CONTRIBUTING.md" in PAGES
    assert ROOT / "recipes" / "ppo.py" in SCRIPTS


@pytest.mark.parametrize("page", PAGES, ids=ids)
def test_pages_name_existing_files(page):
    text = page.read_text()
    assert missing_files(text) == []
    for target in re.findall(r"\]\(([^)#\s]+)", text):
        if "://" not in target and not target.startswith("mailto:"):
            assert (page.parent / target).exists(), f"the link to {target} leads nowhere"


@pytest.mark.parametrize("page", PAGES, ids=ids)
def test_links_lead_to_existing_headings(page):
    for target, anchor in re.findall(r"\]\(([^)#\s]*)#([^)\s]+)\)", page.read_text()):
        if "://" not in target:
            known = anchors((page.parent / target if target else page).read_text())
            assert anchor in known, f"{target or 'this page'} has no heading for #{anchor}"


@pytest.mark.parametrize("page", PAGES, ids=ids)
def test_pages_name_existing_flags_and_targets(page):
    text = page.read_text()
    known = set.union(*(flags_of(script) for script in SCRIPTS)) | OTHER_FLAGS | flags_of_the_command()
    inline = {flag for span in re.findall(r"`(--[^`]+)`", text) for flag in re.findall(r"--([a-z_]+)", span)}
    assert inline <= known, f"no script and no command takes {sorted(inline - known)}"
    targets = set(re.findall(r"(?m)^([a-z-]+):", (ROOT / "Makefile").read_text()))
    named = set(re.findall(r"(?m)(?:^|`)make ([a-z-]+)", text))
    assert named <= targets, f"the Makefile has no {sorted(named - targets)}"


@pytest.mark.parametrize("path", [*PAGES, *SOURCES], ids=ids)
def test_commands_run_existing_scripts_with_known_flags(path):
    for command in commands(path.read_text()):
        assert problems(command) == [], command


def test_every_file_names_the_same_version():
    patterns = {
        "pyproject.toml": r'(?m)^version = "(.+)"',
        "rlhf_recipes/__init__.py": r'(?m)^__version__ = "(.+)"',
        "CITATION.cff": r"(?m)^version: (.+)",
        "docs/CHANGELOG.md": r"(?m)^## ([\d.]+)",
    }
    versions = {file: re.search(pattern, (ROOT / file).read_text()).group(1) for file, pattern in patterns.items()}
    assert len(set(versions.values())) == 1, versions


def test_problems_are_seen():
    page = "# PPO's `gae_lambda`, by [Schulman](x.md)\n```\n# no heading\n```\n## A b\n### A b\n"
    assert anchors(page) == {"ppos-gae_lambda-by-schulman", "a-b", "a-b-1"}
    assert missing_files("see `rlhf_recipes/ppo/{config,nothing}.py`") == ["rlhf_recipes/ppo/nothing.py"]
    [command] = commands("```\n$ accelerate launch recipes/ppo.py \\\n    --learning_rte 1e-5 --config no.yaml\n```")
    assert problems(command) == ["no file no.yaml", "no flag --learning_rte"]
    assert problems("accelerate launch recipes/ppo.py --config recipes/<recipe>/ppo.yaml [--learning_rate 1e-5]") == []
    assert problems("accelerate launch recipes/nothing.py") == ["no script recipes/nothing.py"]
    [command] = commands("see `rlhf-recipes ppo --config mine/ppo.yaml --num_processes 2 --learning_rte 1e-5`")
    assert problems(command) == ["no flag --learning_rte"]
    assert problems("accelerate launch mine/nothing.py --config mine/ppo.yaml") == ["no script recipes/nothing.py"]
    assert problems("rlhf-recipes plan --config recipes/x/ppo.yaml --budget_gib 2") == ["no file recipes/x/ppo.yaml"]
