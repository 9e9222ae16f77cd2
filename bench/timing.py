"""Benches of steps: variants of cases, each timed beside a reference in one run."""

from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any, Generic, Protocol, TypeVar

import torch

import leantune as lt
from bench import device, rows
from leantune.measure.peak import StepStats


class Case(Protocol):
    """One model shape and batch, for a GPU or for CPUs."""

    @property
    def name(self) -> str: ...

    @property
    def needs_gpu(self) -> bool: ...

    @property
    def variants(self) -> Sequence[str]: ...


C = TypeVar("C", bound=Case)

TIMES = {
    "variant": "variant",
    "ratio": "step time ratio",
    "ratio_p20": "p20",
    "ratio_p80": "p80",
    "median_ms": "ms",
}
"""The columns that every timed table begins with: key of a row -> heading."""
LEFT_OUT = "left out: "
"""Begins a printed line that names a variant without a row, and says why."""
_NUM_FIRST = 17
"""Steps after which a session is settled."""


@dataclass(frozen=True)
class Bench(Generic[C]):
    """A bench measures variants of cases and writes one row for each.

    On a CPU all variants of a case run in turn in one comparison. On a GPU each runs in turn with
    the reference alone and its row is written at once: what does not fit, or ends the process,
    then costs one row.

    Args:
        result: name of the result file; rows of other cases and devices stay in it.
        cases: (tiny) -> all cases, or those for a GPU in shapes that any machine runs in seconds.
        measure: (case, device, variants) -> one row for each, relative to the first.
        columns: of the printed table, key -> heading.
        note: (case) -> text below its table.
        num_references: how many of a case's first variants each comparison holds.
        goes_on: whether a run of all cases passes over those that this commit has measured.
    """

    result: str
    cases: Callable[[bool], Sequence[C]]
    measure: Callable[[C, torch.device, Sequence[str]], list[dict[str, Any]]]
    columns: Mapping[str, str] = field(default_factory=lambda: TIMES)
    note: Callable[[C], str] = lambda case: ""
    num_references: int = 1
    goes_on: bool = False

    def chosen(self, on_gpu: bool, only: str = "*", tiny: bool = False) -> list[C]:
        """Return the cases that are for this kind of device and whose name fits a glob."""
        found = [c for c in self.cases(tiny) if fnmatchcase(c.name, only)]
        return [c for c in found if tiny or c.needs_gpu == on_gpu]

    def run(self, only: str = "*", tiny: bool = False) -> None:
        """Measure the cases that are for this machine, write the rows, print tables."""
        if not (tiny or device.has_gpu()):
            for case in self.chosen(True, only):
                print(f"{LEFT_OUT}{case.name}: needs an NVIDIA GPU")
        for case in self.chosen(device.has_gpu(), only, tiny):
            done = self._measured(case) if self.goes_on and only == "*" else ()
            measured: list[dict[str, Any]] = []
            for part in self._apart(case, done) if case.needs_gpu else self._together(case, done):
                rows.replace(self.result, ("case", "variant"), part)
                measured += part
            if measured:
                table = rows.table(measured, dict(self.columns))
                print(f"\n{case.name}\n\n{table}\n{self.note(case)}", flush=True)

    def _measured(self, case: C) -> set[str]:
        """Return the variants of which this device has a row of this commit."""
        here = rows.origin(rows.environment())
        of_case = (row for row in rows.read(self.result) if row["case"] == case.name)
        return {row["variant"] for row in of_case if rows.origin(row) == here}

    def _together(self, case: C, done: Container[str]) -> Iterator[list[dict[str, Any]]]:
        if case.variants[0] in done:
            print(f"{LEFT_OUT}{case.name}: measured already; --case measures it again")
        else:
            yield self.measure(case, device.find(), case.variants)

    def _apart(self, case: C, done: Container[str]) -> Iterator[list[dict[str, Any]]]:
        references = list(case.variants[: self.num_references])
        for name in (None, *case.variants[self.num_references :]):
            names = references if name is None else [*references, name]
            if names[-1] in done:
                print(f"{LEFT_OUT}{case.name}, {names[-1]}: measured already")
                continue
            try:
                measured = self.measure(case, device.find(), names)
            except Exception as error:
                for missing in names if name is None else [name]:
                    say_left_out(case, missing, error)
                if name is None:
                    return
            else:
                yield measured if name is None else measured[-1:]
            device.forget()


def settle(session: lt.Session) -> None:
    """Take a session past its first steps, which look at every gradient.

    Of later ones one in eight does, and the step at which this stops is none of those.
    """
    for _ in range(_NUM_FIRST):
        session.on_step()


def say_left_out(case: Case, variant: str, error: Exception) -> None:
    """Print which variant has no row, and why."""
    said = (str(error).splitlines() or [""])[0]
    print(f"{LEFT_OUT}{case.name}, {variant}: {type(error).__name__}: {said}", flush=True)


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
