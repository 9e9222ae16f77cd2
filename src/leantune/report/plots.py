"""The plots of a report: SVG whose colours are the page's, so one drawing serves light and dark."""

import io
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from leantune.measure.text import format_bytes
from leantune.training.results import RunResult, VariantResult

# Drawn in the first colour, shown in the page's variable; a file on its own has the first.
INK, MUTED, GRID = "#1b2430", "#5d6978", "#dfe4ea"
COLOURS = ("#8793a3", "#0f766e", "#b45309", "#6d28d9", "#be123c")
_VARIABLES = {INK: "ink", MUTED: "muted", GRID: "line"} | {
    colour: f"run-{number}" for number, colour in enumerate(COLOURS)
}
_CURVE_INCHES = (5.4, 3.1)
_BARS_WIDTH_INCHES = 9.0
_MAX_BARS = 40
_BYTE_UNITS = (("GiB", 1 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10), ("B", 1))

Key = Callable[[Mapping[str, Any]], str]


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


BARS: Mapping[str, Key] = {
    "block": lambda entry: block_of(entry["module"]),
    "module": lambda entry: place_in_block(entry["module"]),
    "kind": lambda entry: entry["kind"],
}
"""What saved bytes are grouped by -> the group of a ledger entry."""


def draw(result: RunResult) -> dict[str, str]:
    """Return file name -> SVG of everything that the run has something to show of."""
    # No pyplot, and no change that outlives the call.
    options: Any = {"svg.fonttype": "none", "svg.hashsalt": "leantune", "font.family": "sans-serif"}
    with matplotlib.rc_context(options):
        plots = {"loss": _plot_loss(result), "evaluation": _plot_evaluations(result)}
        plots |= {f"saved-by-{name}": _plot_bars(result, name) for name in BARS}
        return {name: _svg(figure) for name, figure in plots.items() if figure is not None}


def saved_table(result: RunResult, name: str) -> dict[str, list[int]]:
    """Return group -> saved bytes of every run, 0 where a run has none of that name.

    Blocks stay in the order of the forward; the others come largest first.

    Args:
        name: of ``BARS``.
    """
    columns = [run.saved(BARS[name]) for run in result.runs]
    names = list(dict.fromkeys(group for column in columns for group in column))
    rows = {group: [column.get(group, 0) for column in columns] for group in names}
    if name != "block":
        rows = dict(sorted(rows.items(), key=lambda item: -max(item[1])))
    return rows


def round_bytes(num_bytes: float) -> float:
    """Return a size with three significant digits in its unit, as figures are read."""
    _, size = _unit(num_bytes)
    value = num_bytes / size
    digits = 0 if size == 1 else max(0, 3 - len(str(int(value))))
    return round(value, digits) * size


def _unit(num_bytes: float) -> tuple[str, int]:
    return next((unit for unit in _BYTE_UNITS if num_bytes >= unit[1]), _BYTE_UNITS[-1])


def _colour(result: RunResult, run: VariantResult) -> str:
    """Return the colour that a run has in every plot; the reference is grey."""
    others = [other for other in result.runs if other is not result.reference]
    if run is result.reference and others:
        return COLOURS[0]
    return COLOURS[1 + (others.index(run) if others else 0) % (len(COLOURS) - 1)]


def _plot_loss(result: RunResult) -> Figure | None:
    """Draw the training loss by step."""
    return _plot_curves(result, "training loss", [run.train_loss for run in result.runs])


def _plot_evaluations(result: RunResult) -> Figure | None:
    """Draw the main metric on the validation split by step, with the floor's line."""
    name = result.main_metric
    points = [[(at, v[name]) for at, v in run.evaluations if name in v] for run in result.runs]
    figure = _plot_curves(result, f"validation {name}", points, marker="o", markersize=4.5)
    if figure is not None and result.floor is not None:
        style: dict[str, Any] = {"color": MUTED, "linewidth": 1.2, "linestyle": (0, (4, 3))}
        figure.axes[0].axhline(result.floor["value"], label=result.floor["name"], **style)
    return figure


def _plot_curves(
    result: RunResult, title: str, curves: Sequence[Sequence[Sequence[float]]], **style: Any
) -> Figure | None:
    """Draw a curve for each run; one point makes no curve, and its number is in the table."""
    if max(map(len, curves)) < 2:
        return None
    figure, axes = _canvas(_CURVE_INCHES)
    for run, points in zip(result.runs, curves, strict=True):
        steps, values = [step for step, _ in points], [value for _, value in points]
        colour = _colour(result, run)
        axes.plot(steps, values, color=colour, linewidth=1.8, label=run.name, **style)
    axes.set_ylabel(title, color=MUTED)
    axes.set_xlabel("step", color=MUTED)
    axes.set_xlim(left=0)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=7, integer=True))
    axes.grid(axis="y", color=GRID, linewidth=0.8)
    return figure


def _plot_bars(result: RunResult, name: str) -> Figure | None:
    """Draw saved bytes as horizontal bars, every run beside the other."""
    rows = _shorten(saved_table(result, name))
    if not rows:
        return None
    unit, size = _unit(max(max(values) for values in rows.values()))
    num_runs = len(result.runs)
    thick = 0.8 / num_runs
    figure, axes = _canvas((_BARS_WIDTH_INCHES, 0.9 + len(rows) * (0.1 + 0.16 * num_runs)))
    for number, run in enumerate(result.runs):
        places = [row + (number - (num_runs - 1) / 2) * thick for row in range(len(rows))]
        values = [sizes[number] / size for sizes in rows.values()]
        colour = _colour(result, run)
        bars = axes.barh(places, values, height=thick * 0.88, color=colour, label=run.name)
        labels = [format_bytes(round_bytes(sizes[number])) for sizes in rows.values()]
        axes.bar_label(bars, labels, padding=3, fontsize=7.5, color=MUTED)
    axes.set_xlabel(f"saved for backward ({unit})", color=MUTED)
    axes.set_yticks(range(len(rows)), list(rows))
    axes.set_ylim(len(rows) - 0.4, -0.6)
    axes.margins(x=0.12)
    axes.grid(axis="x", color=GRID, linewidth=0.8)
    axes.tick_params(axis="y", labelcolor=INK, length=0)
    axes.spines["left"].set_visible(True)
    axes.spines["bottom"].set_visible(False)
    return figure


def _shorten(rows: dict[str, list[int]]) -> dict[str, list[int]]:
    rest = list(rows.values())[_MAX_BARS:]
    if not rest:
        return rows
    kept = dict(list(rows.items())[:_MAX_BARS])
    return kept | {f"{len(rest)} more": [sum(column) for column in zip(*rest, strict=True)]}


def _canvas(inches: tuple[float, float]) -> tuple[Figure, Axes]:
    figure = Figure(figsize=inches, layout="constrained")
    FigureCanvasSVG(figure)
    figure.patch.set_alpha(0)
    axes = figure.add_subplot()
    axes.patch.set_alpha(0)
    axes.set_axisbelow(True)
    axes.spines[["top", "right", "left"]].set_visible(False)
    for spine in axes.spines.values():
        spine.set_color(GRID)
    axes.tick_params(colors=MUTED, labelsize=9, length=3)
    return figure, axes


def _svg(figure: Figure) -> str:
    """Return a figure with its legend as one ``<svg>`` element."""
    handles, labels = figure.axes[0].get_legend_handles_labels()
    place = {"loc": "outside upper left", "ncols": len(handles)}
    figure.legend(handles, labels, frameon=False, labelcolor=INK, fontsize=9, **place)
    out = io.StringIO()
    figure.savefig(out, format="svg", metadata={"Date": None})
    text = out.getvalue()
    text = text[text.index("<svg") :]
    # The size is the page's business; the view box keeps the shape.
    text = re.sub(r'(<svg\b[^>]*?) width="[^"]*"', r"\1", text, count=1)
    text = re.sub(r'(<svg\b[^>]*?) height="[^"]*"', r"\1", text, count=1)
    for colour, name in _VARIABLES.items():
        text = text.replace(colour, f"var(--{name}, {colour})")
    return text
