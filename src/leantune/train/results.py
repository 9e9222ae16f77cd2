"""What a run found: the content of ``metrics.json``."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Self

FORMAT = 1


@dataclass(frozen=True)
class VariantResult:
    """One trained model of a run: the exact one, or the recipe's.

    Args:
        name: ``exact``, or the methods' names joined by ``+``.
        methods: the recipe's JSON form.
        seed: of the run.
        metrics: of the trained model on the validation split, its ``loss`` among them.
        train_loss: (step, mean loss since the last entry).
        evaluations: (step, metrics).
        num_steps: optimiser steps.
        train_seconds: spent in optimiser steps, all parts of a resumed run together.
        tokens_per_second: tokens without padding over those seconds.
        saved_bytes: activations kept for backward on the first batch, from the ledger.
        peak_bytes: peak of the CUDA allocator in training; None on the CPU.
        step_ms: median time of forward and backward on the first batch.
        step_time_ratio: over the exact model's, interleaved in one run; None without comparison.
        step_time_ratio_spread: 20th and 80th percentile over the rounds.
        ledger: ``leantune.ledger`` on the first batch, as a dictionary.
        figures: what the methods show of themselves after calibration: title, note and values of
            each; empty in files of runs that measured none.
    """

    name: str
    methods: list[dict[str, Any]]
    seed: int
    metrics: dict[str, float]
    train_loss: list[list[float]]
    evaluations: list[list[Any]]
    num_steps: int
    train_seconds: float
    tokens_per_second: float
    saved_bytes: int
    peak_bytes: int | None
    step_ms: float
    step_time_ratio: float | None
    step_time_ratio_spread: list[float] | None
    ledger: dict[str, Any] = field(repr=False)
    figures: list[dict[str, Any]] = field(default_factory=list, repr=False)


@dataclass(frozen=True)
class RunResult:
    """What ``metrics.json`` holds.

    Args:
        leantune: version that ran.
        versions: of Python and the libraries.
        device: in words.
        model: as the config named it.
        task: as the config named it.
        main_metric: the one that compares runs.
        baseline: name and main metric of a model that ignores its input; None for language models.
        num_train: training rows.
        num_validation: validation rows.
        runs: the exact model first, where it was trained.
    """

    leantune: str
    versions: dict[str, str]
    device: str
    model: str
    task: str
    main_metric: str
    baseline: dict[str, Any] | None
    num_train: int
    num_validation: int
    runs: tuple[VariantResult, ...]

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON form."""
        return {"format": FORMAT, **dataclasses.asdict(self), "runs": [vars(r) for r in self.runs]}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Self:
        """Read :meth:`to_dict`'s form."""
        values = {key: value for key, value in data.items() if key != "format"}
        return cls(**{**values, "runs": tuple(VariantResult(**r) for r in data["runs"])})
