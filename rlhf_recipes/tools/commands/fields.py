"""Options of a script, read from the source of its dataclasses: nothing of what they need is imported."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

_YAML_WORDS = {"None": "null", "True": "true", "False": "false"}


@dataclass(frozen=True)
class Field:
    """A field of a dataclass, as its source says it.

    Attributes:
        name: Name of the option, and of the key in a YAML.
        default: Its default as in a YAML, the source of what makes it, or `None` where a value is needed.
        help: What it is, as argparse takes it.
        kind: Its annotation without `| None`, or the words that it allows, with `|` between.
    """

    name: str
    default: str | None
    help: str
    kind: str


@dataclass(frozen=True)
class Arguments:
    """A dataclass that a script reads its options into.

    Attributes:
        name: Name of the class.
        summary: First line of its docstring.
        own: Fields of the class itself and of its bases, as far as they are ours.
        inherited: All others.
    """

    name: str
    summary: str
    own: tuple[Field, ...]
    inherited: tuple[Field, ...]


@cache
def read_arguments(script: Path) -> tuple[Arguments, ...]:
    """Read the dataclasses that a script names in `ARGUMENTS`.

    Args:
        script: A script with `ARGUMENTS = (DataArguments, ...)`, whose classes it defines or imports by their names.

    Returns:
        One entry for each class, in order.

    Raises:
        LookupError: If a name is not defined where it is said to be.

    Example:
        >>> from rlhf_recipes.tools.commands.folder import recipes_folder
        >>> [arguments.name for arguments in read_arguments(recipes_folder() / "sft.py")]
        ['DataArguments', 'CompletionConfig', 'ModelConfig']
        >>> read_arguments(recipes_folder() / "sft.py")[0].own[0].default
        'null'
    """
    _, names = _definition(script, "ARGUMENTS")
    if not isinstance(names, ast.Tuple):
        raise LookupError(f"`ARGUMENTS` in {script} is no tuple of classes.")
    return tuple(_arguments(script, name.id) for name in names.elts if isinstance(name, ast.Name))


def read_fields(script: Path) -> dict[str, Field]:
    """Read all fields of a script, by their names.

    Example:
        >>> from rlhf_recipes.tools.commands.folder import recipes_folder
        >>> read_fields(recipes_folder() / "ppo.py")["critic"].kind
        'adapter|head|model'
    """
    return {field.name: field for group in read_arguments(script) for field in (*group.own, *group.inherited)}


def summary(script: Path) -> str:
    """First line of a script's docstring."""
    return (ast.get_docstring(_tree(script)) or "").partition("\n")[0]


def _arguments(script: Path, name: str) -> Arguments:
    path, definition = _definition(script, name)
    if not isinstance(definition, ast.ClassDef):
        raise LookupError(f"{name} in {path} is no class.")
    fields = _fields(path, definition)
    own = _fields_of_ours(script, path, definition)
    return Arguments(
        name,
        (ast.get_docstring(definition) or "").partition("\n")[0],
        tuple(field for field in fields.values() if field.name in own),
        tuple(field for field in fields.values() if field.name not in own),
    )


@cache
def _tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def _statements(tree: ast.Module) -> Iterator[ast.stmt]:
    """Statements of a module, also those under `if TYPE_CHECKING:`, where lazy packages import their names."""
    for node in tree.body:
        yield node
        if isinstance(node, ast.If):
            yield from [*node.body, *node.orelse]


def _definition(path: Path, name: str) -> tuple[Path, ast.ClassDef | ast.expr]:
    """Find where a name is defined, by way of imports: the file, and the class or the value."""
    for node in _statements(_tree(path)):
        if isinstance(node, ast.ClassDef) and node.name == name:
            return path, node
        if isinstance(node, ast.Assign) and any(isinstance(to, ast.Name) and to.id == name for to in node.targets):
            return path, node.value
        if isinstance(node, ast.ImportFrom):
            for alias in node.names:
                if (alias.asname or alias.name) == name:
                    return _definition(_imported(path, node), alias.name)
    raise LookupError(f"{name} is not defined in {path}.")


def _imported(path: Path, node: ast.ImportFrom) -> Path:
    parts = (node.module or "").split(".") if node.module else []
    if node.level:
        folder = path.parents[node.level - 1]
    else:
        spec = find_spec(parts[0])
        if spec is None or spec.origin is None:
            raise LookupError(f"{parts[0]} is not installed.")
        folder = Path(spec.origin).parent
        parts = parts[1:]
    place = folder.joinpath(*parts)
    return place / "__init__.py" if place.is_dir() else place.with_name(f"{place.name}.py")


def _fields(path: Path, definition: ast.ClassDef) -> dict[str, Field]:
    """Fields of a dataclass with those of its bases, in the order of dataclasses."""
    fields: dict[str, Field] = {}
    for place, base in _bases(path, definition):
        fields |= _fields(place, base)
    return fields | _own_fields(path, definition)


def _fields_of_ours(script: Path, path: Path, definition: ast.ClassDef) -> set[str]:
    """Names of the fields that a dataclass and its bases define in the script or in this library."""
    names = {name for place, base in _bases(path, definition) for name in _fields_of_ours(script, place, base)}
    ours = path == script or Path(__file__).parents[2] in path.parents
    return names | set(_own_fields(path, definition)) if ours else names


def _bases(path: Path, definition: ast.ClassDef) -> Iterator[tuple[Path, ast.ClassDef]]:
    """Classes that a class derives from, the last one first, each with its file."""
    for base in reversed(definition.bases):
        if isinstance(base, ast.Name):
            place, found = _definition(path, base.id)
            if isinstance(found, ast.ClassDef):
                yield place, found


def _own_fields(path: Path, definition: ast.ClassDef) -> dict[str, Field]:
    fields = {}
    for node in definition.body:
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            settings = _settings(node.value)
            if _plain(settings.get("init")) is not False:
                name = node.target.id
                fields[name] = Field(name, _default(settings), _help(settings), _kind(path, node.annotation))
    return fields


def _settings(value: ast.expr | None) -> dict[str, ast.expr]:
    """Keywords of `field(...)`, or a plain value as the default."""
    if isinstance(value, ast.Call) and isinstance(value.func, ast.Name) and value.func.id == "field":
        return {keyword.arg: keyword.value for keyword in value.keywords if keyword.arg is not None}
    return {} if value is None else {"default": value}


def _plain(node: ast.expr | None) -> Any:
    """Value of a literal, or `None`."""
    try:
        return None if node is None else ast.literal_eval(node)
    except ValueError:
        return None


def _default(settings: dict[str, ast.expr]) -> str | None:
    node = settings.get("default", settings.get("default_factory"))
    if node is None:
        return None
    value, source = _plain(node), ast.unparse(node)
    return value if isinstance(value, str) else _YAML_WORDS.get(source, source)


def _help(settings: dict[str, ast.expr]) -> str:
    metadata = settings.get("metadata")
    if not isinstance(metadata, ast.Dict):
        return ""
    texts = [value for key, value in zip(metadata.keys, metadata.values, strict=True) if _plain(key) == "help"]
    return str(_plain(texts[0]) or "") if texts else ""


def _kind(path: Path, annotation: ast.expr) -> str:
    """Words of a `Literal`, which may have a name of its own, or the annotation."""
    if isinstance(annotation, ast.Constant) and isinstance(annotation.value, str):
        annotation = ast.parse(annotation.value, mode="eval").body
    if isinstance(annotation, ast.BinOp):
        kinds = [_kind(path, annotation.left), _kind(path, annotation.right)]
        return "|".join(kind for kind in kinds if kind != "None")
    words = _literal(annotation) or (_literal(_named(path, annotation.id)) if isinstance(annotation, ast.Name) else "")
    return words or ast.unparse(annotation)


def _named(path: Path, name: str) -> ast.expr | ast.ClassDef | None:
    try:
        return _definition(path, name)[1]
    except (LookupError, OSError):  # `str` and its like, and what is compiled: the name says it
        return None


def _literal(node: ast.AST | None) -> str:
    if not isinstance(node, ast.Subscript) or ast.unparse(node.value) != "Literal":
        return ""
    words = node.slice.elts if isinstance(node.slice, ast.Tuple) else [node.slice]
    return "|".join(str(_plain(word)) for word in words)
