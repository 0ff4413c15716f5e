"""The short help of a script's command is read from source; here it is compared with the real dataclasses."""

import argparse
import dataclasses
import importlib.util
import re
import subprocess
import sys
import typing
from types import UnionType

import pytest

from rlhf_recipes.tools import planning
from rlhf_recipes.tools.cli import main
from rlhf_recipes.tools.commands.fields import read_arguments, read_fields
from rlhf_recipes.tools.commands.folder import recipes_folder
from rlhf_recipes.tools.commands.pages import keys_of_recipes
from rlhf_recipes.tools.commands.scripts import SCRIPTS, STAGES, help_page
from rlhf_recipes.tools.planning.report import ARGUMENTS as OF_THE_PLAN

TOP = recipes_folder()
PARSED = [path for path in sorted(TOP.rglob("*.py")) if "parse_stage(" in path.read_text()]
COMMANDS = ["", "new", "report", "verifier", "rank", "rate", "label", "judge", "revise", *SCRIPTS]

CODE = """
import sys, time
from rlhf_recipes.tools.cli import main
try:
    main([*sys.argv[1:], "--help"])
except SystemExit as end:
    assert end.code == 0
slow = ("torch", "transformers", "trl", "datasets", "accelerate", "numpy")
print("LOADED", [name for name in slow if name in sys.modules], time.process_time())
"""


def classes_of(script):
    """The dataclasses of a script, imported."""
    spec = importlib.util.spec_from_file_location(f"fields_of_{script.stem}", script)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.ARGUMENTS


def options_of_the_plan():
    parser = argparse.ArgumentParser(add_help=False)
    planning.add_arguments(parser)
    return set(vars(parser.parse_args([])))


def default_of(field):
    """The default of a real field as in a YAML, or `None` where a value is needed."""
    if field.default is dataclasses.MISSING:
        assert field.default_factory is dataclasses.MISSING, "a list is a default of no field of ours"
        return None
    words = {None: "null", True: "true", False: "false"}
    value = field.default
    return words[value] if value is None or isinstance(value, bool) else str(value)


def words_of(hint):
    """The words of a `Literal` in an annotation."""
    options = typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, UnionType) else (hint,)
    return [
        word for option in options if typing.get_origin(option) is typing.Literal for word in typing.get_args(option)
    ]


def name_of(path):
    return path.relative_to(TOP).as_posix()


@pytest.mark.parametrize("script", PARSED, ids=name_of)
def test_what_is_read_is_what_the_dataclasses_say(script):
    groups = read_arguments(script)
    classes = classes_of(script)
    shown = keys_of_recipes(script)
    assert [group.name for group in groups] == [one.__name__ for one in classes]
    for group, one in zip(groups, classes, strict=True):
        real = {field.name: field for field in dataclasses.fields(one) if field.init}
        hints = typing.get_type_hints(one)
        read = [*group.own, *group.inherited]
        assert {field.name for field in read} == set(real)
        for field in read:
            if field in group.own or field.name in shown:
                assert field.default == default_of(real[field.name]), field.name
                assert field.help == real[field.name].metadata.get("help", ""), field.name
                if words := words_of(hints[field.name]):
                    assert field.kind == "|".join(words)


@pytest.mark.parametrize("script", PARSED, ids=name_of)
def test_own_fields_are_those_that_classes_of_ours_define(script):
    for group, one in zip(read_arguments(script), classes_of(script), strict=True):
        ours = [base for base in one.__mro__ if base.__module__.startswith(("rlhf_recipes", "fields_of_"))]
        assert {field.name for field in group.own} == {
            name for base in ours for name in vars(base).get("__annotations__", ())
        }


def test_a_plan_takes_the_fields_of_the_ppo_script():
    assert classes_of(TOP / SCRIPTS["plan"]) == OF_THE_PLAN


@pytest.mark.parametrize("command", SCRIPTS)
def test_the_page_shows_own_fields_and_those_that_the_recipes_set(command):
    script = TOP / SCRIPTS[command]
    page = help_page(command)
    own = {field.name for group in read_arguments(script) for field in group.own}
    shown = own | (set(keys_of_recipes(script)) & set(read_fields(script)))
    of_the_command = {"help", "help-all", "config"}
    of_the_command |= {"accelerate_config", "num_processes"} if command in STAGES else set()
    of_the_command |= options_of_the_plan() if command == "plan" else set()
    assert set(re.findall(r" --([a-z0-9_-]+)", page.split("Every field is")[0])) >= shown | of_the_command
    without_spaces = re.sub(r"\s", "", page)  # lines are broken at hyphens too
    for name in shown:
        field = read_fields(script)[name]
        default = "required" if field.default is None else f"default: {field.default or repr('')}"
        option = f"--{name} {field.kind} {field.help.replace('%%', '%').rstrip('.')} ({default})"
        assert re.sub(r"\s", "", option) in without_spaces


def test_inherited_fields_on_the_page_are_those_that_yamls_of_the_stage_set():
    keys = keys_of_recipes(TOP / "ppo.py")
    assert keys["max_steps"] > 3
    assert keys["model_name_or_path"] == keys["output_dir"] > 3
    assert "max_length" not in keys, "a field of other stages"
    page = help_page("ppo")
    assert "--max_steps int" in page
    assert "--adam_beta1" not in page


@pytest.mark.parametrize("command", COMMANDS)
def test_help_is_quick_and_imports_no_library(command, tmp_path):
    words = [command] if command else []
    run = subprocess.run(
        [sys.executable, "-c", CODE, *words], capture_output=True, text=True, check=True, cwd=tmp_path, timeout=60
    )
    *page, last = run.stdout.splitlines()
    assert page[0].startswith(f"usage: rlhf-recipes {command}".rstrip())
    assert last.startswith("LOADED [] ")
    assert float(last.split()[-1]) < 1.0, "seconds of processor time"


@pytest.mark.parametrize("command", ["sft", "reward", "ppo", "certificate", "plan"])
def test_full_help_shows_every_field(command, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["rlhf-recipes"])
    with pytest.raises(SystemExit, match="0"):
        main([command, "--help-all"])
    page = capsys.readouterr().out
    names = [name for name in read_fields(TOP / SCRIPTS[command]) if not re.search(rf"--{name}\b", page)]
    assert names == []
    assert ("--accelerate_config" in page) == (command in STAGES)
    assert ("--budget_gib" in page) == (command == "plan")


def test_names_are_followed_through_relative_and_lazy_imports(tmp_path):
    (tmp_path / "lazy.py").write_text(
        "from typing import TYPE_CHECKING, Literal\n"
        "if TYPE_CHECKING:\n    from base import Base\n"
        "Word = Literal['a', 'b']\n"
        "class Mine(Base):\n"
        "    word: 'Word | None' = field(default=None, metadata={'help': 'A ' 'word'})\n"
        "    hidden: int = field(default=0, init=False)\n"
        "    items: list[str] = field(default_factory=list)\n"
        "    needed: int = field(metadata={'help': 'Needed.'})\n"
        "ARGUMENTS = (Mine,)\n"
    )
    with pytest.raises(LookupError, match="base is not installed"):
        read_arguments(tmp_path / "lazy.py")
    script = tmp_path / "relative.py"
    script.write_text((tmp_path / "lazy.py").read_text().replace("from base", "from .base"))
    (tmp_path / "base.py").write_text("class Base:\n    first: int = 3\n    word: str = 'x'\n")
    [group] = read_arguments(script)
    assert [(field.name, field.default, field.kind) for field in group.own] == [
        ("word", "null", "a|b"),
        ("items", "list", "list[str]"),
        ("needed", None, "int"),
    ]
    assert [field.help for field in group.own] == ["A word", "", "Needed."]
    assert [(field.name, field.default) for field in group.inherited] == [("first", "3")]


def test_a_name_that_is_nowhere_is_named(tmp_path):
    (tmp_path / "empty.py").write_text("x = 1\n")
    with pytest.raises(LookupError, match=r"ARGUMENTS is not defined in .*empty.py"):
        read_arguments(tmp_path / "empty.py")
