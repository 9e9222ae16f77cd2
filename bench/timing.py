"""Cases of a bench: shapes that this machine can run, each measured and written as rows."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any, Protocol, TypeVar

import torch

from bench import rows
from leantune.measure.peak import StepStats


class Case(Protocol):
    """One model shape and batch, for a GPU or for CPUs: no row replaces one of the other kind."""

    @property
    def name(self) -> str: ...

    @property
    def needs_gpu(self) -> bool: ...


C = TypeVar("C", bound=Case)

TIMES = {
    "variant": "variant",
    "ratio": "step time ratio",
    "ratio_p20": "p20",
    "ratio_p80": "p80",
    "median_ms": "ms",
}
"""The columns that every timed table begins with: key of a row -> heading."""


def run_cases(
    result: str,
    cases: Iterable[C],
    measure: Callable[[C, torch.device], list[dict[str, Any]]],
    columns: Mapping[str, str],
    note: Callable[[C], str] = lambda case: "",
) -> None:
    """Measure every case that is for this machine, print tables, write the rows case by case.

    Args:
        result: name of the result file; rows of other cases stay in it.
        cases: in order.
        measure: (case, device) -> one row for each variant.
        columns: of the printed table, key -> heading.
        note: (case) -> text below its table.
    """
    has_gpu = torch.cuda.is_available()
    for case in cases:
        if case.needs_gpu != has_gpu:
            where = "an NVIDIA GPU" if case.needs_gpu else "a machine without one"
            print(f"{case.name}: left out, it is for {where}")
            continue
        measured = measure(case, torch.device("cuda" if has_gpu else "cpu"))
        print(f"\n{case.name}\n\n{rows.table(measured, dict(columns))}\n{note(case)}", flush=True)
        rows.replace(result, ("case", "variant"), measured)


def timing_row(case: Case, variant: str, stats: StepStats, saved_bytes: int) -> dict[str, Any]:
    """Return what every timed variant reports: time, ratio, saved bytes, and a GPU's peak."""
    peak = None if stats.peak_bytes is None else stats.peak_bytes - (stats.resident_bytes or 0)
    return {
        "case": case.name,
        "variant": variant,
        **stats.to_dict(),
        "saved_bytes": saved_bytes,
        "saved_mib": round(saved_bytes / 2**20, 1),
        "peak_mib": None if peak is None else round(peak / 2**20, 1),
    }
