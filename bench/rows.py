"""Result rows: JSON lines with what they were measured on, written one by one and resumable."""

import json
import os
import platform
import subprocess
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
import transformers

from leantune.core.disk import write_atomic

RESULTS = Path(os.environ.get("LEANTUNE_RESULTS", Path(__file__).parent / "results"))
"""Folder of the result files; a run elsewhere writes to a folder of its own."""
GLUE = Path(os.environ.get("LEANTUNE_GLUE", Path(__file__).parents[2] / "shared" / "data" / "glue"))
"""Folder of GLUE's labelled splits; measured on, never shipped."""


@cache
def environment() -> dict[str, Any]:
    """Say what a row was measured on: commit, device, threads, versions."""
    if torch.cuda.is_available():
        device = torch.cuda.get_device_name()
    else:
        device = f"cpu {platform.machine()}, {torch.get_num_threads()} threads"
    return {
        "commit": commit(),
        "device": device,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
    }


@cache
def commit() -> str:
    """Say which commit is measured, and whether files had changed when this was first asked."""
    # A copy of the source without git says by a variable which commit it is.
    if "LEANTUNE_COMMIT" in os.environ:
        return os.environ["LEANTUNE_COMMIT"]

    def git(*args: str) -> str:
        command = ["git", "-C", str(Path(__file__).parents[1]), *args]
        return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()

    # The rows that a bench writes do not make the next one's commit a changed one.
    changed = git("status", "--porcelain", "--untracked-files=no", "--", ".", ":!bench/results")
    found = git("describe", "--always")
    return f"{found}-dirty" if found and changed else found or "unknown"


def read(name: str) -> list[dict[str, Any]]:
    """Return the rows of one result file, [] where there is none yet."""
    path = RESULTS / f"{name}.jsonl"
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


def append(name: str, row: dict[str, Any]) -> None:
    """Add one row, so that a run stopped halfway goes on after the last whole one."""
    RESULTS.mkdir(parents=True, exist_ok=True)
    line = json.dumps(row | environment()) + "\n"
    # One write in append mode: workers side by side do not tear each other's rows.
    handle = os.open(RESULTS / f"{name}.jsonl", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    try:
        os.write(handle, line.encode())
    finally:
        os.close(handle)


def write(name: str, rows: list[dict[str, Any]]) -> None:
    """Replace one result file by ``rows``, each with the environment that it was measured in."""
    _write(name, [row if "commit" in row else row | environment() for row in rows])


def _write(name: str, rows: list[dict[str, Any]]) -> None:
    RESULTS.mkdir(parents=True, exist_ok=True)
    write_atomic(RESULTS / f"{name}.jsonl", "".join(f"{json.dumps(row)}\n" for row in rows))


def replace(name: str, keys: Sequence[str], rows: list[dict[str, Any]]) -> None:
    """Put each row in the place of the one that agrees with it in ``keys``, or at the end.

    Others stay: those of other cases, those that retired an option, and those of the other kind
    of device, since a GPU's row never stands for a CPU's.
    """

    def key_of(row: dict[str, Any]) -> tuple[Any, ...]:
        return (kind(row), *(row.get(key) for key in keys))

    fresh = {key_of(row): row for row in (row | environment() for row in rows)}
    kept = [fresh.pop(key_of(row), row) for row in read(name)]
    _write(name, [*kept, *fresh.values()])


def kind(row: dict[str, Any]) -> str:
    """Return "CPU" or "GPU": what a row was measured on."""
    return "CPU" if row["device"].startswith("cpu ") else "GPU"


def origin(row: dict[str, Any]) -> tuple[str, str]:
    """Return the commit and the device of a row; new rows alone make no other commit."""
    return row["commit"].removesuffix("-dirty"), row["device"]


def by_device(
    rows: list[dict[str, Any]], lay_out: Callable[[list[dict[str, Any]]], str], of: str = ""
) -> str:
    """Lay out the rows of each device by themselves, under a line that says which one it is.

    Args:
        rows: from any devices.
        lay_out: rows of one device -> a table.
        of: what the table is of; begins the line.
    """
    found: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        found.setdefault(f"{kind(row)}: {row['device'].removeprefix('cpu ')}", []).append(row)
    line = f"{of}, " if of else ""
    return "\n\n".join(f"{line}{where}:\n\n{lay_out(part)}" for where, part in found.items())


def spread(row: dict[str, Any]) -> str:
    """Return a timed row's ratio with its 20th and 80th percentile."""
    return f"{row['ratio']:.2f} ({row['ratio_p20']:.2f} to {row['ratio_p80']:.2f})"


def table(rows: list[dict[str, Any]], columns: dict[str, str]) -> str:
    """Lay rows out as a Markdown table; ``columns`` maps key -> heading."""

    def cell(value: Any) -> str:
        if isinstance(value, float):
            return f"{value:.3g}" if abs(value) < 1 else f"{value:,.2f}"
        return "" if value is None else f"{value:,}" if isinstance(value, int) else str(value)

    lines = [list(columns.values()), ["---"] * len(columns)]
    lines += [[cell(row.get(key)) for key in columns] for row in rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
