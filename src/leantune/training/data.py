"""From files or the hub to checked rows, and from rows to tokens, as ``datasets`` all along."""

import math
import random
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import datasets

from leantune.errors import ConfigError, shown
from leantune.training.tables import Columns, dataset_columns, find_split, read_columns

TRAIN_SHARE_OF_ONE_TEXT = 0.95
_PAIR = ("sentence1", "sentence2")
_SCORE = datasets.Value("float64")
# Of float32, in which a loss is computed.
_LARGEST_SCORE = 3.4e38


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
    for split, (columns, place) in _read_splits(task, str(source)).items():
        if task.kind == "causal_lm":
            rows = _check_texts(columns, place)
        else:
            names = names or _class_names(task, columns, place)
            rows = _check_rows(task, columns, place, names)
        order = list(range(len(rows)))
        if task.kind != "causal_lm":
            random.Random(f"0/{split}").shuffle(order)
        limit = limits[split]
        is_cut = limit is not None and limit < len(rows)
        found[split] = rows.select(order[:limit]) if is_cut else rows
    return datasets.DatasetDict(found)


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
        for ids, text in zip(encoded["input_ids"], texts[0], strict=True):
            if not ids:
                raise ConfigError(
                    f"tokenize: each text must have at least one token, got {shown(text)}; remove "
                    "the row, or take a tokenizer that adds tokens of its own"
                )
        return {**encoded, "labels": rows["label"]}

    size = None if is_text else 1000
    how: dict[str, Any] = {"batched": True, "batch_size": size, "load_from_cache_file": False}
    tokens = data.map(encode, remove_columns=list(features), **how)
    if features.get("label") == _SCORE:
        tokens = tokens.cast_column("labels", datasets.Value("float32"))
    return tokens


def check_ids(rows: datasets.DatasetDict, tokenizer: Any, model: Any) -> None:
    """Check that the model has an embedding for each token id of the rows.

    Raises:
        ConfigError: the tokenizer is another model's.
    """
    num_ids = model.get_input_embeddings().weight.shape[0]
    chunks = [c for split in rows.values() for c in split.data["input_ids"].chunks]
    largest = max(tokenizer.pad_token_id, *(c.flatten().to_numpy().max() for c in chunks))
    if largest >= num_ids:
        raise ConfigError(
            f"check_ids: token ids must be below {num_ids}, the model's embeddings, got {largest}; "
            "take the model's own tokenizer, or call model.resize_token_embeddings and save it"
        )


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


def _read_splits(task: Task, source: str) -> dict[str, tuple[Columns, str]]:
    """Return split -> columns, and the place that errors name."""
    names = {"train": "train", "validation": task.validation}
    path = Path(source).expanduser()
    if path.is_dir():
        files = {split: find_split(path, task.name, name) for split, name in names.items()}
        return {split: (read_columns(file), str(file)) for split, file in files.items()}
    if path.is_file() and task.kind == "causal_lm":
        columns = read_columns(path)
        num_lines = len(next(iter(columns.values())))
        # Of a single line both splits are the same.
        mark = max(1, int(num_lines * TRAIN_SHARE_OF_ONE_TEXT))
        first = {name: values[:mark] for name, values in columns.items()}
        rest = {name: values[min(mark, num_lines - 1) :] for name, values in columns.items()}
        return {"train": (first, source), "validation": (rest, source)}
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
    return {split: (dataset_columns(found[at]), f"{source} {at}") for split, at in names.items()}


def _class_names(task: Task, columns: Columns, place: str) -> tuple[str, ...] | None:
    """Return the classes that occur in train, sorted; None for scores."""
    if task.kind == "regression":
        return None
    found = {_class(v) for v in _column(columns, "label", place)}
    names = tuple(sorted(name for name in found if name))
    if len(names) < 2:
        raise ConfigError(
            f"load_task: {place}: column 'label' must hold at least two classes, got {names}; use "
            "other data, or task 'regression' for scores"
        )
    return names


def _check_texts(columns: Columns, place: str) -> datasets.Dataset:
    """Return the lines of a language model's text, or name the first bad one."""
    if "text" not in columns:
        raise ConfigError(
            f"load_task: {place}: column 'text' must be in the table for task causal_lm, got "
            f"columns {', '.join(columns)}; write each conversation or pair as one text, for "
            "example with tokenizer.apply_chat_template(messages, tokenize=False), or train with "
            "trl.SFTTrainer and leantune.TrainerCallback"
        )
    texts = _checked(columns, "text", place, "text", _text)
    return datasets.Dataset.from_dict({"text": texts})


def _check_rows(
    task: Task, columns: Columns, place: str, names: tuple[str, ...] | None
) -> datasets.Dataset:
    """Return the rows under the standard names, or name the first bad value."""
    fitting = (found for found in task.columns if set(found) <= columns.keys())
    own = next(fitting, task.columns[-1])
    ids = {name: i for i, name in enumerate(names or ())}
    if task.label_names is not None:
        ids |= {str(i): i for i in ids.values()}
    rows: dict[str, list[Any]] = {}
    for name, column in zip(_PAIR, own, strict=False):
        rows[name] = _checked(columns, column, place, "text", _text)
    features: dict[str, Any] = {name: datasets.Value("string") for name in rows}
    rule = f"one of {', '.join(list(ids)[:20])}" if ids else "a finite number"
    read = (lambda value: ids.get(_class(value) or "")) if ids else _score
    rows["label"] = _checked(columns, "label", place, rule, read)
    kinds = {type(value) for value in columns["label"]}
    if ids and len(kinds) > 1:
        raise ConfigError(
            f"load_task: {place}: column 'label' must hold values of one type, got "
            f"{' and '.join(sorted(kind.__name__ for kind in kinds))}; write all as text"
        )
    features["label"] = datasets.ClassLabel(names=list(names)) if names else _SCORE
    return datasets.Dataset.from_dict(rows, features=datasets.Features(features))


def _checked(
    columns: Columns, name: str, place: str, rule: str, read: Callable[[Any], Any]
) -> list[Any]:
    """Return what ``read`` makes of each value, or name the first of which it makes None."""
    values = list(map(read, _column(columns, name, place)))
    if None in values:
        row = values.index(None)
        raise ConfigError(
            f"load_task: {place} row {row + 1}: {name!r} must be {rule}, got "
            f"{shown(columns[name][row])}; correct or remove the row"
        )
    return values


def _column(columns: Columns, name: str, place: str) -> Sequence[Any]:
    if name not in columns:
        raise ConfigError(
            f"load_task: {place}: column {name!r} must be in the table, got columns "
            f"{', '.join(columns)}; rename the column in the file"
        )
    return columns[name]


def _text(value: Any) -> str | None:
    """Return a text that UTF-8 can hold: JSON may spell half a character."""
    is_text = isinstance(value, str) and not re.search("[\ud800-\udfff]", value)
    return value if is_text else None


def _class(value: Any) -> str | None:
    """Return the name of a class; None for what names none."""
    if isinstance(value, float):
        return str(value) if math.isfinite(value) else None
    return str(value) if isinstance(value, int) else _text(value)


def _score(value: Any) -> float | None:
    """Return a number that float32 can hold; ``1_0`` and True are none."""
    if isinstance(value, bool) or "_" in str(value):
        return None
    try:
        score = float(value)
    except (TypeError, ValueError, OverflowError):
        return None
    return score if abs(score) <= _LARGEST_SCORE else None
