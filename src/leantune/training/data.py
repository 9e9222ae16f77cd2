"""From files or the hub to checked rows, and from rows to tokens, as ``datasets`` all along."""

import math
import random
import tempfile
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import datasets
import pandas

from leantune.errors import ConfigError

FORMATS = {".tsv": "csv", ".csv": "csv", ".jsonl": "json", ".json": "json"}
FORMATS |= {".parquet": "parquet", ".txt": "text"}
TRAIN_SHARE_OF_ONE_TEXT = 0.95
_SPLIT_WORDS = {
    "train": ("train",),
    "validation": ("validation", "valid", "dev"),
    "validation_matched": ("validation_matched", "dev_matched", "validation", "dev"),
}
_PAIR = ("sentence1", "sentence2")


@dataclass(frozen=True)
class Task:
    """A task says what is read, what is predicted and how that is judged.

    Args:
        columns: each way in which files may name the one or two texts; the first that fits counts.
        label_names: of the classes in the order of their ids; None where train decides.
        metrics: the first one compares runs; larger is better, except for ``perplexity``.
    """

    name: str
    kind: Literal["classification", "regression", "causal_lm"] = "classification"
    columns: tuple[tuple[str, ...], ...] = (_PAIR, _PAIR[:1])
    label_names: tuple[str, ...] | None = None
    metrics: tuple[str, ...] = ("accuracy",)
    validation: str = "validation"

    @property
    def main_metric(self) -> str:
        """The metric that compares runs."""
        return self.metrics[0]


def _glue(name: str, labels: str, columns: str, *metrics: str, **options: Any) -> Task:
    hub = tuple(columns.split())
    names = tuple(labels.split())
    both = (_PAIR[: len(hub)], hub)
    return Task(name, "classification", both, names, metrics or ("accuracy",), **options)


_SCORES = ("pearson", "spearman")
_NLI = "entailment neutral contradiction"
_ENTAILS = "entailment not_entailment"
TASKS: Mapping[str, Task] = {
    task.name: task
    for task in (
        _glue("cola", "unacceptable acceptable", "sentence", "matthews", "accuracy"),
        _glue("sst2", "negative positive", "sentence"),
        _glue("mrpc", "not_equivalent equivalent", "sentence1 sentence2", "f1", "accuracy"),
        _glue("qqp", "not_duplicate duplicate", "question1 question2", "f1", "accuracy"),
        Task("stsb", "regression", (_PAIR,), metrics=_SCORES),
        _glue("mnli", _NLI, "premise hypothesis", validation="validation_matched"),
        _glue("qnli", _ENTAILS, "question sentence"),
        _glue("rte", _ENTAILS, "sentence1 sentence2"),
        _glue("wnli", "not_entailment entailment", "sentence1 sentence2"),
        Task("text"),
        Task("regression", "regression", metrics=_SCORES),
        Task("causal_lm", "causal_lm", (("text",),), metrics=("perplexity",)),
    )
}


def get_task(name: str) -> Task:
    """Return the task of that name.

    Raises:
        ConfigError: no such task; the message lists the names.
    """
    if name not in TASKS:
        raise ConfigError(
            f"get_task: task must be one of {', '.join(TASKS)}, got {name!r}; for files of your "
            "own take 'text'"
        )
    return TASKS[name]


def load_task(
    name: str,
    source: str | Path,
    *,
    max_train: int | None = None,
    max_validation: int | None = None,
) -> datasets.DatasetDict:
    """Read and check both splits of a task.

    A subset is the head of one fixed shuffle, or of a text its first lines, so the smaller of two
    lies in the larger. It does not depend on a run's seed, so that seeds can be compared.

    Args:
        source: a folder of files; for ``causal_lm`` also one text file; ``"hub"`` for GLUE, or the
            name of a hub data set, with ``:config`` where it has several.

    Returns:
        ``train`` and ``validation`` with ``sentence1``, perhaps ``sentence2``, and ``label`` (a
        ``ClassLabel``, or a float64 score); for ``causal_lm`` with ``text``, a line in each row.

    Raises:
        ConfigError: a file is missing or damaged, or a column, a text or a label is not acceptable.
    """
    task = get_task(name)
    names, found = task.label_names, {}
    limits = {"train": max_train, "validation": max_validation}
    for split, (rows, place) in _read_splits(task, str(source)).items():
        order = list(range(len(rows)))
        if task.kind != "causal_lm":
            names = names or _class_names(task, rows, place)
            rows = _check_rows(task, rows, place, names)
            random.Random(f"0/{split}").shuffle(order)
        limit = limits[split]
        is_cut = limit is not None and limit < len(rows)
        found[split] = rows.select(order[:limit]) if is_cut else rows
    return datasets.DatasetDict(found)


def find_split(folder: Path, task: str, split: str) -> Path:
    """Find the one file of a split: ``<task>.<split>``, ``<split>`` or ``<task>/<split>``.

    ``validation`` may also be called ``valid`` or ``dev``; any suffix of ``FORMATS`` is taken, and
    ``.gz`` after it.

    Raises:
        ConfigError: no such folder, no such file, or several.
    """
    stems = [s for w in _SPLIT_WORDS[split] for s in (f"{task}.{w}", w, f"{task}/{w}")]
    suffixes = [suffix + gz for suffix in FORMATS for gz in ("", ".gz")]
    found = [p for s in stems for x in suffixes if (p := folder / (s + x)).is_file()]
    if len(found) != 1:
        there = [str(p) for p in found] or sorted(p.name for p in folder.iterdir())[:20]
        raise ConfigError(
            f"find_split: folder {folder} must hold one {split} file of task {task} "
            f"({', '.join(stems)}, with {' '.join(FORMATS)}), got {there}; rename the file, or "
            "give another folder"
        )
    return found[0]


def tokenize(data: datasets.DatasetDict, tokenizer: Any, max_length: int) -> datasets.DatasetDict:
    """Turn both splits into token ids and labels, truncated but not padded.

    A text is cut into blocks of ``max_length`` without special tokens; its last, incomplete block
    is dropped.

    Returns:
        What the tokenizer gives, and ``labels``: class ids, float32 scores, or the ``input_ids`` of
        a block (a causal model shifts them itself).

    Raises:
        ConfigError: ``max_length`` does not fit the tokenizer, or a text gives no block.
    """
    features = data["train"].features
    is_text, is_pair = "text" in features, "sentence2" in features
    # One token of each text must remain beside the special ones; a block of one predicts nothing.
    shortest = 2 if is_text else tokenizer.num_special_tokens_to_add(is_pair) + 1 + is_pair
    # Tokenizers without a limit state a number near 1e30.
    if not shortest <= max_length <= tokenizer.model_max_length:
        raise ConfigError(
            f"tokenize: max_length must be from {shortest} to {tokenizer.model_max_length} (the "
            f"tokenizer's model_max_length), got {max_length}; choose a length within it"
        )

    def encode(rows: Mapping[str, Any]) -> dict[str, Any]:
        if is_text:
            return _blocks("\n".join(rows["text"]), tokenizer, max_length)
        texts = [rows[name] for name in _PAIR if name in rows]
        encoded = tokenizer(*texts, truncation=True, max_length=max_length)
        return {**encoded, "labels": rows["label"]}

    size = None if is_text else 1000
    how: dict[str, Any] = {"batched": True, "batch_size": size, "load_from_cache_file": False}
    tokens = data.map(encode, remove_columns=list(features), **how)
    if features.get("label") == datasets.Value("float64"):
        tokens = tokens.cast_column("labels", datasets.Value("float32"))
    return tokens


def _blocks(text: str, tokenizer: Any, size: int) -> dict[str, list[list[int]]]:
    tokens = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    if len(tokens) < size:
        raise ConfigError(
            f"tokenize: text must have at least max_length = {size} tokens, got {len(tokens)}; "
            "use a longer text or shorter blocks"
        )
    blocks = [tokens[at : at + size] for at in range(0, len(tokens) - size + 1, size)]
    ones = [[1] * size for _ in blocks]
    return {"input_ids": blocks, "attention_mask": ones, "labels": blocks}


def _read_splits(task: Task, source: str) -> dict[str, tuple[datasets.Dataset, str]]:
    """Return split -> rows, and the place that errors name."""
    names = {"train": "train", "validation": task.validation}
    path = Path(source).expanduser()
    if path.is_dir():
        files = {split: find_split(path, task.name, name) for split, name in names.items()}
        return {split: (_read_file(file), str(file)) for split, file in files.items()}
    if path.is_file() and task.kind == "causal_lm":
        lines = _read_file(path)
        # Of a single line both splits are the same.
        mark = max(1, int(len(lines) * TRAIN_SHARE_OF_ONE_TEXT))
        rest = range(min(mark, len(lines) - 1), len(lines))
        return {
            "train": (lines.select(range(mark)), source),
            "validation": (lines.select(rest), source),
        }
    name, _, config = source.partition(":")
    if source == "hub":
        name, config = "nyu-mll/glue", task.name
    try:
        found = {at: datasets.load_dataset(name, config or None, split=at) for at in names.values()}
    # The library's own errors, those of the HTTP client and those of the file formats.
    except Exception as error:
        raise ConfigError(
            f"load_task: data must be a folder, or a data set on the hub with splits "
            f"{', '.join(names.values())}, got {source!r}, which is no folder here "
            f"({type(error).__name__}: {error}); correct the path, or without a network give a "
            "local folder"
        ) from error
    return {split: (found[at], f"{source} {at}") for split, at in names.items()}  # type: ignore[return-value]


def _read_file(path: Path) -> datasets.Dataset:
    suffix = Path(path.name.removesuffix(".gz")).suffix
    try:
        options = _text_columns(path, suffix) if FORMATS[suffix] == "csv" else {}
        with tempfile.TemporaryDirectory() as cache, warnings.catch_warnings():
            # Rows longer than the header are cut short with a warning.
            warnings.simplefilter("error", pandas.errors.ParserWarning)
            where = {"data_files": str(path), "cache_dir": cache, "keep_in_memory": True}
            rows = datasets.load_dataset(FORMATS[suffix], split="train", **where, **options)
        assert isinstance(rows, datasets.Dataset) and len(rows), "no rows"
    # Each reader raises its own errors, and datasets hides them in one of its own.
    except Exception as error:
        raise ConfigError(
            f"load_task: {path} must be a table or text that datasets can read "
            f"({' '.join(FORMATS)}), got {type(error).__name__}: {error.__cause__ or error}; "
            "export the data set again"
        ) from error
    return rows


def _text_columns(path: Path, suffix: str) -> dict[str, Any]:
    """Return what reads every field as the text it is, be it a number or the word "null"."""
    # GLUE does not quote.
    options: dict[str, Any] = {"sep": "\t", "quoting": 3} if suffix == ".tsv" else {}
    header = pandas.read_csv(path, nrows=0, **options).columns
    text = datasets.Features({column: datasets.Value("string") for column in header})
    return options | {"na_filter": False, "index_col": False, "features": text}


def _class_names(task: Task, rows: datasets.Dataset, place: str) -> tuple[str, ...] | None:
    """Return the classes that occur in train, sorted; None for scores."""
    if task.kind == "regression":
        return None
    names = tuple(sorted({str(v) for v in _column(rows, "label", place) if v not in (None, "")}))
    if len(names) < 2:
        raise ConfigError(
            f"load_task: {place}: column 'label' must hold at least two classes, got {names}; use "
            "other data, or task 'regression' for scores"
        )
    return names


def _check_rows(
    task: Task, rows: datasets.Dataset, place: str, names: tuple[str, ...] | None
) -> datasets.Dataset:
    """Return the rows under the standard names, or name the first bad value."""
    fitting = (found for found in task.columns if set(found) <= set(rows.column_names))
    columns = next(fitting, task.columns[-1])
    ids = {name: i for i, name in enumerate(names or ())}
    if task.label_names is not None:
        ids |= {str(i): i for i in ids.values()}
    rule = f"one of {', '.join(list(ids)[:20])}" if ids else "a finite number"

    def label(value: Any) -> float | None:
        return ids.get(str(value)) if ids else _score(value)

    checks = {column: ("text", lambda v: v if isinstance(v, str) else None) for column in columns}
    values: dict[str, list[Any]] = {}
    for column, (wanted, read) in {**checks, "label": (rule, label)}.items():
        values[column] = list(map(read, _column(rows, column, place)))
        if None in values[column]:
            row = values[column].index(None)
            raise ConfigError(
                f"load_task: {place} row {row + 1}: {column!r} must be {wanted}, got "
                f"{rows[row][column]!r}; correct or remove the row"
            )
    texts = rows.select_columns(list(columns))
    texts = texts.rename_columns(dict(zip(columns, _PAIR, strict=False)))
    feature = datasets.ClassLabel(names=list(names)) if names else datasets.Value("float64")
    return texts.add_column("label", values["label"], feature=feature)


def _column(rows: datasets.Dataset, name: str, place: str) -> Any:
    if name not in rows.column_names:
        raise ConfigError(
            f"load_task: {place}: column {name!r} must be in the table, got columns "
            f"{', '.join(rows.column_names)}; rename the column in the file"
        )
    return rows[name]


def _score(value: Any) -> float | None:
    try:
        score = float(value)
    except (TypeError, ValueError):
        return None
    return score if math.isfinite(score) else None
