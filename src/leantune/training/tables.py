"""From a file to named columns: the tables and texts that data sets come in."""

import gzip
import re
import tempfile
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

import datasets
import pandas
from datasets.exceptions import DatasetGenerationError

from leantune.errors import ConfigError, shown
from leantune.training.parse import parse_json

Columns = Mapping[str, Sequence[Any]]
FORMATS = {".tsv": "csv", ".csv": "csv", ".jsonl": "json", ".json": "json"}
FORMATS |= {".parquet": "parquet", ".txt": "text"}
_SPLIT_WORDS = {
    "train": ("train",),
    "validation": ("validation", "valid", "dev"),
    "validation_matched": ("validation_matched", "dev_matched", "validation", "dev"),
}


def find_split(folder: Path, task: str, split: str, *, is_optional: bool = False) -> Path | None:
    """Find the one file of a split: ``<task>.<split>``, ``<split>`` or ``<task>/<split>``.

    ``validation`` may also be called ``valid`` or ``dev``; any suffix of ``FORMATS`` is taken, and
    ``.gz`` after it.

    Returns:
        The file; None where there is none, if that is allowed.

    Raises:
        ConfigError: no such folder, no such file, or several.
    """
    stems = [s for w in _SPLIT_WORDS[split] for s in (f"{task}.{w}", w, f"{task}/{w}")]
    suffixes = [suffix + gz for suffix in FORMATS for gz in ("", ".gz")]
    found = [p for s in stems for x in suffixes if (p := folder / (s + x)).is_file()]
    if not found and is_optional:
        return None
    if len(found) != 1:
        there = [str(p) for p in found] or sorted(p.name for p in folder.iterdir())[:20]
        raise ConfigError(
            f"find_split: folder {folder} must hold one {split} file of task {task} "
            f"({', '.join(stems)}, with {' '.join(FORMATS)}), got {there}; rename the file, or "
            "give another folder"
        )
    return found[0]


def read_splits(
    task: str, source: str, names: Mapping[str, str], may_split: bool
) -> dict[str, tuple[Columns, str]]:
    """Read the splits of a folder, a file or a hub data set: columns, and where they are from.

    Args:
        task: whose name files may begin with.
        names: split -> what the source calls it.
        may_split: whether ``train`` is enough, since a share of it can become ``validation``.

    Raises:
        ConfigError: there is no such source, or a file is missing or damaged.
    """
    path = Path(source).expanduser()
    if path.is_dir():
        found: dict[str, Path | None] = {
            at: find_split(path, task, name, is_optional=may_split and at == "validation")
            for at, name in names.items()
        }
        return {at: (read_columns(file), str(file)) for at, file in found.items() if file}
    if path.is_file() and may_split:
        return {"train": (read_columns(path), source)}
    return _read_hub(task, source, names, may_split)


def _read_hub(
    task: str, source: str, names: Mapping[str, str], may_split: bool
) -> dict[str, tuple[Columns, str]]:
    name, _, config = source.partition(":")
    if source == "hub":
        name, config = "nyu-mll/glue", task
    try:
        there = datasets.get_dataset_split_names(name, config or None) if may_split else []
        wanted = ["train"] if may_split and "validation" not in there else [*names.values()]
        found = {at: datasets.load_dataset(name, config or None, split=at) for at in wanted}
    # The library's own errors, those of the HTTP client and those of the file formats.
    except Exception as error:
        raise ConfigError(
            f"load_task: data must be a folder, or a data set on the hub with splits "
            f"{', '.join(names.values())}, got {source!r}, which is no folder here "
            f"({type(error).__name__}: {error}); correct the path, or without a network give a "
            "local folder"
        ) from error
    return {
        split: (dataset_columns(found[at]), f"{source} {at}")
        for split, at in names.items()
        if at in found
    }


def read_columns(path: Path) -> Columns:
    """Read a file's columns by name; a text has one, ``text``, with a line in each row.

    Raises:
        ConfigError: the file is empty or damaged, or of no known format.
    """
    suffix = Path(path.name.removesuffix(".gz")).suffix
    try:
        if FORMATS.get(suffix) == "json":
            columns = _json_columns(path)
        elif FORMATS.get(suffix) == "csv":
            columns = _table_columns(path, suffix)
        else:
            columns = dataset_columns(_read_dataset(path, suffix))
        if not all(map(len, columns.values())):
            raise ValueError("no rows")
    # Each reader raises its own errors, and datasets hides them in one of its own.
    except Exception as error:
        is_hidden = isinstance(error, DatasetGenerationError)
        reason = " ".join(str((is_hidden and error.__cause__) or error).split())
        raise ConfigError(
            f"load_task: {path} must be a table or text that can be read "
            f"({' '.join(FORMATS)}), got {type(error).__name__}: {reason}; export the data set "
            "again"
        ) from error
    return columns


def dataset_columns(rows: Any) -> Columns:
    """Return a data set's columns, which are read when they are needed."""
    return {name: rows[name] for name in rows.column_names}


def checked(
    columns: Columns, name: str, place: str, rule: str, read: Callable[[Any], Any]
) -> list[Any]:
    """Return what ``read`` makes of each value of a column.

    Raises:
        ConfigError: there is no such column, or ``read`` makes None of a value; names the first.
    """
    values = list(map(read, column_of(columns, name, place)))
    if None in values:
        at = values.index(None)
        refuse(f"{place} row {at + 1}", repr(name), rule, columns[name][at])
    return values


def refuse(where: str, name: str, rule: str, value: Any) -> NoReturn:
    """Raise a ConfigError that names the row, what it must hold and what it holds."""
    raise ConfigError(
        f"load_task: {where}: {name} must be {rule}, got {shown(value)}; correct or remove the row"
    )


def column_of(columns: Columns, name: str, place: str) -> Sequence[Any]:
    """Return a column's values.

    Raises:
        ConfigError: there is no such column.
    """
    if name not in columns:
        raise without_columns(place, repr(name), columns)
    return columns[name]


def without_columns(place: str, rule: str, columns: Columns) -> ConfigError:
    """Return the error for a table without the columns that its task needs."""
    return ConfigError(
        f"load_task: {place}: columns must be {rule}, got {', '.join(columns)}; rename the "
        "columns in the file"
    )


def as_text(value: Any) -> str | None:
    """Return a text that UTF-8 can hold: JSON may spell half a character."""
    is_text = isinstance(value, str) and not re.search("[\ud800-\udfff]", value)
    return value if is_text else None


def _table_columns(path: Path, suffix: str) -> Columns:
    """Read every field of a table as the text it is, be it a number or the word "null"."""
    # GLUE does not quote.
    how: dict[str, Any] = {"sep": "\t", "quoting": 3} if suffix == ".tsv" else {}
    how |= {"dtype": str, "na_filter": False, "index_col": False}
    names = pandas.read_csv(path, nrows=1, header=None, **how).iloc[0].tolist()
    if twice := {name for name in names if names.count(name) > 1}:
        raise ValueError(f"columns twice: {', '.join(twice)}")
    with warnings.catch_warnings():
        # Rows longer than the header are cut short with a warning.
        warnings.simplefilter("error", pandas.errors.ParserWarning)
        table = pandas.read_csv(path, **how)
    return {name: table[name].tolist() for name in table}


def _read_dataset(path: Path, suffix: str) -> Any:
    if suffix not in FORMATS:
        raise ValueError(f"suffix {suffix!r}")
    with tempfile.TemporaryDirectory() as cache:
        where = {"data_files": str(path), "cache_dir": cache, "keep_in_memory": True}
        return datasets.load_dataset(FORMATS[suffix], split="train", **where)


def _json_columns(path: Path) -> Columns:
    """Read mappings, one on each line or all in one list.

    The readers in C crash where brackets nest deep, and turn what they cannot store into text.
    """
    with (gzip.open if path.suffix == ".gz" else open)(path, "rt", encoding="utf-8-sig") as file:
        text = file.read()
    if text.lstrip().startswith("["):
        rows = parse_json(text)
    else:
        rows = []
        for number, line in enumerate(text.split("\n"), 1):
            try:
                rows += [parse_json(line)] if line.strip() else []
            except ValueError as error:
                raise ValueError(f"line {number}: {error}") from error
    names = rows[0].keys() if rows and isinstance(rows[0], dict) else ()
    for number, row in enumerate(rows, 1):
        if not isinstance(row, dict) or row.keys() != names:
            raise ValueError(f"row {number}: no mapping with the keys of the first")
    return {name: [row[name] for row in rows] for name in names}
