"""From files or the hub to checked rows, and from rows to tokens."""

from __future__ import annotations

import random
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from leantune.errors import ConfigError
from leantune.train.files import (
    TEXT_SUFFIXES,
    FileTable,
    find_split,
    find_text_split,
    list_folder,
    load_table,
    read_text,
    require_folder,
)
from leantune.train.tasks import Task, get_task, parse_label, settle_columns, settle_labels

if TYPE_CHECKING:
    import datasets
    from transformers import PreTrainedTokenizerBase

TRAIN_SHARE_OF_ONE_TEXT = 0.95
# Rows tokenised at once: bounds the Python lists held beside the Arrow table.
_ROWS_PER_CHUNK = 10_000
_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?(:[\w.-]+)?")


@dataclass(frozen=True)
class Table:
    """Checked rows of one split.

    Args:
        columns: ``sentence1``, ``sentence2`` where the task has pairs, and ``label`` (class id
            from 0, or a finite float); for ``causal_lm`` only ``text``, one line per row.
    """

    columns: dict[str, list[Any]]

    def __len__(self) -> int:
        return len(next(iter(self.columns.values()), []))

    def __getitem__(self, name: str) -> list[Any]:
        return self.columns[name]


@dataclass(frozen=True)
class TaskData:
    """A task with its rows; the task's columns, kind and label names are those found.

    Args:
        task: the task, with nothing left for the data to decide.
        train: rows to learn from.
        validation: rows to judge by.
        num_labels: outputs of the head: classes, 1 for regression, 0 for ``causal_lm``.
        label_names: name of each class; None unless classification.
    """

    task: Task
    train: Table
    validation: Table
    num_labels: int
    label_names: tuple[str, ...] | None


def load_task(
    task: str | Task,
    source: str | Path,
    *,
    max_train: int | None = None,
    max_validation: int | None = None,
    subset_seed: int = 0,
) -> TaskData:
    """Read and check both splits of a task; a subset is the same rows for the same seed.

    Every label is checked before a subset is taken. Without a limit the rows keep their order;
    a subset is the head of one shuffle, so the smaller of two is contained in the larger.
    For ``causal_lm`` a subset is one run of neighbouring lines.

    Args:
        task: a name of ``TASKS``, or a task of your own.
        source: a folder of files (for ``causal_lm`` also one text file), ``"hub"``, or the
            name of a hub data set, with ``:config`` after it where it has several.
        max_train: most rows to keep, >= 1; None keeps all.
        max_validation: most rows to keep, >= 1; None keeps all.
        subset_seed: chooses the subset.

    Raises:
        ConfigError: a file or the hub data set is missing or damaged, a column is missing, or a
            label is bad (file, line and value named).
    """
    task = get_task(task) if isinstance(task, str) else task
    for name, limit in (("max_train", max_train), ("max_validation", max_validation)):
        if limit is not None and (type(limit) is not int or limit < 1):
            raise ConfigError(
                f"load_task: {name} must be an integer >= 1, got {limit!r}; "
                "leave it out for all rows"
            )
    if task.kind == "causal_lm":
        train_lines, validation_lines = _load_lines(task, source)
        train = Table({"text": _run_of_lines(train_lines, max_train, f"{subset_seed}/train")})
        validation = Table(
            {"text": _run_of_lines(validation_lines, max_validation, f"{subset_seed}/validation")}
        )
        return TaskData(task, train, validation, 0, None)
    hub = None if Path(source).exists() else _hub_source(task, str(source))
    if hub is None:
        folder = require_folder(source, "load_task")
        raw_train = load_table(find_split(folder, task.name, "train"))
        raw_validation = load_table(find_split(folder, task.name, task.validation_split))
    else:
        raw_train = _load_hub_split(hub, "train", "load_task")
        raw_validation = _load_hub_split(hub, task.validation_split, "load_task")
    task = settle_columns(task, raw_train)
    task, ids = settle_labels(task, raw_train)
    train = _subset(_check_rows(task, raw_train, ids), max_train, f"{subset_seed}/train")
    validation = _subset(
        _check_rows(task, raw_validation, ids), max_validation, f"{subset_seed}/validation"
    )
    num_labels = 1 if task.label_names is None else len(task.label_names)
    return TaskData(task, train, validation, num_labels, task.label_names)


def tokenize(
    task_data: TaskData, tokenizer: PreTrainedTokenizerBase, max_length: int
) -> tuple[datasets.Dataset, datasets.Dataset]:
    """Turn both splits into token ids and labels, truncated but not padded.

    Args:
        task_data: what ``load_task`` returned.
        tokenizer: of the model to train.
        max_length: most tokens per example, special tokens included; for ``causal_lm`` the
            length of every block.

    Returns:
        Train and validation, each with ``input_ids``, ``attention_mask``, ``token_type_ids`` if the
        tokenizer gives them, and ``labels``: int64 class ids, float32 scores, or for
        ``causal_lm`` the ``input_ids``.

    Raises:
        ConfigError: ``max_length`` does not fit the tokenizer, or a text gives no block.
    """
    if task_data.task.kind == "causal_lm":
        return (
            tokenize_text("\n".join(task_data.train["text"]), tokenizer, max_length),
            tokenize_text("\n".join(task_data.validation["text"]), tokenizer, max_length),
        )
    pair = task_data.task.columns[1] is not None
    # One token of each text must remain beside the special ones.
    shortest = tokenizer.num_special_tokens_to_add(pair) + (2 if pair else 1)
    _check_length("tokenize", "max_length", max_length, shortest, tokenizer)
    regression = task_data.task.kind == "regression"
    return (
        _tokenize_rows(task_data.train, tokenizer, max_length, regression),
        _tokenize_rows(task_data.validation, tokenizer, max_length, regression),
    )


def tokenize_text(
    text: str, tokenizer: PreTrainedTokenizerBase, block_size: int
) -> datasets.Dataset:
    """Cut one text into blocks of equal length; the incomplete last block is dropped.

    Special tokens are not added.

    Args:
        text: plain text.
        tokenizer: of the model to train.
        block_size: tokens per block, >= 2 (a block of one has nothing to predict).

    Returns:
        ``input_ids``, ``attention_mask`` (all ones) and ``labels`` (the ``input_ids``: a
        causal model shifts them itself), each (block_size,) per row.

    Raises:
        ConfigError: ``block_size`` does not fit the tokenizer, or the text has fewer tokens.
    """
    import datasets

    _check_length("tokenize_text", "block_size", block_size, 2, tokenizer)
    tokens = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    assert isinstance(tokens, list)
    if len(tokens) < block_size:
        raise ConfigError(
            f"tokenize_text: text must have at least block_size = {block_size} tokens, "
            f"got {len(tokens)}; use a longer text or shorter blocks"
        )
    last = len(tokens) - len(tokens) % block_size
    blocks = [tokens[start : start + block_size] for start in range(0, last, block_size)]
    whole = datasets.List(datasets.Value("int32"))
    features = datasets.Features(
        input_ids=whole,
        attention_mask=datasets.List(datasets.Value("int8")),
        labels=datasets.List(datasets.Value("int64")),
    )
    columns = {
        "input_ids": blocks,
        "attention_mask": [[1] * block_size for _ in blocks],
        "labels": blocks,
    }
    return datasets.Dataset.from_dict(columns, features=features)


def _hub_source(task: Task, source: str) -> tuple[str, str | None] | None:
    """Return (data set, config) where the source names the hub, None where it is a local path."""
    if source == "hub":
        if task.hub is None:
            raise ConfigError(
                f"load_task: source must be a local folder or a hub name for task {task.name!r}, "
                "got 'hub'; name the data set, for example nyu-mll/glue:cola"
            )
        return task.hub.path, task.hub.config
    if not _HUB_NAME.fullmatch(source) or ("/" not in source and ":" not in source):
        return None
    path, _, config = source.partition(":")
    # "data/glue" beside an existing folder "data" is a mistyped path, not a name on the hub.
    if "/" in path and Path(path).parent.is_dir():
        return None
    if not config and task.hub is not None and path == task.hub.path:
        return path, task.hub.config
    return path, config or None


def _load_hub_split(hub: tuple[str, str | None], split: str, who: str) -> FileTable:
    import datasets

    path, config = hub
    try:
        loaded = datasets.load_dataset(path, config, split=split)
    # The library raises its own errors, those of the HTTP client and those of the file formats.
    except Exception as error:
        raise ConfigError(
            f"{who}: source must be a local folder or a hub data set with split {split!r} "
            f"that can be loaded, got {path!r} (config {config!r}): "
            f"{type(error).__name__}: {error}; "
            "without a network give a local folder that holds the train and validation files"
        ) from error
    assert isinstance(loaded, datasets.Dataset)
    columns: dict[str, list[Any]] = {name: list(loaded[name]) for name in loaded.column_names}
    return FileTable(f"{path}[{config or 'default'}] {split}", columns)


def _check_rows(task: Task, table: FileTable, ids: dict[Any, int]) -> Table:
    """Return the rows under the standard column names, or name the first bad value."""
    texts = [name for name in task.columns if name is not None]
    columns = {f"sentence{i}": table.column(name) for i, name in enumerate(texts, start=1)}
    labels = table.column("label")
    for found, values in zip(texts, columns.values(), strict=True):
        for row, value in enumerate(values):
            if not isinstance(value, str):
                raise ConfigError(
                    f"load_task: {table.place(row)}: {found!r} must be text, got {value!r}; "
                    "fill in or remove the row"
                )
    columns["label"] = [
        parse_label(task, table, row, value, ids) for row, value in enumerate(labels)
    ]
    return Table(columns)


def _subset(table: Table, limit: int | None, seed: str) -> Table:
    if limit is None or limit >= len(table):
        return table
    order = list(range(len(table)))
    random.Random(seed).shuffle(order)
    kept = order[:limit]
    return Table({name: [values[row] for row in kept] for name, values in table.columns.items()})


def _run_of_lines(lines: list[str], limit: int | None, seed: str) -> list[str]:
    if limit is None or limit >= len(lines):
        return lines
    start = random.Random(seed).randint(0, len(lines) - limit)
    return lines[start : start + limit]


def _load_lines(task: Task, source: str | Path) -> tuple[list[str], list[str]]:
    """Return the lines of train and validation; one text alone is split at its 95 % mark."""
    path = Path(source)
    hub = None if path.exists() else _hub_source(task, str(source))
    if hub is not None:
        tables = [_load_hub_split(hub, name, "load_task") for name in ("train", "validation")]
        lines = [[str(row).rstrip("\n") for row in t.column(task.columns[0])] for t in tables]
        return lines[0], lines[1]
    if path.is_file():
        return _split_lines(path)
    folder = require_folder(path, "load_task")
    train = find_text_split(folder, task.name, "train")
    validation = find_text_split(folder, task.name, "validation")
    if train is not None and validation is not None:
        return _lines(train), _lines(validation)
    texts = sorted(p for p in folder.iterdir() if p.name.endswith(TEXT_SUFFIXES))
    if len(texts) != 1:
        raise ConfigError(
            f"load_task: folder {folder} must hold train.txt and validation.txt, or one text file "
            f"({' or '.join(TEXT_SUFFIXES)}), got {list_folder(folder)}; "
            "rename the files, or give the path of one text file"
        )
    return _split_lines(texts[0])


def _lines(path: Path) -> list[str]:
    return read_text(path).removesuffix("\n").split("\n")


def _split_lines(path: Path) -> tuple[list[str], list[str]]:
    lines = _lines(path)
    if len(lines) < 2:
        raise ConfigError(
            f"load_task: {path} must have at least 2 lines to be split into train and validation, "
            f"got {len(lines)}; give train.txt and validation.txt in one folder"
        )
    mark = max(1, int(len(lines) * TRAIN_SHARE_OF_ONE_TEXT))
    return lines[:mark], lines[mark:]


def _check_length(
    who: str, field: str, length: int, shortest: int, tokenizer: PreTrainedTokenizerBase
) -> None:
    # Tokenizers without a limit state a number near 1e30.
    longest = tokenizer.model_max_length
    if type(length) is not int or not shortest <= length <= longest:
        raise ConfigError(
            f"{who}: {field} must be an integer from {shortest} to {longest} "
            f"(the tokenizer's model_max_length), got {length!r}; choose a length within it"
        )


def _tokenize_rows(
    table: Table, tokenizer: PreTrainedTokenizerBase, max_length: int, regression: bool
) -> datasets.Dataset:
    import datasets

    label = datasets.Value("float32" if regression else "int64")
    chunks: list[datasets.Dataset] = []
    for start in range(0, len(table), _ROWS_PER_CHUNK):
        rows = slice(start, start + _ROWS_PER_CHUNK)
        second = table["sentence2"][rows] if "sentence2" in table.columns else None
        encoded = tokenizer(
            table["sentence1"][rows], second, truncation=True, max_length=max_length
        )
        names = [n for n in ("input_ids", "attention_mask", "token_type_ids") if n in encoded]
        features = datasets.Features(
            {
                name: datasets.List(datasets.Value("int32" if name == "input_ids" else "int8"))
                for name in names
            }
            | {"labels": label}
        )
        columns = {name: encoded[name] for name in names} | {"labels": table["label"][rows]}
        chunks.append(datasets.Dataset.from_dict(columns, features=features))
    return datasets.concatenate_datasets(chunks)
