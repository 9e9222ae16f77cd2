"""What a report's figures show: bars and curves in shares of their scale, which the page draws.

Every bar has its figure beside it in words, so that nothing is told by a colour or a length alone.
"""

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from leantune.measure.text import format_bytes
from leantune.training.results import RunResult, VariantResult

LEDGERS = ("weights", "gradients", "optimizer", "activations")
_BYTE_UNITS = (1 << 30, 1 << 20, 1 << 10, 1)

Key = Callable[[Mapping[str, Any]], str]


@dataclass(frozen=True)
class Bar:
    """A bar: whose it is, its figure in words, and (number of a colour, percent) of each part."""

    name: str
    text: str
    parts: list[tuple[int, float]]


@dataclass(frozen=True)
class Bars:
    """Bars that share a scale, in labelled rows; ``legend`` has (number of a colour, name)."""

    title: str
    hint: str
    legend: list[tuple[int, str]]
    rows: dict[str, list[Bar]]


@dataclass(frozen=True)
class Curves:
    """Curves by step in a square of 100, y downwards, with the values at its edges and middles.

    Args:
        lines: (number of a colour, points of an SVG polyline).
        words: where each curve begins and ends.
    """

    title: str
    legend: list[tuple[int, str]]
    lines: list[tuple[int, str]]
    xs: list[str]
    ys: list[str]
    words: str


def block_of(module: str) -> str:
    """Return the block that a module lies in: ``encoder.layer.3`` of ``encoder.layer.3.output``.

    Outside numbered blocks the first two parts of the name; the model itself is ``(model)``.
    """
    numbered = re.match(r"(?:.*?\.)?\d+(?=\.|$)", module)
    if numbered is not None:
        return numbered.group()
    return ".".join(module.split(".")[:2]) or "(model)"


def place_in_block(module: str) -> str:
    """Return a module's name inside its block; ``(block)`` for the block itself."""
    block = block_of(module)
    if not re.search(r"(?:^|\.)\d+$", block):
        return module or "(model)"
    return module.removeprefix(block).lstrip(".") or "(block)"


GROUPS: Mapping[str, tuple[Key, str]] = {
    "block": (
        lambda entry: block_of(entry["module"]),
        "Exact bytes of one training step, counted once per storage, in the order of the forward.",
    ),
    "module": (
        lambda entry: place_in_block(entry["module"]),
        "The same bytes by place inside a block, summed over the blocks.",
    ),
    "kind": (lambda entry: entry["kind"], "The same bytes by what they are."),
}
"""What saved bytes are grouped by -> the group of a ledger entry, and what is said of it."""


def all_bars(result: RunResult) -> list[Bars]:
    """Return the bars of everything that a run has something to show of."""
    found = [held(result), planned(result), *(saved(result, name) for name in GROUPS)]
    found.append(fidelity(result))
    return [bars for bars in found if bars.rows]


def held(result: RunResult) -> Bars:
    """Return what one step of each run holds, by ledger."""
    rows = {run.name: {name: run.ledger[name] for name in LEDGERS} for run in result.runs}
    return _stacked("What one training step holds", "Exact bytes by ledger.", rows)


def planned(result: RunResult) -> Bars:
    """Return what the planner predicted and what was measured, beside the budget."""
    plan = result.plan or {}
    rows = {name: plan[name] for name in ("predicted", "measured") if name in plan}
    hint = "The step that was planned, and the longest batch as it was tried first."
    if plan.get("replanned"):
        hint += " The plan was made again after a first try."
    scale = {"budget": plan["budget"]} if rows else {}
    return _stacked("Predicted and measured", hint, rows, scale)


def _stacked(
    title: str,
    hint: str,
    rows: Mapping[str, Mapping[str, int]],
    others: Mapping[str, int] | None = None,
) -> Bars:
    sums = {name: sum(found[ledger] for ledger in LEDGERS) for name, found in rows.items()}
    others = others or {}
    most = max([*sums.values(), *(f.get("peak", 0) for f in rows.values()), *others.values(), 1])
    bars: dict[str, list[Bar]] = {}
    for name, found in rows.items():
        parts = [(at, 100 * found[ledger] / most) for at, ledger in enumerate(LEDGERS, 1)]
        words = [f"{ledger} {show_bytes(found[ledger])}" for ledger in LEDGERS]
        words += [f"peak {show_bytes(found['peak'])}"] if "peak" in found else []
        bars[name] = [Bar(name, f"{show_bytes(sums[name])}: {', '.join(words)}", parts)]
    for name, size in others.items():
        bars[name] = [Bar(name, show_bytes(size), [(0, 100 * size / most)])]
    return Bars(title, hint, list(enumerate(LEDGERS, 1)), bars)


def saved(result: RunResult, group: str) -> Bars:
    """Return the bytes saved for backward by a group of ``GROUPS``, every run beside the other."""
    table = saved_table(result, group)
    most = max([size for sizes in table.values() for size in sizes] + [1])
    rows = {
        name: [
            Bar(run.name, show_bytes(size), [(colour(result, run), 100 * size / most)])
            for run, size in zip(result.runs, sizes, strict=True)
        ]
        for name, sizes in table.items()
    }
    title = f"What backward keeps, by {group}"
    return Bars(title, GROUPS[group][1], _runs(result), rows)


def saved_table(result: RunResult, group: str) -> dict[str, list[int]]:
    """Return group -> saved bytes of every run, 0 where a run has none of that name.

    Blocks stay in the order of the forward; the others come largest first.
    """
    columns = [run.saved(GROUPS[group][0]) for run in result.runs]
    names = list(dict.fromkeys(name for column in columns for name in column))
    rows = {name: [column.get(name, 0) for column in columns] for name in names}
    if group != "block":
        rows = dict(sorted(rows.items(), key=lambda item: -max(item[1])))
    return rows


def fidelity(result: RunResult) -> Bars:
    """Return the last estimate of the gradient's error at each site, of the runs that have one."""
    last = {run.name: run.fidelity[-1]["sites"] for run in result.runs if run.fidelity}
    most = max([s["relative_variance"] for f in last.values() for s in f.values()], default=0) or 1
    rows: dict[str, list[Bar]] = {}
    for run in result.runs:
        for site, found in last.get(run.name, {}).items():
            variance = found["relative_variance"]
            text = f"{variance:.3g}, cosine {found['cosine']:.3f}, z {found['z_score']:.1f}"
            bar = Bar(run.name, text, [(colour(result, run), 100 * variance / most)])
            rows.setdefault(site, []).append(bar)
    hint = "Variance relative to the exact gradient's square, cosine with it, z-score of the bias."
    runs = [(number, name) for number, name in _runs(result) if name in last]
    return Bars("Fidelity of the gradient, by layer", hint, runs, rows)


def all_curves(result: RunResult) -> list[Curves]:
    """Return the training loss, and what evaluations found, by step."""
    found = [_curves(result, "Training loss", [run.train_loss for run in result.runs])]
    for name in dict.fromkeys([result.main_metric, "loss"]):
        points = [[(at, v[name]) for at, v in run.evaluations if name in v] for run in result.runs]
        floor = result.floor if name == result.main_metric else None
        found.append(_curves(result, f"Validation {name}", points, floor))
    return [curves for curves in found if curves is not None]


def _curves(
    result: RunResult,
    title: str,
    points: Sequence[Sequence[Sequence[float]]],
    floor: Mapping[str, Any] | None = None,
) -> Curves | None:
    """Return a curve for each run; one point makes no curve, and its number is in the table."""
    drawn = [[(x, y) for x, y in of_run if math.isfinite(y)] for of_run in points]
    if max(map(len, drawn)) < 2:
        return None
    last = max(x for of_run in drawn for x, _ in of_run)
    named = [(colour(result, run), run.name) for run in result.runs]
    if floor is not None:
        drawn.append([(0, floor["value"]), (last, floor["value"])])
        named.append((0, floor["name"]))
    values = [y for of_run in drawn for _, y in of_run]
    low, high = min(values), max(values)
    span = high - low or 1.0
    lines: list[tuple[int, str]] = []
    words: list[str] = []
    for (number, name), of_run in zip(named, drawn, strict=True):
        if of_run:
            path = [f"{100 * x / last:.2f},{100 * (high - y) / span:.2f}" for x, y in of_run]
            lines.append((number, " ".join(path)))
            (first_x, first), (last_x, end) = of_run[0], of_run[-1]
            words.append(f"{name} from {first:.4g} at {first_x:g} to {end:.4g} at {last_x:g}")
    xs = [f"{share * last:.4g}" for share in (0, 0.5, 1)]
    ys = [f"{high - share * span:.3g}" for share in (0, 0.5, 1)]
    return Curves(title, named, lines, xs, ys, f"{title} by step: {'; '.join(words)}")


def colour(result: RunResult, run: VariantResult) -> int:
    """Return the number of the colour that a run has in every figure; the reference is grey, 0."""
    others = [other for other in result.runs if other is not result.reference]
    if run is result.reference and others:
        return 0
    return 1 + (others.index(run) if others else 0) % 4


def show_bytes(num_bytes: float) -> str:
    """Return a size with three significant digits in its unit, as figures are read."""
    size = next((unit for unit in _BYTE_UNITS if num_bytes >= unit), 1)
    value = num_bytes / size
    digits = 0 if size == 1 else max(0, 3 - len(str(int(value))))
    return format_bytes(round(value, digits) * size)


def _runs(result: RunResult) -> list[tuple[int, str]]:
    return [(colour(result, run), run.name) for run in result.runs]
