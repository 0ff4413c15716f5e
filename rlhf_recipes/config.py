"""Arguments of a stage: read from a YAML file and the command line, and checked before anything is loaded."""

import argparse
import dataclasses
import difflib
import re
import sys
import typing
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, Union

import yaml

from rlhf_recipes.extras import from_extra

# Fields of TRL and transformers that take more than their annotation says.
_ALSO_TAKES = {"resume_from_checkpoint": (bool,), "scale_rewards": (bool,), "lora_target_modules": (str,)}
_NULL_OF_THE_PARSER = ("debug",)  # for which it gives null in place of the default, an empty text
_NULL = ("null", "Null", "NULL", "~")  # YAML 1.2's
_NULL_MEANS = {"report_to": "none"}  # transformers would make a list of one None
_GIVEN = "_given"  # the attribute of a parsed dataclass for `given_settings`
_OPTION = re.compile(r"--?[A-Za-z]")
_PLAIN = (NoneType, bool, int, float, str, list, dict)
_WORDS = {
    NoneType: "null",
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "text (a number in quotes)",
    dict: "a mapping",
}


@dataclass
class DataArguments:
    """The rows that a stage reads, and how many of them it keeps for the evaluation.

    Raises:
        ValueError: If a value has the wrong type or is out of range.

    Example:
        >>> DataArguments(dataset_name="pairs.jsonl").test_size
        0.1
    """

    dataset_name: str | None = field(
        default=None,
        metadata={"help": "Dataset id on the hub, or a local json, jsonl, csv or parquet file, or a folder of such."},
    )
    dataset_config: str | None = field(default=None, metadata={"help": "Configuration of a dataset on the hub."})
    dataset_train_split: str = field(default="train", metadata={"help": "Split to train on."})
    dataset_test_split: str | None = field(
        default=None, metadata={"help": "Split to evaluate on. null: hold out `test_size` of the training split."}
    )
    test_size: float = field(
        default=0.1, metadata={"help": "Share of the prompts, between 0 and 1, held out when there is no test split."}
    )
    max_train_rows: int | None = field(default=None, metadata={"help": "Most rows to train on. null: all of them."})
    max_test_rows: int | None = field(default=None, metadata={"help": "Most rows to evaluate on. null: all of them."})
    drop_bad_rows: bool = field(
        default=False,
        metadata={"help": "Leave out rows that cannot be used, such as those with an empty completion."},
    )

    def __post_init__(self) -> None:
        """Check types and ranges."""
        validate_fields(self)
        if not 0.0 < self.test_size < 1.0:
            raise ValueError(f"`test_size` must lie between 0 and 1, got {self.test_size}.")
        for name, rows in (("max_train_rows", self.max_train_rows), ("max_test_rows", self.max_test_rows)):
            if rows is not None and rows < 1:
                raise ValueError(f"`{name}` must be at least 1, or null for all rows, got {rows}.")


def validate_fields(config: Any) -> None:
    """Check the value of every field of a dataclass instance against the field's annotation.

    Only plain values (numbers, text, true/false, None, lists, maps) are judged: objects that a config's
    `__post_init__` built are its own business. A whole number is a number; true and false are none.

    Args:
        config: Instance of a dataclass.

    Raises:
        ValueError: If a value does not fit; it names the field, what it allows and what it got.

    Example:
        >>> @dataclass
        ... class Arguments:
        ...     estimator: Literal["k1", "k2"] = "k1"
        ...     steps: int = 3
        >>> validate_fields(Arguments())
        >>> validate_fields(Arguments(estimator="k9"))
        Traceback (most recent call last):
        ...
        ValueError: `estimator` must be 'k1' or 'k2', got 'k9' (str).
    """
    for name, annotation in _annotations(type(config)).items():
        value = getattr(config, name)
        if value is None and name in _NULL_OF_THE_PARSER:
            continue
        if isinstance(value, _PLAIN) and not _fits(value, annotation, name):
            raise ValueError(_complaint(name, annotation, value))


class ChosenDefaults:
    """Mixin for training arguments: defaults that transformers and torch would warn of although nobody has set them.

    TRL's default for `activation_checkpointing` stands under the old name of the field, `gradient_checkpointing`; and
    memory is pinned (`dataloader_pin_memory`) where there is an accelerator to copy it to.
    """

    def __post_init__(self) -> None:
        """Choose the defaults, around what TRL and transformers do."""
        config: Any = self  # fields named here would take the place of TRL's
        if config.activation_checkpointing is None:
            config.activation_checkpointing = config.gradient_checkpointing
        super().__post_init__()  # type: ignore[misc]  # that of the training arguments
        if config.device.type == "cpu":
            config.dataloader_pin_memory = False


def parse_stage(dataclass_types: type | Iterable[type], argv: Iterable[str] | None = None) -> tuple[Any, ...]:
    """Read the arguments of a stage: `--config FILE.yaml` gives values, the command line overrides them.

    TRL's parser does the work. It also takes a wrong YAML value as it is (2.5 for a whole number, an unknown word for
    a `Literal`); here that is an error, as is any key or option that no dataclass has. In the file, `1e-5` is a
    number and `no` is a word, as in YAML 1.2.

    On the command line `null` (or `~`) is YAML's null: it unsets a field that allows None, whatever the file says.
    `none` is a word like any other. Several words after an option are a list, where the field allows one.

    Each dataclass keeps what it was given, for `given_settings`.

    A program that parses its arguments here writes the progress bars of transformers and datasets to terminals only.

    Args:
        dataclass_types: One dataclass, or several without a field in common.
        argv: Command-line arguments; `None` takes those of the process.

    Returns:
        One instance of each dataclass, in order.

    Raises:
        FileNotFoundError: If the YAML file does not exist.
        ValueError: If a key or option is unknown (the error names the nearest one), a value has the wrong type, an
            option has several values where one is allowed, or the file is not a YAML mapping.
        ModuleNotFoundError: If `report_to` names W&B, and it is not installed.

    Example:
        >>> (data,) = parse_stage(DataArguments, ["--dataset_name", "pairs.jsonl", "--test_size", "0.2"])
        >>> data.dataset_name, data.test_size
        ('pairs.jsonl', 0.2)
        >>> parse_stage(DataArguments, ["--dataset_test_split", "test", "--dataset_test_split", "null"])[0]
        DataArguments(dataset_name=None, dataset_config=None, dataset_train_split='train', dataset_test_split=None, ...
        >>> parse_stage(DataArguments, ["--test_sice", "0.2"])
        Traceback (most recent call last):
        ...
        ValueError: Unknown option on the command line: '--test_sice' (did you mean '--test_size'?).
    """
    from trl import TrlParser  # takes seconds, and only programs that parse need it

    types: list[Any] = list(dataclass_types) if isinstance(dataclass_types, Iterable) else [dataclass_types]
    annotations = {name: hint for dataclass_type in types for name, hint in _annotations(dataclass_type).items()}
    parser = TrlParser(
        types, allow_abbrev=False, exit_on_error=False, usage="%(prog)s [--config FILE] [--field value]"
    )
    before = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    before.add_argument("--config")
    try:
        known, options = before.parse_known_args(sys.argv[1:] if argv is None else list(argv))
        values = {} if known.config is None else _read_config(Path(known.config), annotations)
        options, overrides = _split_options(options, annotations)
        values |= overrides
        parser.set_defaults_with_config(**{n: _NULL_MEANS.get(n) if v is None else v for n, v in values.items()})
        parsed = vars(parser.parse_known_args(options)[0])
        *configs, unknown = parser.parse_args_into_dataclasses(
            options, return_remaining_strings=True, look_for_args_file=False
        )
        unset = object()
        parser.set_defaults(**dict.fromkeys(annotations, unset))
        from_options = {name for name, v in vars(parser.parse_known_args(options)[0]).items() if v is not unset}
        given = {name: parsed[name] for name in values.keys() | from_options}
    except argparse.ArgumentError as error:
        raise ValueError(f"{str(error).rstrip('.')}.") from error
    if unknown:
        option = next((text.partition("=")[0] for text in unknown if text.startswith("--")), unknown[0])
        raise ValueError(f"Unknown option on the command line: {_suggest(option, [f'--{n}' for n in annotations])}.")
    show_bars_on_terminals_only()
    for config in configs:
        validate_fields(config)
        setattr(config, _GIVEN, {name: given[name] for name in _annotations(type(config)) if name in given})
        if "wandb" in (getattr(config, "report_to", None) or ()):
            with from_extra("wandb", needed_by="`report_to: wandb`"):
                import wandb  # noqa: F401  # the trainer would say so only after the model is loaded
    return tuple(configs)


def read_setting(name: str, argv: Iterable[str] | None = None) -> Any:
    """Read one setting before the others, where it decides which others there are.

    Args:
        name: The field.
        argv: Command-line arguments, as of `parse_stage`.

    Returns:
        Its last value on the command line, else that in the file of `--config`, else `None`. It is not checked:
        `parse_stage` does that.

    Raises:
        FileNotFoundError: If the YAML file does not exist.
        ValueError: If it is no YAML mapping.

    Example:
        >>> read_setting("algorithm", ["--beta", "0.1", "--algorithm", "rloo"])
        'rloo'
    """
    words: dict[str, str] = {}
    for first, *rest in group_options(sys.argv[1:] if argv is None else argv):
        option, equals, inline = first.partition("=")
        if equals or rest:
            words[option.removeprefix("--").replace("-", "_")] = inline if equals else rest[0]
    if name in words:
        return words[name]
    return _read_mapping(Path(words["config"])).get(name) if "config" in words else None


def given_settings(config: Any) -> dict[str, Any]:
    """Return the settings that a dataclass of a stage was made of, where they differ from the defaults.

    Of one that `parse_stage` made these are the values of the file and the command line, not what `__post_init__`
    derived from them, which could contradict them if both were given. Of one that was made in Python, they are its
    plain values (numbers, text, true/false, None, lists, maps).

    Args:
        config: Instance of a dataclass.

    Returns:
        The values by field, in the order of the fields.

    Example:
        >>> (data,) = parse_stage(DataArguments, ["--dataset_name", "pairs.jsonl", "--test_size", "0.1"])
        >>> given_settings(data), given_settings(DataArguments(max_test_rows=3))
        ({'dataset_name': 'pairs.jsonl'}, {'max_test_rows': 3})
    """
    defaults = {entry.name: _default(entry) for entry in dataclasses.fields(config) if entry.init}
    values = getattr(config, _GIVEN, None)
    if values is None:
        values = {name: getattr(config, name) for name in defaults}
    plain = {name: value.value if isinstance(value, Enum) else value for name, value in values.items()}
    return {
        name: plain[name]
        for name, default in defaults.items()
        if name in plain and isinstance(plain[name], _PLAIN) and plain[name] != default
    }


def read_config(text: str) -> Any:
    r"""Read YAML as `--config` does, in which `1e-5` is a number and `no` a word.

    Raises:
        yaml.YAMLError: If it is not valid.

    Example:
        >>> read_config("learning_rate: 1e-5\nsave_strategy: no")
        {'learning_rate': 1e-05, 'save_strategy': 'no'}
    """
    return yaml.load(text, _Loader)


def write_config(values: Mapping[str, Any]) -> str:
    """Write a YAML file that `--config` reads as the same values, as does any other reader of YAML.

    Args:
        values: Plain values by field.

    Example:
        >>> print(write_config({"save_strategy": "no", "run_name": "1e-5", "learning_rate": 1e-5}), end="")
        save_strategy: 'no'
        run_name: '1e-5'
        learning_rate: 1.0e-05
    """
    return str(yaml.dump(dict(values), Dumper=_Dumper, sort_keys=False, width=119))


def _default(entry: dataclasses.Field[Any]) -> Any:
    default = entry.default if entry.default_factory is dataclasses.MISSING else entry.default_factory()
    return default.value if isinstance(default, Enum) else default


def show_bars_on_terminals_only() -> None:
    """Turn the progress bars of transformers and datasets off where the standard error is a file or a pipe.

    Example:
        >>> show_bars_on_terminals_only()
    """
    import datasets  # only programs that load models or rows wait for these two
    import transformers

    if not sys.stderr.isatty():
        datasets.disable_progress_bars()
        transformers.logging.disable_progress_bar()


class _Loader(yaml.SafeLoader):  # type: ignore[misc]  # PyYAML has no types
    """YAML 1.2's numbers and booleans. PyYAML reads `1e-5` as text and `save_strategy: no` as `False`."""


_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if not tag.endswith(":bool")]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver("tag:yaml.org,2002:bool", re.compile("^(?:true|True|TRUE|false|False|FALSE)$"), "tTfF")
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?(?:\.\d+|\d+(?:\.\d*)?)[eE][-+]?\d+$"), "-+.0123456789"
)


class _Dumper(yaml.SafeDumper):  # type: ignore[misc]  # PyYAML has no types
    """Puts text into quotes that a reader of YAML 1.1 or 1.2 would take for something else."""

    def ignore_aliases(self, data: Any) -> bool:
        """Write a list that is there twice twice."""
        return True


_Dumper.yaml_implicit_resolvers = {
    first: [*yaml.SafeDumper.yaml_implicit_resolvers.get(first, []), *_Loader.yaml_implicit_resolvers.get(first, [])]
    for first in {*yaml.SafeDumper.yaml_implicit_resolvers, *_Loader.yaml_implicit_resolvers}
}


def _read_mapping(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise FileNotFoundError(f"There is no config file {path}. Give `--config` the path of a YAML file.")
    try:
        config = read_config(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not valid YAML: {error}") from error
    if not isinstance(config, dict):
        raise ValueError(f"{path} must hold a mapping of `field: value` lines, found {type(config).__name__}.")
    return config


def _read_config(path: Path, annotations: Mapping[str, Any]) -> dict[str, Any]:
    config = _read_mapping(path)
    unknown = [_suggest(str(key), annotations) for key in config if key not in annotations]
    if unknown:
        raise ValueError(f"Unknown {'key' if len(unknown) == 1 else 'keys'} in {path}: {', '.join(unknown)}.")
    for name, value in config.items():
        # Text for a number or a switch is read later, as it is from the command line.
        parsed_later = isinstance(value, str) and not {int, float, bool}.isdisjoint(_options(annotations[name]))
        if not parsed_later and not _fits(value, annotations[name], name):
            raise ValueError(f"{path}: {_complaint(name, annotations[name], value)}")
    return config


def group_options(argv: Iterable[str]) -> list[list[str]]:
    """Group the words of a command line: every option with the words that follow it.

    Args:
        argv: The words. Those before the first option are a group of their own.

    Returns:
        The groups, in order.

    Example:
        >>> group_options(["--kl_coef", "-1e-2", "--seed=1", "--names", "a", "b"])
        [['--kl_coef', '-1e-2'], ['--seed=1'], ['--names', 'a', 'b']]
    """
    groups: list[list[str]] = []
    for text in argv:
        if _OPTION.match(text) or not groups:
            groups.append([text])
        else:
            groups[-1].append(text)
    return groups


def _split_options(argv: list[str], annotations: Mapping[str, Any]) -> tuple[list[str], dict[str, Any]]:
    """Take out the options that argparse cannot read: it has no null, and one word for a field of text or a list.

    The last value of a field counts, as in argparse.

    Returns:
        The other options, and the values of those that were taken out.
    """
    left: list[tuple[str, list[str]]] = []
    own: dict[str, Any] = {}
    for first, *rest in group_options(argv):
        option, equals, inline = first.partition("=")
        name = option.removeprefix("--").replace("-", "_")
        own.pop(name, None)
        values = [inline, *rest] if equals else rest
        if option.startswith("--") and name in annotations and _is_own(name, annotations[name], values):
            own[name] = None if len(values) == 1 else values
            left = [group for group in left if group[0] != name]
        else:
            left.append((name, [first, *rest]))
    return [text for _, group in left for text in group], own


def _is_own(name: str, annotation: Any, values: list[str]) -> bool:
    """Return whether the words after an option are null, or several for a field of a text or a list of texts."""
    options = _options(annotation)
    if len(values) == 1 and values[0] in _NULL:
        if not _fits(None, annotation, name):
            raise ValueError(f"{_complaint(name, annotation, None)} Leave the option out to keep its default.")
        return True
    if len(values) < 2:
        return False
    if list[str] in options and str in options:
        return True
    if not any((typing.get_origin(option) or option) is list for option in options):
        raise ValueError(f"`{name}` takes one value on the command line, got {len(values)}: {' '.join(values)}.")
    return False


def _annotations(dataclass_type: type) -> dict[str, Any]:
    # Not `field.type`: the parser overwrites it with the type of a single command-line argument.
    hints = typing.get_type_hints(dataclass_type)
    return {entry.name: hints[entry.name] for entry in dataclasses.fields(dataclass_type) if entry.init}


def _options(annotation: Any) -> tuple[Any, ...]:
    is_union = typing.get_origin(annotation) in (Union, UnionType)
    return typing.get_args(annotation) if is_union else (annotation,)


def _fits(value: Any, annotation: Any, name: str = "") -> bool:
    return any(_fits_one(value, option) for option in (*_options(annotation), *_ALSO_TAKES.get(name, ())))


def _fits_one(value: Any, annotation: Any) -> bool:
    origin = typing.get_origin(annotation) or annotation
    if origin is Any:
        return True
    if origin is Literal:
        return any(value == choice and type(value) is type(choice) for choice in typing.get_args(annotation))
    if origin is list:
        items = typing.get_args(annotation) or (Any,)
        return isinstance(value, list) and all(_fits(item, items[0]) for item in value)
    if isinstance(value, bool):
        return origin is bool
    if origin is float:
        return isinstance(value, int | float)
    if issubclass(origin, Enum):
        return value in [member.value for member in origin]
    return isinstance(value, origin)


def _complaint(name: str, annotation: Any, value: Any) -> str:
    allowed = " or ".join(_describe(option) for option in _options(annotation))
    return f"`{name}` must be {allowed}, got {value!r} ({type(value).__name__})."


def _describe(annotation: Any) -> str:
    origin = typing.get_origin(annotation) or annotation
    if origin is Literal:
        return " or ".join(repr(choice) for choice in typing.get_args(annotation))
    if origin is list:
        return "a list of items that are " + " or ".join(_describe(item) for item in typing.get_args(annotation))
    if isinstance(origin, type) and issubclass(origin, Enum):
        return " or ".join(repr(member.value) for member in origin)
    return _WORDS.get(origin, str(origin))


def _suggest(name: str, known: Iterable[str]) -> str:
    nearest = difflib.get_close_matches(name, known, n=1)
    return f"{name!r} (did you mean {nearest[0]!r}?)" if nearest else repr(name)
