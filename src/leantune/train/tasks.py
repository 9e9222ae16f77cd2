"""The tasks that ``leantune train`` knows by name, and what a table settles about one."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, replace
from typing import Any, Literal

from leantune.errors import ConfigError
from leantune.train.files import FileTable

TaskKind = Literal["classification", "regression", "causal_lm"]

_INTEGER = re.compile(r"[+-]?[0-9]+")
_DECIMAL = re.compile(r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?")
_NOT_FINITE = re.compile(r"[+-]?(nan|inf|infinity)", re.IGNORECASE)


@dataclass(frozen=True)
class HubSource:
    """Where the Hugging Face hub keeps a task, and what it calls the columns.

    Args:
        path: name of the data set, as ``datasets.load_dataset`` takes it.
        config: its configuration; None for the only one.
        columns: hub names of the first and the second text; None where there is no second.
    """

    path: str
    config: str | None
    columns: tuple[str, str | None]


@dataclass(frozen=True)
class Task:
    """What is read, what is predicted and how it is judged.

    Args:
        name: the name on the command line.
        columns: names of the first and the second text; None where a row holds one text.
        label_names: name of each class in the order of the ids; None where the data decide.
        kind: what the model predicts.
        metrics: names of ``leantune.train.metrics``, all reported.
        main_metric: the one that compares runs; larger is better, except for ``perplexity``.
        hub: where the hub has it; None where only files do.
        validation_split: name of the labelled split that is not trained on.
        second_optional: whether the second text is left out where the table has no such column.
    """

    name: str
    columns: tuple[str, str | None]
    label_names: tuple[str, ...] | None
    kind: TaskKind
    metrics: tuple[str, ...]
    main_metric: str
    hub: HubSource | None = None
    validation_split: str = "validation"
    second_optional: bool = False


_PAIR = ("sentence1", "sentence2")


def _glue(
    name: str,
    hub_columns: tuple[str, str | None],
    label_names: tuple[str, ...] | None,
    metrics: tuple[str, ...] = ("accuracy",),
    main_metric: str = "accuracy",
    validation_split: str = "validation",
) -> Task:
    return Task(
        name=name,
        columns=("sentence1", None if hub_columns[1] is None else "sentence2"),
        label_names=label_names,
        kind="regression" if label_names is None else "classification",
        metrics=metrics,
        main_metric=main_metric,
        hub=HubSource("nyu-mll/glue", name, hub_columns),
        validation_split=validation_split,
    )


_ENTAILS = ("entailment", "not_entailment")

TASKS: dict[str, Task] = {
    task.name: task
    for task in (
        _glue(
            "cola",
            ("sentence", None),
            ("unacceptable", "acceptable"),
            ("matthews", "accuracy"),
            "matthews",
        ),
        _glue("sst2", ("sentence", None), ("negative", "positive")),
        _glue("mrpc", _PAIR, ("not_equivalent", "equivalent"), ("f1", "accuracy"), "f1"),
        _glue(
            "qqp",
            ("question1", "question2"),
            ("not_duplicate", "duplicate"),
            ("f1", "accuracy"),
            "f1",
        ),
        _glue("stsb", _PAIR, None, ("pearson", "spearman"), "pearson"),
        _glue(
            "mnli",
            ("premise", "hypothesis"),
            ("entailment", "neutral", "contradiction"),
            validation_split="validation_matched",
        ),
        _glue("qnli", ("question", "sentence"), _ENTAILS),
        _glue("rte", _PAIR, _ENTAILS),
        _glue("wnli", _PAIR, ("not_entailment", "entailment")),
        # Any folder: the second text is used where the files have it, labels come from train.
        Task(
            "text", _PAIR, None, "classification", ("accuracy",), "accuracy", second_optional=True
        ),
        # The same for scores that happen to be whole numbers.
        Task(
            "regression",
            _PAIR,
            None,
            "regression",
            ("pearson", "spearman"),
            "pearson",
            second_optional=True,
        ),
        # Judged by the loss itself: perplexity and bits per byte need no predictions.
        Task("causal_lm", ("text", None), None, "causal_lm", (), "perplexity"),
    )
}


def get_task(name: str) -> Task:
    """Return the task of that name.

    Args:
        name: a key of ``TASKS``.

    Raises:
        ConfigError: no such task; the message lists the names.
    """
    if name not in TASKS:
        raise ConfigError(
            f"get_task: task must be one of {', '.join(TASKS)}, got {name!r}; "
            "for files of your own use 'text'"
        )
    return TASKS[name]


def settle_columns(task: Task, table: FileTable) -> Task:
    """Return the task with the column names of this table: its own, or else those of the hub.

    Args:
        task: as the user named it.
        table: the train split.
    """
    first, second = task.columns
    hub_columns = (first, second) if task.hub is None else task.hub.columns
    if first not in table.columns and set(filter(None, hub_columns)) <= table.columns.keys():
        first, second = hub_columns
    if task.second_optional and second not in table.columns:
        second = None
    return replace(task, columns=(first, second))


def settle_labels(task: Task, table: FileTable) -> tuple[Task, dict[Any, int]]:
    """Return the task with kind and label names settled, and the id of each label value.

    Where the task leaves it open: all labels whole numbers or all words -> their sorted set is the
    classes; numbers with a fraction -> regression.

    Args:
        task: after ``settle_columns``.
        table: the train split.

    Returns:
        The task, and class id by label value (empty for regression).

    Raises:
        ConfigError: a label that is missing, not finite or unlike the others, or one class only.
    """
    if task.kind == "regression":
        return task, {}
    if task.label_names is not None:
        ids: dict[Any, int] = {name: number for number, name in enumerate(task.label_names)}
        return task, ids | {number: number for number in range(len(task.label_names))}
    labels = table.column("label")
    numbers = [_number(value) for value in labels]
    for row, (value, number) in enumerate(zip(labels, numbers, strict=True)):
        if number is None and (not isinstance(value, str) or not value.strip()):
            raise _bad_label(table, row, value, "a number or a word")
        if number is not None and not math.isfinite(number):
            raise _bad_label(table, row, value, "a finite number or a word")
    num_words = numbers.count(None)
    if 0 < num_words < len(numbers):
        odd = numbers.index(None)
        raise _bad_label(table, odd, labels[odd], "a number as in other rows, or words in all rows")
    if num_words == 0 and any(n is not None and n != int(n) for n in numbers):
        return replace(task, kind="regression", **_REGRESSION_METRICS), {}
    values = sorted({_canonical(value) for value in labels})
    if len(values) < 2:
        raise ConfigError(
            f"load_task: {table.name}: column 'label' must hold at least two classes, "
            f"got only {values[0]!r}; use other data, or task 'regression' for scores"
        )
    names = tuple(str(value) for value in values)
    return replace(task, label_names=names), {value: i for i, value in enumerate(values)}


_REGRESSION_METRICS: dict[str, Any] = {
    "metrics": ("pearson", "spearman"),
    "main_metric": "pearson",
}


def parse_label(
    task: Task, table: FileTable, row: int, value: Any, ids: dict[Any, int]
) -> int | float:
    """Return the class id from 0, or the score as a finite float.

    Args:
        task: after ``settle_labels``.
        table: where the value stands, for the message.
        row: its row, from 0.
        value: the label as read.
        ids: what ``settle_labels`` returned.

    Raises:
        ConfigError: the label is not in the set, or not a finite number.
    """
    if task.kind == "regression":
        number = _number(value)
        if number is None or not math.isfinite(number):
            raise _bad_label(table, row, value, "a finite number")
        return float(number)
    key = _canonical(value)
    if key not in ids:
        names = task.label_names or ()
        known = ", ".join(map(repr, names[:20])) + (", ..." if len(names) > 20 else "")
        rule = f"one of the {len(names)} labels {known}"
        if task.hub is not None:
            rule += f" or an integer from 0 to {len(names) - 1}"
        raise _bad_label(table, row, value, rule)
    return ids[key]


def _bad_label(table: FileTable, row: int, value: Any, rule: str) -> ConfigError:
    return ConfigError(
        f"load_task: {table.place(row)}: 'label' must be {rule}, got {value!r}; "
        "correct or remove the row"
    )


def _number(value: Any) -> int | float | None:
    """Return the number that a label spells, not-a-number and infinities included; else None."""
    if isinstance(value, int | float):
        return value
    text = value.strip() if isinstance(value, str) else ""
    if _INTEGER.fullmatch(text):
        return int(text)
    if _DECIMAL.fullmatch(text) or _NOT_FINITE.fullmatch(text):
        return float(text)
    return None


def _canonical(value: Any) -> Any:
    """Return the key of a label: "1", 1, 1.0 and True are the same class."""
    number = _number(value)
    if number is None:
        return value if isinstance(value, str) else repr(value)
    return int(number) if math.isfinite(number) and number == int(number) else number
