"""All rows of a GPU in one call: parts with time limits of their own, the most important first."""

import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from importlib import import_module
from pathlib import Path
from threading import Timer
from typing import Any

from bench import device, rows
from bench.timing import LEFT_OUT, Bench


@dataclass(frozen=True)
class Part:
    """Cases of one bench that run in a process of their own.

    Args:
        bench: its name on the command line.
        module: where it is.
        cases: glob on their names.
        limit_s: seconds after which the process is ended, or more where earlier parts left some;
            its rows stay. With 0 it has what they left.
    """

    bench: str
    module: str
    cases: str
    limit_s: float

    @property
    def name(self) -> str:
        return f"{self.bench}, {self.cases}" if self.cases != "*" else self.bench

    @property
    def when(self) -> str:
        return f"at most {self.limit_s:.0f} s" if self.limit_s else "in what time is left"

    def planned(self, tiny: bool) -> tuple[str, list[tuple[str, str]]]:
        """Return the result file and each (case, variant), in order."""
        bench: Bench[Any] = import_module(self.module).BENCH
        cases = bench.chosen(True, self.cases, tiny)
        return bench.result, [(case.name, name) for case in cases for name in case.variants]


PARTS = (
    Part("wta-crs-speed", "bench.cases.wta_crs_speed", "Llama*", 150),
    Part("wta-crs-speed", "bench.cases.wta_crs_speed", "BERT*", 45),
    Part("launches", "bench.cases.launches", "*", 35),
    Part("whole-step", "bench.cases.whole_step", "T5*", 45),
    Part("whole-step", "bench.cases.whole_step", "RoBERTa*", 40),
    Part("sparse-grad-speed", "bench.cases.sparse_grad_speed", "*", 60),
    Part("spt-attention", "bench.cases.spt_attention", "*", 50),
    Part("spt-ffn", "bench.cases.routed_ffn_speed", "*", 40),
    # Its most important points are the first part's, too.
    Part("frontier", "bench.cases.frontier", "*", 0),
)
"""In order of importance. Their limits add up to the budget: eight minutes with the start."""


def main(budget_s: float | None = None, tiny: bool = False, parts: Sequence[Part] = PARTS) -> None:
    """Run every part, and name what was left out; without a GPU say what would run.

    Args:
        budget_s: seconds for all parts together; by default the sum of their limits.
        tiny: shapes for any machine, without haste; their rows go to a temporary folder.
        parts: in order.
    """
    if tiny:
        parts = [replace(part, limit_s=600) for part in parts]
    budget_s = budget_s or sum(part.limit_s for part in parts)
    if not tiny and not device.has_gpu():
        print("This machine has no NVIDIA GPU. On one, this call would measure:")
        for part in parts:
            _show(part)
        print(f"\nAll parts together take at most {budget_s:.0f} s.")
        return
    with tempfile.TemporaryDirectory() as folder:
        if tiny:
            rows.RESULTS = Path(folder)
        missing = run_all(parts, budget_s, tiny)
    print("\nLeft out:" if missing else "\nNothing was left out.")
    for line in missing:
        print(f"- {line}")


def _show(part: Part) -> None:
    print(f"\n{part.name} ({part.when})")
    try:
        _, planned = part.planned(False)
    except ImportError as error:
        print(f"  not here: {error}")
        return
    for case in dict.fromkeys(case for case, _ in planned):
        print(f"  {case}: {'; '.join(name for c, name in planned if c == case)}")


def run_all(parts: Sequence[Part], budget_s: float, tiny: bool = False) -> list[str]:
    """Run the parts in order within the budget and return a line for each row that is missing."""
    ends = time.monotonic() + budget_s
    missing: list[str] = []
    later_s = sum(part.limit_s for part in parts)
    for part in parts:
        later_s -= part.limit_s
        left_s = ends - time.monotonic()
        limit_s = max(min(part.limit_s, left_s), left_s - later_s)
        try:
            result, planned = part.planned(tiny)
        except ImportError as error:
            missing.append(f"{part.name}: {error}")
            continue
        before = _rows_of(result)
        said: dict[str, str] = {}
        why = f"no time was left of {budget_s:.0f} s"
        if limit_s > 0:
            print(f"\n== {part.name} (at most {limit_s:.0f} s)", flush=True)
            command = [sys.executable, "-m", "bench", part.bench, "--case", part.cases]
            why = run_limited(command + ["--tiny"] * tiny, limit_s, said)
        after = _rows_of(result)
        for key in planned:
            if after.get(key) == before.get(key):
                name = ", ".join(key)
                missing.append(f"{name}: {said.get(name, why)}")
    return missing


def _rows_of(result: str) -> dict[tuple[str, str], dict[str, Any]]:
    kind = "GPU" if device.has_gpu() else "CPU"
    return {(r["case"], r["variant"]): r for r in rows.read(result) if rows.kind(r) == kind}


def run_limited(command: list[str], limit_s: float, said: dict[str, str]) -> str:
    """Run a command, relay what it prints, end it after a time, and return how it ended.

    Args:
        command: in a process group of its own, so that what it started ends with it.
        limit_s: seconds.
        said: gets name -> reason of each variant that the command says it left out.
    """
    is_late = False

    def end() -> None:
        nonlocal is_late
        is_late = True
        _kill(process)

    ours = {"LEANTUNE_RESULTS": str(rows.RESULTS)}
    with subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,
        env=os.environ | ours,
    ) as process:
        timer = Timer(limit_s, end)
        timer.start()
        try:
            assert process.stdout is not None
            for line in process.stdout:
                print(line, end="", flush=True)
                if line.startswith(LEFT_OUT):
                    name, _, reason = line.removeprefix(LEFT_OUT).strip().partition(": ")
                    said[name] = reason
            code = process.wait()
        finally:
            timer.cancel()
            # What the part started may outlive it.
            _kill(process)
    if is_late:
        return f"its part was ended after {limit_s:.0f} s"
    return f"its part ended with exit code {code}"


def _kill(process: "subprocess.Popen[str]") -> None:
    """End the process and everything that it started."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
