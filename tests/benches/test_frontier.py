"""The frontier: tiny models measured, what was measured passed over, points beaten, plots drawn."""

import re
from importlib.metadata import version
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

from bench import device, pareto, rows
from bench.cases import frontier
from bench.models import BertBlocks
from bench.timing import Bench

ROOT = Path(__file__).parents[2]
CPU = {"commit": "abc", "device": "cpu x86_64, 2 threads"}


@pytest.fixture
def results(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setattr(rows, "RESULTS", tmp_path)
    monkeypatch.setattr(rows, "environment", lambda: CPU)
    return tmp_path


def measure(*names: str) -> dict[str, dict[str, Any]]:
    """Return variant -> row of a tiny stack; all variants in one comparison."""
    prepare = frontier.variants("aot_eager_decomp_partition", has_liger=True)
    case = frontier.Case(
        "tiny",
        lambda: BertBlocks(1, 128),
        lambda: {"x": torch.randn(2, 64, 128)},
        {name: prepare[name] for name in ("plain", *(names or prepare))},
    )
    Bench("frontier", lambda tiny: [case], frontier._measure, {}).run()
    return {row["variant"]: row for row in rows.read("frontier")}


@pytest.mark.filterwarnings("ignore")
def test_ours_and_others_are_measured_in_one_run(
    results: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """And what this machine lacks is named with the reason."""
    names = ("checkpointing", "LoRA", "LoRA + checkpointing", *frontier.OTHERS, *frontier.OURS)
    made = measure(*names)
    said = capsys.readouterr().out
    for name in {*names} - {*made}:
        assert f"left out: tiny, {name}: " in said
    assert {"VeLoRA", "LoRA-FA", "WTA-CRS 0.1"} <= {*made}
    assert "needs an NVIDIA GPU" in said or device.has_gpu()
    saved = {name: row["saved_bytes"] for name, row in made.items()}
    state = {name: row["state_bytes"] for name, row in made.items()}
    for less, more in (
        ("checkpointing", "plain"),
        ("WTA-CRS 0.1", "WTA-CRS 0.3"),
        ("WTA-CRS 0.3", "plain"),
        ("VeLoRA", "LoRA"),
        ("LoRA-FA", "VeLoRA"),
    ):
        assert saved[less] < saved[more], (less, more)
    assert saved["checkpointing + WTA-CRS 0.1"] == saved["checkpointing"]
    assert state["LoRA-FA"] < state["LoRA"] < state["plain"]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.slow
def test_models_compiled_side_by_side_keep_to_their_own_budgets(results: Path) -> None:
    made = measure(*frontier.COMPILED)
    compiled, half, tenth = (made[name]["saved_bytes"] for name in frontier.COMPILED)
    assert tenth < half < compiled < made["plain"]["saved_bytes"]


@pytest.mark.filterwarnings("ignore")
def test_a_trainer_makes_the_optimizer_of_the_models_parameters() -> None:
    model, optimizer = frontier._by_trainer("adamw_torch")(BertBlocks(1, 64))
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert held == {id(p) for p in model.parameters()}


class Fake:
    """A case with one variant, and how often it was measured."""

    name, needs_gpu, variants = "case", False, ("plain",)
    count = 0

    def measure(self, case: Any, where: Any, variants: Any) -> list[dict[str, Any]]:
        self.count += 1
        return [{"case": case.name, "variant": name} for name in variants]


@pytest.mark.parametrize("has_gpu", [False, True])
def test_a_run_goes_on_where_rows_of_this_commit_end(
    has_gpu: bool, results: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake = Fake()
    fake.needs_gpu = has_gpu
    monkeypatch.setattr(device, "has_gpu", lambda: has_gpu)
    monkeypatch.setattr(device, "find", lambda: torch.device("cpu"))
    monkeypatch.setattr(device, "forget", lambda: None)
    bench = Bench("some", lambda tiny: [fake], fake.measure, {}, goes_on=True)

    def run(commit: str, only: str = "*") -> int:
        monkeypatch.setattr(rows, "environment", lambda: CPU | {"commit": commit})
        bench.run(only)
        return fake.count

    assert run("abc") == 1
    assert run("abc-dirty") == 1  # the rows are what has changed
    assert run("abc", "case") == 2
    assert run("def") == 3


def row(variant: str, saved: int, ratio: float, case: str = "MiniLM", **other: Any) -> dict:
    times = {"ratio": ratio, "ratio_p20": ratio, "ratio_p80": ratio}
    size = {"saved_bytes": saved, "saved_mib": saved / 2**20, "saved_ratio": saved / 100}
    about = {"case": case, "variant": variant, "peak_mib": None, "state_bytes": 0}
    return {**about, **times, **size, **CPU, **other}


POINTS = (
    row("plain", 100, 1.0),
    row("checkpointing", 10, 1.3),
    row("checkpointing + WTA-CRS 0.1", 10, 1.1),
    row("WTA-CRS 0.3", 80, 0.9),
    row("WTA-CRS 0.1", 70, 0.8),
    row("LoRA-FA", 75, 0.85),
)


def test_a_point_is_on_the_frontier_unless_one_beats_it() -> None:
    best = {point["variant"] for point in pareto.frontier(POINTS)}
    assert best == {"checkpointing + WTA-CRS 0.1", "WTA-CRS 0.1"}
    # Equal ones do not beat each other.
    twins = [row("plain", 5, 1.0), row("LoRA", 5, 1.0)]
    assert pareto.frontier(twins) == twins


def test_words_name_who_is_both_smaller_and_faster(results: Path) -> None:
    rows.write("frontier", [*POINTS, row("LoRA", 1, 0.1, commit="of another run")])
    assert pareto.words("CPU") == (
        "- MiniLM. Ours on the frontier: WTA-CRS 0.1; checkpointing + WTA-CRS 0.1. "
        "Both smaller and faster than **WTA-CRS 0.3**: LoRA-FA."
    )
    rows.write("frontier", [point for point in POINTS if point["variant"] != "LoRA-FA"])
    assert pareto.words("CPU").endswith("Nothing else is both smaller and faster than one of ours.")
    assert pareto.words("GPU") == ""
    names = ("LoRA-FA", "VeLoRA", "GaLore", "APOLLO")
    (case,) = (c for c in frontier.BENCH.cases(False) if c.name.startswith("MiniLM"))
    made = [v for v in case.variants if v not in names]
    rows.write("frontier", [row(variant, 1, 1.0, case.name) for variant in made])
    assert pareto.words("CPU").endswith(" Left out: VeLoRA; LoRA-FA; GaLore; APOLLO.")


def test_quality_is_that_of_the_variants_own_or_the_same_gradients(results: Path) -> None:
    metrics = (("exact", 0.5), ("WTA-CRS 0.3", 0.25))
    about = {"task": "sst2", "seed": 0, **CPU}
    rows.write("wta_crs_quality", [about | {"recipe": r, "metric": m} for r, m in metrics])
    rows.write("frontier", list(POINTS))
    line = re.compile(r"^\| \**([^|*]+?)\** \|.* \| ([\d.]*) \|  \|$", re.M)
    shown = dict(line.findall(pareto.whole_page()))
    assert shown == {
        "plain": "50.0",
        "checkpointing": "50.0",
        "WTA-CRS 0.3": "25.0",
        **dict.fromkeys(("checkpointing + WTA-CRS 0.1", "WTA-CRS 0.1", "LoRA-FA"), ""),
    }


def test_the_same_rows_give_the_same_plot(results: Path) -> None:
    cases = ("MiniLM", "a second case")
    rows.write("frontier", [point | {"case": case} for case in cases for point in POINTS])
    drawn = pareto.draw("CPU")
    assert drawn == pareto.draw("CPU")
    for point in POINTS:
        assert drawn.count(f">{point['variant']}</text>") == 2
    assert all(f">{case}</text>" in drawn for case in cases)


@pytest.mark.parametrize(
    "wanted", [[0.0, 0.01, 0.02, 0.9], [0.5] * 5, [0.98, 0.99, 1.0], [0.3]], ids=str
)
def test_names_stand_apart(wanted: list[float]) -> None:
    heights = pareto._apart(wanted, 0.1)
    assert heights[0] >= 0 and heights[-1] <= 1
    assert all(b - a >= 0.1 - 1e-9 for a, b in pairwise(heights))


def is_pinned(package: str) -> bool:
    pins = (ROOT / "requirements" / "constraints.txt").read_text("utf-8")
    return f"{package}=={version(package)}" in pins


@pytest.mark.parametrize("kind", pareto.KINDS)
@pytest.mark.skipif(not is_pinned("matplotlib"), reason="another matplotlib draws otherwise")
def test_the_plots_are_those_of_the_committed_rows(kind: str) -> None:
    """Where it fails, rows or the drawing have changed: ``python -m bench readme``."""
    path = ROOT / "docs" / pareto.file_name(kind)
    assert path.exists() == bool(pareto.cases(kind))
    assert not path.exists() or path.read_text("utf-8") == pareto.draw(kind)
