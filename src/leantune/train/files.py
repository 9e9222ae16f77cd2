"""Strict readers of local tables and texts: a fault names the file and, if any, the line."""

from __future__ import annotations

import csv
import gzip
import io
import json
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from leantune.errors import ConfigError

TABLE_SUFFIXES = (
    ".tsv",
    ".tsv.gz",
    ".csv",
    ".csv.gz",
    ".jsonl",
    ".jsonl.gz",
    ".json",
    ".json.gz",
    ".parquet",
)
TEXT_SUFFIXES = (".txt", ".txt.gz")

_SPLIT_WORDS = {
    "train": ("train",),
    "validation": ("validation", "valid", "dev"),
    "validation_matched": ("validation_matched", "dev_matched", "validation", "dev"),
    "test": ("test",),
}


@dataclass(frozen=True)
class FileTable:
    """Columns of one table, with the place of each row so that a bad value can be found again.

    Args:
        name: what errors call the table: a path, or a hub data set and its split.
        columns: column name to its values, all of one length, in file order.
        lines: line (from 1) at which each row starts; None where rows have no lines.
    """

    name: str
    columns: dict[str, list[Any]]
    lines: Sequence[int] | None = None

    def __len__(self) -> int:
        return len(next(iter(self.columns.values()), []))

    def place(self, row: int) -> str:
        """Name the file and the line of a row (from 0); the row itself where there are no lines."""
        if self.lines is None:
            return f"{self.name} row {row} (counted from 0)"
        return f"{self.name} line {self.lines[row]}"

    def column(self, name: str) -> list[Any]:
        """Return the values of one column.

        Raises:
            ConfigError: no such column; the message lists the columns found.
        """
        if name not in self.columns:
            found = ", ".join(map(repr, self.columns))
            raise ConfigError(
                f"{self.name}: column {name!r} must be in the table, got columns {found}; "
                "rename the column in the file"
            )
        return self.columns[name]


def read_table(path: str | Path, required: Iterable[str] = ()) -> dict[str, list[Any]]:
    """Read a local table into columns of Python values; nothing is guessed or skipped.

    ``.tsv`` has no quoting (GLUE): lines end at ``\\n``, fields at tabs, all values are strings.
    ``.csv`` follows RFC 4180, all values are strings. ``.jsonl`` and ``.json`` hold one object per
    line, all with the same keys. Each may end in ``.gz``. ``.parquet`` keeps its own types.

    Args:
        path: the file; its suffix decides the format.
        required: columns that must be there.

    Returns:
        Column name to values, in file order; at least one row.

    Raises:
        ConfigError: the file is missing, empty, damaged or lacks a required column.
    """
    table = load_table(path)
    for name in required:
        table.column(name)
    return table.columns


def load_table(path: str | Path) -> FileTable:
    """Read a local table as ``read_table`` does, and keep the line of every row.

    Args:
        path: the file; its suffix decides the format.

    Raises:
        ConfigError: the file is missing, empty or damaged.
    """
    path = Path(path)
    suffix = _table_suffix(path)
    if suffix == ".parquet":
        table = _read_parquet(path)
    else:
        text = _read_decoded(path, "read_table")
        kind = suffix.removesuffix(".gz")
        if kind == ".tsv":
            table = _parse_tsv(path, text)
        elif kind == ".csv":
            table = _parse_csv(path, text)
        else:
            table = _parse_json_lines(path, text)
    if len(table) == 0:
        raise ConfigError(
            f"read_table: {path} must hold at least one row, got a header only; "
            "export the data set again"
        )
    return table


def read_text(path: str | Path) -> str:
    """Read plain UTF-8 text, gunzipped where the name ends in ``.gz``.

    Args:
        path: the file; any suffix.

    Returns:
        The text, without a byte order mark; never empty.

    Raises:
        ConfigError: the file is missing, empty, a broken gzip or not UTF-8 (line named).
    """
    return _read_decoded(Path(path), "read_text")


def find_split(folder: str | Path, task: str, split: str) -> Path:
    """Find the one table of a split: ``<task>.<split>``, ``<split>`` or ``<task>/<split>``.

    ``validation`` may also be called ``valid`` or ``dev``.

    Args:
        folder: where the files are.
        task: name of the task, the prefix or sub-folder tried first.
        split: ``train``, ``validation``, ``validation_matched`` or ``test``.

    Raises:
        ConfigError: no such folder, no candidate (what was looked for and what is there), or
            two candidates (both named).
    """
    return _find_one(Path(folder), task, split, TABLE_SUFFIXES)


def find_text_split(folder: str | Path, task: str, split: str) -> Path | None:
    """Find the one plain text of a split as ``find_split`` does; None where there is none.

    Args:
        folder: where the files are.
        task: name of the task, the prefix or sub-folder tried first.
        split: ``train`` or ``validation``.

    Raises:
        ConfigError: two candidates; both named.
    """
    found = _candidates(Path(folder), task, split, TEXT_SUFFIXES)
    return _only(found, split) if found else None


def list_folder(folder: Path, limit: int = 20) -> str:
    """Name what a folder holds, for error messages; sub-folders end in ``/``.

    Args:
        folder: an existing folder.
        limit: most names given, >= 1.
    """
    names = sorted(p.name + ("/" if p.is_dir() else "") for p in folder.iterdir())
    shown = ", ".join(names[:limit]) or "nothing"
    return shown + (f" and {len(names) - limit} more" if len(names) > limit else "")


def require_folder(folder: str | Path, who: str) -> Path:
    """Return the folder as a path, or say what is there instead.

    Args:
        folder: the path given by the user.
        who: first words of the message.

    Raises:
        ConfigError: it does not exist or is a file.
    """
    folder = Path(folder)
    if not folder.is_dir():
        got = "a file" if folder.is_file() else "no such folder"
        raise ConfigError(
            f"{who}: source must be a folder of data files, got {str(folder)!r} ({got}); "
            "give the folder that holds the train and validation files"
        )
    return folder


def _find_one(folder: Path, task: str, split: str, suffixes: tuple[str, ...]) -> Path:
    require_folder(folder, "find_split")
    found = _candidates(folder, task, split, suffixes)
    if not found:
        stems = ", ".join(_stems(task, split))
        raise ConfigError(
            f"find_split: folder {folder} must hold a {split!r} file of task {task!r}, looked for "
            f"{stems} with suffix {' '.join(suffixes)}, got {list_folder(folder)}; "
            "rename the file or give another folder"
        )
    return _only(found, split)


def _only(found: list[Path], split: str) -> Path:
    if len(found) > 1:
        raise ConfigError(
            f"find_split: split {split!r} must have one file, got {len(found)}: "
            f"{', '.join(map(str, found))}; remove or rename all but one"
        )
    return found[0]


def _stems(task: str, split: str) -> list[str]:
    if split not in _SPLIT_WORDS:
        raise ConfigError(
            f"find_split: split must be one of {', '.join(_SPLIT_WORDS)}, got {split!r}"
        )
    return [
        stem for word in _SPLIT_WORDS[split] for stem in (f"{task}.{word}", word, f"{task}/{word}")
    ]


def _candidates(folder: Path, task: str, split: str, suffixes: tuple[str, ...]) -> list[Path]:
    paths = [folder / (stem + suffix) for stem in _stems(task, split) for suffix in suffixes]
    return [p for p in paths if p.is_file()]


def _table_suffix(path: Path) -> str:
    for suffix in TABLE_SUFFIXES:
        if path.name.endswith(suffix):
            return suffix
    raise ConfigError(
        f"read_table: suffix must be one of {' '.join(TABLE_SUFFIXES)}, got {path.name!r} "
        f"({path}); convert or rename the file"
    )


def _read_bytes(path: Path, who: str) -> bytes:
    try:
        data = path.read_bytes()
    except FileNotFoundError as error:
        parent = path.parent
        there = f"{parent} holds {list_folder(parent)}" if parent.is_dir() else f"no {parent}"
        raise ConfigError(
            f"{who}: file must exist, got {str(path)!r} ({there}); check the path"
        ) from error
    except OSError as error:
        reason = error.strerror or type(error).__name__
        raise ConfigError(
            f"{who}: file must be readable, got {str(path)!r} ({reason}); give a file you may read"
        ) from error
    if path.suffix == ".gz" and data:
        data = _gunzip(path, data, who)
    if not data:
        raise ConfigError(f"{who}: {path} must not be empty, got 0 bytes; fetch the file again")
    return data


def _gunzip(path: Path, data: bytes, who: str) -> bytes:
    try:
        return gzip.decompress(data)
    except EOFError as error:
        raise ConfigError(
            f"{who}: {path} must be a whole gzip file, got a truncated one ({len(data)} bytes); "
            "fetch the file again"
        ) from error
    except (gzip.BadGzipFile, zlib.error) as error:
        raise ConfigError(
            f"{who}: {path} must be a gzip file, got broken data ({error}); "
            "fetch the file again, or drop .gz from the name if it is not compressed"
        ) from error


def _read_decoded(path: Path, who: str) -> str:
    data = _read_bytes(path, who)
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise ConfigError(
            f"{who}: {path} line {line} must be UTF-8, got byte 0x{data[error.start]:02x}; "
            "convert the file, for example with iconv -t utf-8"
        ) from error
    text = text.removeprefix("\ufeff")
    if not text.strip("\r\n"):
        raise ConfigError(f"{who}: {path} must not be empty, got blank lines only")
    return text


def _check_header(path: Path, header: list[str]) -> None:
    twice = sorted({name for name in header if header.count(name) > 1})
    if twice:
        raise ConfigError(
            f"read_table: {path} line 1 must name each column once, got {twice[0]!r} "
            f"{header.count(twice[0])} times; rename the columns"
        )


def _check_width(path: Path, line: int, row: list[str], header: list[str], way_out: str) -> None:
    if len(row) != len(header):
        raise ConfigError(
            f"read_table: {path} line {line} must have {len(header)} fields as the header, "
            f"got {len(row)}; {way_out}"
        )


def _parse_tsv(path: Path, text: str) -> FileTable:
    lines = text.removesuffix("\n").split("\n")
    # Lines may end in \r\n; a \r is data where the header line has none.
    if lines[0].endswith("\r"):
        lines = [line.removesuffix("\r") for line in lines]
    header = lines[0].split("\t")
    _check_header(path, header)
    columns: list[list[str]] = [[] for _ in header]
    way_out = "a .tsv has no quoting: replace tabs and line breaks inside a field, or use .csv"
    for number, line in enumerate(lines[1:], start=2):
        row = line.split("\t")
        _check_width(path, number, row, header, way_out)
        for values, value in zip(columns, row, strict=True):
            values.append(value)
    columns_by_name = dict(zip(header, columns, strict=True))
    return FileTable(str(path), columns_by_name, range(2, len(lines) + 1))


def _parse_csv(path: Path, text: str) -> FileTable:
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    header: list[str] = []
    columns: list[list[str]] = []
    starts: list[int] = []
    way_out = "quote fields that hold a comma, a quote or a line break"
    line = 1
    try:
        for row in reader:
            if line == 1:
                header = row
                _check_header(path, header)
                columns = [[] for _ in header]
            else:
                _check_width(path, line, row, header, way_out)
                starts.append(line)
                for values, value in zip(columns, row, strict=True):
                    values.append(value)
            line = reader.line_num + 1
    except csv.Error as error:
        raise ConfigError(
            f"read_table: {path} line {line} must be a CSV record, got {error}; {way_out}"
        ) from error
    return FileTable(str(path), dict(zip(header, columns, strict=True)), starts)


def _parse_json_lines(path: Path, text: str) -> FileTable:
    columns: dict[str, list[Any]] = {}
    lines = text.removesuffix("\n").split("\n")
    way_out = "write one JSON object per line, all with the same keys"
    for number, line in enumerate(lines, start=1):
        where = f"read_table: {path} line {number}"
        try:
            row = json.loads(line)
        except ValueError as error:
            shown = line if len(line) <= 60 else line[:60] + "..."
            raise ConfigError(
                f"{where} must be a JSON object, got {shown!r} ({error}); {way_out}"
            ) from error
        if not isinstance(row, dict):
            raise ConfigError(
                f"{where} must be a JSON object, got a {type(row).__name__}; {way_out}"
            )
        if number == 1:
            columns = {key: [] for key in row}
        if row.keys() != columns.keys():
            raise ConfigError(
                f"{where} must have the {len(columns)} fields of line 1 "
                f"({', '.join(columns)}), got {len(row)} ({', '.join(row)}); {way_out}"
            )
        for key, value in row.items():
            columns[key].append(value)
    return FileTable(str(path), columns, range(1, len(lines) + 1))


def _read_parquet(path: Path) -> FileTable:
    import pyarrow
    import pyarrow.parquet

    data = _read_bytes(path, "read_table")
    try:
        table = pyarrow.parquet.read_table(pyarrow.BufferReader(data))
    except (pyarrow.ArrowException, OSError) as error:
        raise ConfigError(
            f"read_table: {path} must be a Parquet file, got broken data ({error}); "
            "fetch the file again"
        ) from error
    _check_header(path, table.column_names)
    return FileTable(str(path), table.to_pydict())
