"""What a run found: the content of ``metrics.json``, which reports and the command read."""

import dataclasses
import types
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self, TypeVar, get_args, get_origin

from leantune.core.disk import read_json
from leantune.errors import ConfigError

METRICS_FILE = "metrics.json"
METRICS_FORMAT = 2


@dataclass(frozen=True)
class VariantResult:
    """One trained model of a run: the recipe's, or one that it is compared with.

    Args:
        name: ``baseline``, or the methods' names joined by ``+``.
        methods: the JSON form of each; none is the plain model.
        saved_bytes: activations kept for backward on the first batch, from the ledger.
        step_ms: median time of forward and backward on the first batch.
        step_time_ratio: over the reference's, interleaved in one run; None without comparison.
        step_time_ratio_spread: 20th and 80th percentile over the rounds.
        ledger: ``leantune.ledger`` on the first batch, as a dictionary.
        metrics: of the trained model on the validation split, its ``loss`` among them.
        train_loss: (step, mean loss since the last entry).
        evaluations: (step, metrics).
        num_steps: optimiser steps.
        best_step: the one whose weights and ``metrics`` were kept; None is the last.
        train_seconds: of the training with its evaluations; of a resumed run, the last part's.
        peak_bytes: peak of the CUDA allocator in training; None on the CPU.
        fidelity: every ``fidelity_steps`` the ``step`` and, for each of ``sites``, the
            ``relative_variance``, ``cosine`` and ``z_score`` of the gradient so far.
    """

    name: str
    methods: list[dict[str, Any]]
    saved_bytes: int
    step_ms: float
    step_time_ratio: float | None
    step_time_ratio_spread: list[float] | None
    ledger: dict[str, Any] = field(repr=False)
    metrics: dict[str, float] = field(default_factory=dict)
    train_loss: list[list[float]] = field(default_factory=list)
    evaluations: list[list[Any]] = field(default_factory=list)
    num_steps: int = 0
    best_step: int | None = None
    train_seconds: float = 0.0
    peak_bytes: int | None = None
    fidelity: list[dict[str, Any]] = field(default_factory=list)

    @property
    def held_bytes(self) -> dict[str, int]:
        """What one training step holds, by ledger: weights, gradients with state, activations."""
        found = self.ledger
        return {
            "weights": found["weights"],
            "gradients + optimizer": found["gradients"] + found["optimizer"],
            "saved activations": found["activations"],
            "held in all": found["total"],
        }

    @classmethod
    def read(cls, path: Path) -> Self:
        """Read the result of a variant that has ended, from its folder of checkpoints.

        Raises:
            ConfigError: the file is damaged.
        """
        with _damage_named(path):
            return _checked(cls, read_json(path))

    def saved(self, key: Callable[[Mapping[str, Any]], str]) -> dict[str, int]:
        """Return bytes of activations summed by ``key(entry)``, in the order of the forward."""
        sums: dict[str, int] = {}
        for entry in self.ledger["entries"]:
            if entry["ledger"] == "activations":
                sums[key(entry)] = sums.get(key(entry), 0) + entry["num_bytes"]
        return sums


@dataclass(frozen=True)
class RunResult:
    """Everything that a run folder's ``metrics.json`` holds.

    Args:
        versions: of leantune, Python and the libraries.
        device: in words.
        floor: name and main metric of a model that ignores its input; None for language models.
        runs: the recipe's own is the last.
        plan: of a run with a budget: ``budget``, ``predicted`` and ``measured`` bytes by ledger
            and ``peak``, whether it was ``replanned``, and ``relative_time``; else None.
        labels: names of the classes in the order of their ids; None without classes.
    """

    versions: dict[str, str]
    device: str
    model: str
    task: str
    main_metric: str
    floor: dict[str, Any] | None
    num_train: int
    num_validation: int
    seed: int
    runs: tuple[VariantResult, ...]
    plan: dict[str, Any] | None
    labels: list[str] | None

    @property
    def reference(self) -> VariantResult:
        """The variant that ratios refer to: the plain model, else the first."""
        return next((run for run in self.runs if not run.methods), self.runs[0])

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON form."""
        runs = [vars(run) for run in self.runs]
        return {"format": METRICS_FORMAT, **vars(self), "runs": runs}

    @classmethod
    def read(cls, folder: str | Path) -> Self:
        """Read a run folder's results.

        Raises:
            ConfigError: the file is missing, no JSON, of another format, or lacks a key.
        """
        path = Path(folder).expanduser() / METRICS_FILE
        with _damage_named(path):
            data = read_json(path)
            if data["format"] != METRICS_FORMAT or not data["runs"]:
                raise ValueError(f"format {data['format']} with {len(data['runs'])} runs")
            runs = tuple(_checked(VariantResult, run) for run in data["runs"])
            known = {spec.name: data[spec.name] for spec in dataclasses.fields(cls)}
            return _checked(cls, {**known, "runs": runs})


@contextmanager
def _damage_named(path: Path) -> Generator[None]:
    try:
        yield
    except (LookupError, TypeError, ValueError) as error:
        raise ConfigError(
            f"results: {path} must be what a finished run of format {METRICS_FORMAT} writes, "
            f"got {type(error).__name__}: {error}; give a finished run's folder, or train again"
        ) from error


R = TypeVar("R", VariantResult, RunResult)


def _checked(kind: type[R], data: Any) -> R:
    """Make a result of a file's values; raise TypeError where one is of another type."""
    result = kind(**data)
    for spec in dataclasses.fields(kind):
        if not _fits(data.get(spec.name, getattr(result, spec.name)), spec.type):
            raise TypeError(f"{spec.name} must be {spec.type}")
    if isinstance(result, VariantResult):
        for entry in result.ledger["entries"]:
            texts = (entry["ledger"], entry["module"], entry["kind"])
            if not _fits(list(texts), list[str]) or not _fits(entry["num_bytes"], int):
                raise TypeError(f"ledger must hold entries, got {entry}")
    return result


def _fits(value: Any, kind: Any) -> bool:
    """Whether a value that JSON gave is of a field's type."""
    if kind is Any:
        return True
    if isinstance(kind, types.UnionType):
        return any(_fits(value, one) for one in get_args(kind))
    base = get_origin(kind) or kind
    if not isinstance(value, int | float if base is float else base):
        return False
    items: Any = value.values() if base is dict else value if base is list else ()
    return all(_fits(item, get_args(kind)[-1]) for item in items)
