"""What ``metrics.json`` says, checked and typed; tables and plots read their figures from here."""

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from leantune.errors import ConfigError

METRICS_FILE = "metrics.json"
METRICS_FORMAT = 1
EXACT = "exact"


@dataclass(frozen=True, kw_only=True)
class FigureRecord:
    """A few numbers that a method measured of itself, to be drawn as bars.

    Args:
        title: of a few words.
        note: what the numbers are.
        values: label -> number, from top to bottom; at least one.
    """

    title: str
    note: str
    values: Mapping[str, float]


@dataclass(frozen=True, kw_only=True)
class RunRecord:
    """One training run of a folder.

    Args:
        name: ``"exact"`` or the methods' names.
        methods: the recipe's entries; empty for the exact model.
        metrics: final values on the validation split.
        train_loss: (step, loss) pairs.
        evaluations: (step, metrics) pairs.
        train_seconds: wall time of the training loop.
        tokens_per_second: None where it was not measured, as for every field below.
        saved_bytes: kept for backward by one training step.
        peak_bytes: of the CUDA allocator; None on the CPU.
        step_ms: median time of forward and backward.
        step_time_ratio: over the exact model's time in the same rounds.
        step_time_ratio_spread: (low, high) of that ratio.
        ledger: ``leantune.measure.Ledger.to_dict()`` of one training step.
        figures: of the methods; none in files of older versions.
    """

    name: str
    methods: tuple[Mapping[str, Any], ...]
    metrics: Mapping[str, float]
    train_loss: tuple[tuple[float, float], ...]
    evaluations: tuple[tuple[float, Mapping[str, float]], ...]
    num_steps: int
    train_seconds: float
    tokens_per_second: float | None
    saved_bytes: int | None
    peak_bytes: int | None
    step_ms: float | None
    step_time_ratio: float | None
    step_time_ratio_spread: tuple[float, float] | None
    ledger: Mapping[str, Any] | None
    figures: tuple[FigureRecord, ...] = ()

    def saved(self, key: Callable[[Mapping[str, Any]], str]) -> dict[str, int]:
        """Return bytes of activations summed by ``key(entry)``, in the order of the forward."""
        sums: dict[str, int] = {}
        for entry in (self.ledger or {}).get("entries", ()):
            if entry["ledger"] == "activations":
                sums[key(entry)] = sums.get(key(entry), 0) + entry["num_bytes"]
        return sums


@dataclass(frozen=True, kw_only=True)
class Results:
    """Everything that a run folder's ``metrics.json`` says.

    Args:
        baseline: (name, value) of the score that needs no learning; None where there is none.
        runs: the exact model first, if it was trained.
    """

    leantune: str
    versions: Mapping[str, str]
    device: str
    model: str
    task: str
    main_metric: str
    baseline: tuple[str, float] | None
    num_train: int
    num_validation: int
    runs: tuple[RunRecord, ...]

    @property
    def exact(self) -> RunRecord | None:
        """The exact model's run, or None where only methods were trained."""
        return next((run for run in self.runs if run.name == EXACT), None)

    def saved_ratio(self, run: RunRecord) -> float | None:
        """Return saved bytes over the exact model's, or None without an exact run."""
        exact = self.exact
        if exact is None or not exact.saved_bytes or run.saved_bytes is None:
            return None
        return run.saved_bytes / exact.saved_bytes


def results_from_dict(data: Any, where: str = METRICS_FILE) -> Results:
    """Check the content of ``metrics.json`` and give it types.

    Args:
        data: the parsed JSON.
        where: named in errors.

    Raises:
        ConfigError: a field is missing or of another kind, or the file is from a newer version.
    """
    read = _Reader(where)
    if not isinstance(data, Mapping):
        raise read.error("content", "a mapping", data)
    version = read.get(data, "format", (int,))
    if version > METRICS_FORMAT:
        raise ConfigError(
            f"report: {where}: format must be at most {METRICS_FORMAT}, got {version}; it was "
            "written by a newer leantune: upgrade with pip install -U leantune"
        )
    baseline = read.get(data, "baseline", (Mapping,), nullable=True)
    runs = read.get(data, "runs", (list,))
    if not runs:
        raise read.error("runs", "a list of at least one run", runs)
    return Results(
        leantune=read.get(data, "leantune", (str,)),
        versions=read.get(data, "versions", (Mapping,)),
        device=read.get(data, "device", (str,)),
        model=read.get(data, "model", (str,)),
        task=read.get(data, "task", (str,)),
        main_metric=read.get(data, "main_metric", (str,)),
        baseline=baseline
        and (read.get(baseline, "name", (str,)), read.get(baseline, "value", _NUMBER)),
        num_train=read.get(data, "num_train", (int,)),
        num_validation=read.get(data, "num_validation", (int,)),
        runs=tuple(_run(read, run) for run in runs),
    )


def read_results(folder: Path) -> Results:
    """Read ``metrics.json`` of a run folder.

    Raises:
        ConfigError: the file is missing, no JSON, or not what a run writes.
    """
    path = folder / METRICS_FILE
    return results_from_dict(read_json(path), str(path))


def read_json(path: Path) -> Any:
    """Read one JSON file of a run folder.

    Raises:
        ConfigError: the file is missing or not valid JSON.
    """
    try:
        return json.loads(path.read_text("utf-8"))
    except (FileNotFoundError, NotADirectoryError) as error:
        raise ConfigError(
            f"report: folder must hold {path.name}, got no such file in {path.parent}; give the "
            "folder of a finished run"
        ) from error
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"report: {path} must be valid JSON, got {error}; run leantune train again"
        ) from error


_NUMBER = (int, float)


class _Reader:
    """Takes fields out of parsed JSON and words what is wrong with them."""

    def __init__(self, where: str) -> None:
        self._where = where

    def error(self, name: str, rule: str, got: Any) -> ConfigError:
        shown = repr(got)
        shown = shown if len(shown) <= 80 else f"{shown[:77]}..."
        return ConfigError(
            f"report: {self._where}: {name} must be {rule}, got {shown}; run leantune train again"
        )

    def get(
        self, data: Mapping[str, Any], name: str, kinds: tuple[Any, ...], nullable: bool = False
    ) -> Any:
        value = data.get(name)
        if value is None and nullable:
            return None
        if not isinstance(value, kinds) or isinstance(value, bool):
            names = {Mapping: "mapping", str: "str", int: "integer", float: "number", list: "list"}
            raise self.error(name, " or ".join(names[kind] for kind in kinds), value)
        return value

    def pairs(self, data: Mapping[str, Any], name: str, kinds: tuple[Any, ...]) -> list[Any]:
        values = self.get(data, name, (list,))
        for pair in values:
            fits = isinstance(pair, list) and len(pair) == 2 and isinstance(pair[0], _NUMBER)
            if not fits or not isinstance(pair[1], kinds):
                raise self.error(name, "a list of [step, value] pairs", pair)
        return values

    def numbers(self, data: Mapping[str, Any], name: str) -> dict[str, float]:
        # Values that are no numbers (None where a metric is undefined) have no place in a table.
        values = self.get(data, name, (Mapping,))
        return {key: value for key, value in values.items() if isinstance(value, _NUMBER)}


def _run(read: _Reader, data: Any) -> RunRecord:
    if not isinstance(data, Mapping):
        raise read.error("runs", "a list of mappings", data)
    spread = read.get(data, "step_time_ratio_spread", (list,), nullable=True)
    if spread is not None and (len(spread) != 2 or not all(map(_is_number, spread))):
        raise read.error("step_time_ratio_spread", "a pair of numbers", spread)
    ledger = read.get(data, "ledger", (Mapping,), nullable=True)
    if ledger is not None:
        _check_entries(read, read.get(ledger, "entries", (list,)))
    evaluations = read.pairs(data, "evaluations", (Mapping,))
    return RunRecord(
        name=read.get(data, "name", (str,)),
        methods=tuple(read.get(data, "methods", (list,))),
        metrics=read.numbers(data, "metrics"),
        train_loss=tuple((step, loss) for step, loss in read.pairs(data, "train_loss", _NUMBER)),
        evaluations=tuple(
            (step, {k: v for k, v in values.items() if _is_number(v)})
            for step, values in evaluations
        ),
        num_steps=read.get(data, "num_steps", (int,)),
        train_seconds=read.get(data, "train_seconds", _NUMBER),
        tokens_per_second=read.get(data, "tokens_per_second", _NUMBER, nullable=True),
        saved_bytes=read.get(data, "saved_bytes", (int,), nullable=True),
        peak_bytes=read.get(data, "peak_bytes", (int,), nullable=True),
        step_ms=read.get(data, "step_ms", _NUMBER, nullable=True),
        step_time_ratio=read.get(data, "step_time_ratio", _NUMBER, nullable=True),
        step_time_ratio_spread=None if spread is None else (spread[0], spread[1]),
        ledger=ledger,
        figures=tuple(_figure(read, f) for f in read.get(data, "figures", (list,), True) or ()),
    )


def _figure(read: _Reader, data: Any) -> FigureRecord:
    if not isinstance(data, Mapping):
        raise read.error("figures", "a list of mappings", data)
    values = read.get(data, "values", (Mapping,))
    if not values or not all(map(_is_number, values.values())):
        raise read.error("figures: values", "a mapping of at least one label to a number", values)
    return FigureRecord(
        title=read.get(data, "title", (str,)), note=read.get(data, "note", (str,)), values=values
    )


def _is_number(value: Any) -> bool:
    return isinstance(value, _NUMBER) and not isinstance(value, bool)


def _check_entries(read: _Reader, entries: Iterable[Any]) -> None:
    for entry in entries:
        if not isinstance(entry, Mapping):
            raise read.error("ledger: entries", "a list of mappings", entry)
        for name in ("ledger", "module", "kind"):
            read.get(entry, name, (str,))
        read.get(entry, "num_bytes", (int,))
