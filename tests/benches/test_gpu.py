"""All rows of a GPU from one call: what would run, tiny shapes on a CPU, limits and losses."""

import os
import subprocess
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

from bench import gpu, rows
from bench.gpu import PARTS, Part

NOT_HERE = ("APOLLO", "GaLore", "Liger", "MLP recomputed", "offloaded")
"""Begin the names of what a machine may lack: another library, a GPU."""
QUICK = ("spt-attention", "spt-ffn")


@pytest.fixture(autouse=True)
def results(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setattr(rows, "RESULTS", tmp_path)
    return tmp_path


def test_the_limits_fit_into_eight_minutes() -> None:
    """Beside them the call starts itself, and the first part's modules are imported twice."""
    assert sum(part.limit_s for part in PARTS) <= 480 - 15


BARE = """
import sys
for name in ("scipy", "sklearn", "matplotlib", "trl", "liger_kernel"):
    sys.modules[name] = None
from bench import device, gpu
device.has_gpu = lambda: False
gpu.main()
"""


def test_without_a_gpu_it_says_what_it_would_run(results: Path) -> None:
    """And imports what it would run, on a machine with next to nothing beside torch."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    environment["LEANTUNE_RESULTS"] = str(results)
    command = [sys.executable, "-c", BARE]
    said = subprocess.run(command, capture_output=True, text=True, env=environment, check=True)
    for part in PARTS:
        assert f"{part.name} ({part.when})" in said.stdout
    for expected in ("16 heads of 64, n = 32768: SDPA; SPT 1/8, blocks;", "at most 465 s"):
        assert expected in said.stdout
    assert "not here" not in said.stdout and not list(results.iterdir())


@pytest.mark.parametrize(
    "part",
    [p if p.bench in QUICK else pytest.param(p, marks=pytest.mark.slow) for p in PARTS],
    ids=lambda p: p.name,
)
@pytest.mark.filterwarnings("ignore")
def test_every_part_writes_its_rows_in_tiny_shapes(
    part: Part, capsys: pytest.CaptureFixture[str]
) -> None:
    """Library warnings are not ours to answer for in a bench: on a GPU they do not stop it."""
    result, planned = part.planned(True)
    import_module(part.module).BENCH.run(part.cases, True)
    said = capsys.readouterr().out
    made = {(row["case"], row["variant"]): row for row in rows.read(result)}
    lacking = [key for key in planned if key not in made]
    assert made and planned[0] in made
    for case, variant in lacking:
        assert any(word in variant for word in NOT_HERE), said
        assert f"left out: {case}, {variant}: " in said
    timed = [row for row in made.values() if "ratio" in row]
    assert all(row["ratio"] > 0 and row["saved_bytes"] > 0 for row in timed)
    assert timed or all(row["launches_per_block"] > 0 for row in made.values())


FAKE = """
from dataclasses import dataclass
from bench.timing import Bench

@dataclass(frozen=True)
class Case:
    name: str = "case"
    needs_gpu: bool = True
    variants: tuple[str, ...] = ("reference", "one", "two")

def measure(case, where, variants):
    name = variants[-1]
    if name == "one":
        raise MemoryError("does not fit")
    if name == "two":
        {end}
    return [{{"case": case.name, "variant": v}} for v in variants]

BENCH = Bench("fake", lambda tiny: [Case()], measure, {{}})

if __name__ == "__main__":
    BENCH.run(tiny=True)
"""


def run_fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, end: str, limit_s: float) -> Any:
    module = f"fake_{len(end)}"
    (tmp_path / f"{module}.py").write_text(FAKE.format(end=end), "utf-8")
    monkeypatch.syspath_prepend(str(tmp_path))
    honest = gpu.run_limited

    def run_module(command: list[str], limit: float, said: dict[str, str]) -> str:
        return honest([sys.executable, str(tmp_path / f"{module}.py")], limit, said)

    monkeypatch.setattr(gpu, "run_limited", run_module)
    monkeypatch.setenv("PYTHONPATH", str(Path(gpu.__file__).parents[1]))
    return gpu.run_all([Part("fake", module, "*", limit_s)], limit_s, tiny=True)


@pytest.mark.parametrize(
    ("end", "limit_s", "why"),
    [
        ("import os; os._exit(7)", 90, "its part ended with exit code 7"),
        ("import time; time.sleep(600)", 45, "its part was ended after 45 s"),
    ],
    ids=["crash", "hang"],
)
@pytest.mark.slow
def test_a_crash_or_a_hang_costs_its_own_row(
    end: str, limit_s: float, why: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    missing = run_fake(tmp_path, monkeypatch, end, limit_s)
    assert [row["variant"] for row in rows.read("fake")] == ["reference"]
    assert missing == ["case, one: MemoryError: does not fit", f"case, two: {why}"]


def test_what_no_time_is_left_for_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "run_limited", lambda *args: pytest.fail("no time was left"))
    (part,) = [p for p in PARTS if p.bench == "launches"]
    missing = gpu.run_all([part], 0, tiny=True)
    assert len(missing) == len(part.planned(True)[1])
    assert missing[0].endswith("exact: no time was left of 0 s")


def test_a_part_that_cannot_be_imported_is_named() -> None:
    (line,) = gpu.run_all([Part("absent", "bench.cases.absent", "*", 5)], 5, tiny=True)
    assert line == "absent: No module named 'bench.cases.absent'"


def test_a_row_replaces_none_of_the_other_kind_of_device(monkeypatch: pytest.MonkeyPatch) -> None:
    def measure(device_name: str, ratio: float) -> None:
        monkeypatch.setattr(rows, "environment", lambda: {"device": device_name})
        rows.replace("some", ("case",), [{"case": "a", "ratio": ratio}])

    measure("cpu x86_64, 2 threads", 1.0)
    measure("NVIDIA H100 80GB HBM3", 2.0)
    measure("cpu x86_64, 1 threads", 3.0)
    measure("NVIDIA H200", 4.0)
    found = [(row["device"], row["ratio"]) for row in rows.read("some")]
    assert found == [("cpu x86_64, 1 threads", 3.0), ("NVIDIA H200", 4.0)]


def test_every_table_says_what_it_was_measured_on() -> None:
    made = [{"device": "cpu x86_64, 2 threads", "x": "a"}, {"device": "NVIDIA H200", "x": "b"}]
    text = rows.by_device(made, lambda part: "".join(row["x"] for row in part), "Blocks")
    assert text == "Blocks, CPU: x86_64, 2 threads:\n\na\n\nBlocks, GPU: NVIDIA H200:\n\nb"
