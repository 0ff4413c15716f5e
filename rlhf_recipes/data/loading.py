"""Load rows: from the hub, or from local json, jsonl, csv and parquet files and folders of them."""

from __future__ import annotations

import gzip
import json
import re
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet
from datasets import Dataset, concatenate_datasets, load_dataset, load_from_disk
from datasets.table import InMemoryTable

_SUFFIXES = (".jsonl.gz", ".json.gz", ".jsonl", ".json", ".csv", ".parquet")
_HUB_ID = re.compile(r"[A-Za-z0-9_][\w.-]*(/[\w.-]+)?")
_TYPES = {
    bool: "true or false",
    int: "a number",
    float: "a number",
    str: "text",
    list: "a list",
    dict: "an object",
}  # what JSON has
_SHARD = re.compile(r"-\d{5}-of-\d{5}$")


def load_rows(name: str, *, config: str | None = None, split: str = "train") -> Dataset:
    r"""Load one split of a dataset. Local files are read into memory, so nothing stale can come from a cache.

    Args:
        name: One of
            - a json, jsonl, csv or parquet file (json and jsonl also as `.gz`), which is one split, `train`;
            - a folder of such files named after their splits (`train.jsonl`, `test.jsonl`; parquet shards as on the
              hub, `train-00000-of-00002.parquet`);
            - a folder written by `save_to_disk`;
            - otherwise a dataset id on the hub. Code that comes with a dataset is never run.
        config: Configuration of a dataset on the hub.
        split: Split to load; on the hub also a slice such as `train[:10%]`.

    Returns:
        The rows.

    Raises:
        FileNotFoundError: If there is neither a local file or folder nor a dataset on the hub of this name.
        ValueError: If the file's type or the split is unknown, a file is broken, or there are no rows.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp()) / "prompts.jsonl"
        >>> _ = path.write_text('{"prompt": "The film was"}\n{"prompt": "I"}\n')
        >>> load_rows(str(path))["prompt"][:]
        ['The film was', 'I']
    """
    source = _find(name, config, split)
    rows = source if isinstance(source, Dataset) else concatenate_datasets([_read_file(path) for path in source])
    if len(rows) == 0:
        raise ValueError(f"Split {split!r} of {name} has no rows.")
    return rows


def load_records(name: str, *, config: str | None = None, split: str = "train") -> list[dict[str, Any]]:
    r"""Load one split of a dataset as plain values, each row with its source.

    In json and jsonl files the values of a column may be of different types, such as numbers and words.

    Args:
        name: As in `load_rows`.
        config: Configuration of a dataset on the hub.
        split: Split to load.

    Returns:
        The rows, each with `source` (the file, or the dataset's id), `row` (its number in it, from 0) and `line` (from
        1, or None where rows are not lines of json); a row's own values of these names stay.

    Raises:
        FileNotFoundError: As in `load_rows`.
        ValueError: As in `load_rows`.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp()) / "labels.jsonl"
        >>> _ = path.write_text('{"label": 0.7}\n\n{"label": "tie"}\n')
        >>> [(row["label"], row["row"], row["line"]) for row in load_records(str(path))]
        [(0.7, 0, 1), ('tie', 1, 3)]
    """
    source = _find(name, config, split)
    records = []
    for part in [source] if isinstance(source, Dataset) else source:
        if isinstance(part, Path) and _suffix(part) not in (".csv", ".parquet"):
            rows, lines = _read_json(part)
        else:
            rows = (part if isinstance(part, Dataset) else _read_file(part)).with_format(None).to_list()
            lines = [None] * len(rows)
        for number, (row, line) in enumerate(zip(rows, lines, strict=True)):
            origin = {"source": name if isinstance(part, Dataset) else str(part), "row": number, "line": line}
            records.append(row | {key: value for key, value in origin.items() if row.get(key) is None})
    if not records:
        raise ValueError(f"Split {split!r} of {name} has no rows.")
    return records


def _find(name: str, config: str | None, split: str) -> Dataset | list[Path]:
    """Return the files of a split, or its rows where they are no such files."""
    if not name:
        raise ValueError("No dataset was named. Set `dataset_name` to a dataset id on the hub or a local file.")
    path = Path(name).expanduser()
    if path.exists() and config is not None:
        raise ValueError(f"{path} is local, but `dataset_config` ({config!r}) is for datasets on the hub. Remove it.")
    if path.is_dir():
        return _find_in_folder(path, split)
    if path.exists():
        _check_split(path, split, ["train"])
        return [path]
    if _is_hub_id(name):
        return _download(name, config, split)
    raise _no_such_file(path)


def local_splits(name: str) -> list[str] | None:
    """List the splits of a local dataset.

    Args:
        name: As `load_rows` takes it.

    Returns:
        The names, or `None` for a dataset id on the hub.

    Raises:
        FileNotFoundError: If there is no such file or folder, and the name can be no dataset id.
        ValueError: If the file's type is unknown, or the folder holds nothing that can be read.

    Example:
        >>> local_splits("Anthropic/hh-rlhf")  # `None`
        >>> local_splits("nothing.jsonl")
        Traceback (most recent call last):
        ...
        FileNotFoundError: There is no file or folder nothing.jsonl (from ...). Check `dataset_name`.
    """
    path = Path(name).expanduser()
    if path.is_dir():
        return list(_splits_of(path))
    if path.exists():
        _suffix(path)
        return ["train"]
    if _is_hub_id(name):
        return None
    raise _no_such_file(path)


def _is_hub_id(name: str) -> bool:
    return bool(_HUB_ID.fullmatch(name)) and not name.endswith(_SUFFIXES)


def _no_such_file(path: Path) -> FileNotFoundError:
    return FileNotFoundError(f"There is no file or folder {path} (from {Path.cwd()}). Check `dataset_name`.")


def _download(name: str, config: str | None, split: str) -> Dataset:
    try:
        return load_dataset(name, config, split=split)
    except (FileNotFoundError, ConnectionError) as error:
        raise FileNotFoundError(
            f"{name!r} is no local file or folder, and could not be loaded from the hub as a dataset id: {error}"
        ) from error


def _find_in_folder(folder: Path, split: str) -> Dataset | list[Path]:
    splits = _splits_of(folder)
    _check_split(folder, split, splits)
    found = splits[split]
    if isinstance(found, Dataset):
        return found
    if len({_suffix(path) for path in found}) > 1:
        names = ", ".join(path.name for path in found)
        raise ValueError(f"{folder} holds split {split!r} more than once: {names}. Give the path of one file.")
    return found


def _splits_of(folder: Path) -> dict[str, Dataset | list[Path]]:
    """The splits in a folder: their rows where `save_to_disk` wrote them, or their files."""
    if (folder / "dataset_dict.json").is_file() or (folder / "state.json").is_file():
        # In memory, because otherwise later steps would write their caches into the user's folder.
        saved = load_from_disk(str(folder), keep_in_memory=True)
        return {"train": saved} if isinstance(saved, Dataset) else dict(saved)
    files: dict[str, list[Path]] = {}
    for path in sorted(path for path in folder.iterdir() if path.name.endswith(_SUFFIXES)):
        files.setdefault(_SHARD.sub("", path.name.removesuffix(_suffix(path))), []).append(path)
    if not files:
        raise ValueError(f"{folder} holds none of the files that can be read here ({', '.join(_SUFFIXES)}).")
    return dict(files)


def _check_split(path: Path, split: str, known: Any) -> None:
    if split not in known:
        raise ValueError(f"{path} has no split {split!r}. Its splits: {', '.join(map(repr, known))}.")


def _suffix(path: Path) -> str:
    suffix = next((suffix for suffix in _SUFFIXES if path.name.endswith(suffix)), None)
    if suffix is None:
        raise ValueError(f"{path} is of an unknown type. Files that can be read: {', '.join(_SUFFIXES)}.")
    return suffix


def _read_file(path: Path) -> Dataset:
    suffix = _suffix(path)
    try:
        if suffix == ".parquet":
            return Dataset(InMemoryTable(pyarrow.parquet.read_table(path)))
        if suffix == ".csv":
            quoted_lines = pyarrow.csv.ParseOptions(newlines_in_values=True)
            return Dataset(InMemoryTable(pyarrow.csv.read_csv(path, parse_options=quoted_lines)))
        rows, _ = _read_json(path)
        # Not `Dataset.from_list`: it takes the columns of the first row for those of all.
        columns = dict.fromkeys(column for row in rows for column in row)
        arrays = {column: _to_array(path, column, [row.get(column) for row in rows]) for column in columns}
        return Dataset(InMemoryTable(pa.table(arrays)))
    except (pa.ArrowInvalid, pa.ArrowTypeError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from error


def _to_array(path: Path, column: str, values: list[Any]) -> pa.Array:
    """Refuse a column that mixes types. Arrow would take true among numbers for 1, and names no column."""
    first: dict[str, int] = {}
    for row, value in enumerate(values):
        if value is not None:
            first.setdefault(_TYPES[type(value)], row)
    detail = ", ".join(f"{kind} in row {row}" for kind, row in first.items())
    try:
        if len(first) < 2:
            return pa.array(values)
    except pa.ArrowException as error:
        detail = str(error)
    raise ValueError(f"{path}: `{column}` has values of different types: {detail}. Give all rows the same type.")


def _read_json(path: Path) -> tuple[list[dict[str, Any]], list[int | None]]:
    """Read one list of objects, or one object per line and its number, whatever the file's name says."""
    opened = gzip.open if path.suffix == ".gz" else open
    try:
        with opened(path, "rt", encoding="utf-8-sig") as file:
            text = file.read()
    except (gzip.BadGzipFile, EOFError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from error
    # Not `splitlines`, which also cuts at rare line ends that may stand inside a JSON string.
    is_list = text.lstrip().startswith("[")
    pieces = [(1, text)] if is_list else [(n, line) for n, line in enumerate(text.split("\n"), 1) if line.strip()]
    rows: list[Any] = []
    lines: list[int | None] = []
    for first_line, piece in pieces:
        try:
            value = json.loads(piece)
        except json.JSONDecodeError as error:
            line = first_line + error.lineno - 1
            raise ValueError(f"{path}, line {line}: not valid JSON ({error.msg}).") from error
        objects = value if is_list else [value]
        if not all(isinstance(row, dict) for row in objects):
            raise ValueError(f'{path}, line {first_line}: expected a JSON object per row, such as {{"prompt": ...}}.')
        rows += objects
        lines += [None] * len(objects) if is_list else [first_line]
    return rows, lines
