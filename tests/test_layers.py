"""The shape of the code, frozen: one direction of dependencies, short files and functions, documented public names.

A failure here names the rule. The rules are in docs/CONTRIBUTING.md.
"""

import ast
import sys
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
LIBRARY = sorted((ROOT / "rlhf_recipes").rglob("*.py"))
RECIPES = sorted((ROOT / "recipes").rglob("*.py"))

# From the bottom up: a room may use its own layer's rooms that it is named with, and the layers before it. The longest
# matching name counts.
PURE = (
    "extras",
    "masks",
    "messages",
    "models.readout",
    "parts",
    "quiet",
    "statistics",
    "shaping",
    "ppo.functional",
    "reward_modeling.losses",
    "tools.certificate.functional",
    "tools.planning.fit",
    "tools.planning.memory",
    "tools.planning.phases",
    "tools.planning.serving",
    "tools.planning.sharding",
    "tools.planning.sizes",
    "tools.planning.speed",
)
LAYERS = [
    PURE,
    ("checkpoints", "config"),
    ("data",),
    ("models",),
    ("rewards", "tracking"),
    ("ppo", "reward_modeling", "supervised"),
    ("evaluation",),
    ("tools",),
]
PURE_IMPORTS = {"torch", "numpy", "scipy", "sklearn", "sacrebleu", *sys.stdlib_module_names}

MAX_FILE_LINES, MAX_FUNCTION_LINES = 550, 60  # what changes together may lie together


def name_of(path):
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def layer_of(module):
    rooms = {room: layer for layer, names in enumerate(LAYERS) for room in names}
    if module == "rlhf_recipes":
        return len(LAYERS)  # its names are for users, and nothing of the library uses them
    name = module.removeprefix("rlhf_recipes.")
    while name and name not in rooms:
        name = name.rpartition(".")[0]
    assert name, f"{module} belongs to no layer: name its room in LAYERS"
    return rooms[name]


def is_pure(path):
    return layer_of(name_of(path)) == 0


def imports(path):
    """Yield `(module, name)` for all that a file imports, also within functions and for type checkers only."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from ((alias.name, None) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: import `rlhf_recipes....` by its full name"
            yield from ((node.module, alias.name) for alias in node.names)


@cache
def modules_used(path):
    """Modules of ours that a file imports: `from rlhf_recipes.ppo import checks` uses `rlhf_recipes.ppo.checks`."""
    ours = {name_of(file) for file in LIBRARY}
    return {f"{module}.{name}" if f"{module}.{name}" in ours else module for module, name in imports(path)}


def functions(tree):
    return (node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef))


def length_without_docstring(function):
    first = function.body[0]
    docstring = first.end_lineno - first.lineno + 1 if ast.get_docstring(function, clean=False) is not None else 0
    return function.end_lineno - function.lineno + 1 - docstring


@cache
def trl_private_names():
    """Names with one underscore that TRL's trainers define or set on themselves, read from their source."""
    folder = Path(find_spec("trl").submodule_search_locations[0]) / "trainer"
    names = set()
    for file in ("base_trainer.py", "grpo_trainer.py", "reward_trainer.py", "sft_trainer.py"):
        for node in ast.walk(ast.parse((folder / file).read_text())):
            if isinstance(node, ast.FunctionDef):
                names.add(node.name)
            elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "self":
                names.add(node.attr)
    return {name for name in names if name.startswith("_") and not name.startswith("__")}


def ids(path):
    return str(path.relative_to(ROOT))


def test_rooms_and_trl_names_are_found():
    assert len(LIBRARY) > 10
    functional, roles, trainer = (layer_of(f"rlhf_recipes.{m}") for m in ("ppo.functional", "models.roles", "ppo"))
    assert functional < roles < trainer
    assert {"_calculate_rewards", "_metrics"} <= trl_private_names()


@pytest.mark.parametrize("path", LIBRARY, ids=ids)
def test_dependencies_point_one_way(path):
    module = name_of(path)
    for used in modules_used(path):
        root = used.split(".")[0]
        assert root not in {"recipes", "tests"}, f"the library must not import {used}"
        if root == "rlhf_recipes":
            assert layer_of(used) <= layer_of(module), f"{module} is below {used} and must not import it"


def circles():
    """Modules that import themselves by way of others."""
    used = {name_of(path): modules_used(path) for path in LIBRARY}

    def reached(module):
        seen, waiting = set(), [module]
        while waiting:
            new = used.get(waiting.pop(), set()) - seen
            seen |= new
            waiting += new
        return seen

    return sorted(module for module in used if module in reached(module))


def test_no_module_imports_itself_by_way_of_others():
    assert circles() == [], "0 circles, those for type checkers too"


def test_no_import_points_upwards():
    arrows = [
        f"{name_of(path)} -> {used}"
        for path in LIBRARY
        for used in modules_used(path)
        if used.split(".")[0] == "rlhf_recipes" and layer_of(used) > layer_of(name_of(path))
    ]
    assert arrows == [], "0 upward imports"


@pytest.mark.parametrize("path", [path for path in LIBRARY if is_pure(path)], ids=ids)
def test_pure_maths_needs_no_training_library(path):
    for used in modules_used(path):
        root = used.split(".")[0]
        pure = layer_of(used) == 0 if root == "rlhf_recipes" else root in PURE_IMPORTS
        assert pure, f"{name_of(path)} is pure maths (tensors in, tensors out) and must not import {used}"


@pytest.mark.parametrize("path", RECIPES, ids=ids)
def test_recipes_use_public_names_only(path):
    for module, name in imports(path):
        if module.split(".")[0] == "rlhf_recipes":
            private = [part for part in [*module.split("."), name or ""] if part.startswith("_")]
            assert not private, f"recipes are templates: {private[0]} of {module} is not for them"


@pytest.mark.parametrize("path", LIBRARY, ids=ids)
def test_trl_internals_are_named_by_trainers_only(path):
    if "ppo" in path.relative_to(ROOT).parts or path == ROOT / "rlhf_recipes" / "reward_modeling" / "trainer.py":
        return
    private = trl_private_names()
    for module, name in imports(path):
        inside = module.split(".")[0] == "trl" and (name or "").startswith("_")
        assert not inside, f"{name} of {module} is internal to TRL; only trainers may name it"
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Attribute) and not (isinstance(node.value, ast.Name) and node.value.id == "self"):
            assert node.attr not in private, f"line {node.lineno}: {node.attr} is internal to TRL"


@pytest.mark.parametrize("path", LIBRARY, ids=ids)
def test_files_and_functions_are_short(path):
    text = path.read_text()
    assert len(text.splitlines()) <= MAX_FILE_LINES
    for function in functions(ast.parse(text)):
        lines = length_without_docstring(function)
        assert lines <= MAX_FUNCTION_LINES, f"{function.name} has {lines} lines"


@pytest.mark.parametrize("path", LIBRARY, ids=ids)
def test_public_names_have_docstrings(path):
    tree = ast.parse(path.read_text())
    assert ast.get_docstring(tree), "the module says in its first line what it is for"
    public = [node for node in tree.body if isinstance(node, ast.ClassDef | ast.FunctionDef)]
    for node in [node for node in public if not node.name.startswith("_")]:
        assert ast.get_docstring(node), f"{node.name} has no docstring"
        methods = functions(node) if isinstance(node, ast.ClassDef) else ()
        for method in methods:
            documented = method.name.startswith("_") or ast.get_docstring(method)
            assert documented, f"{node.name}.{method.name} has no docstring"


@pytest.mark.parametrize("path", LIBRARY, ids=ids)
def test_library_does_not_print(path):
    for node in ast.walk(ast.parse(path.read_text())):
        printed = isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "print"
        assert not printed, f"line {node.lineno}: log, raise or return instead of printing"
