"""The plots of a report, as PNG bytes; drawn on Figure objects, so nothing global changes."""

import io
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from leantune.measure import format_bytes
from leantune.report.results import EXACT, FigureRecord, Results, RunRecord

_DPI = 160
_CURVE_INCHES = (5.4, 3.1)
_BARS_WIDTH_INCHES = 9.0
_MAX_BARS = 40
_SMOOTH_FROM_POINTS = 30
_BYTE_UNITS = (("GiB", 1 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10), ("B", 1))


@dataclass(frozen=True)
class Theme:
    """Colours of a plot on a transparent ground.

    Args:
        suffix: of the file name.
        ink: text.
        muted: axis text and the baseline.
        grid: grid lines.
        exact: the exact model.
        methods: the methods' runs, in order.
    """

    suffix: str
    ink: str
    muted: str
    grid: str
    exact: str
    methods: tuple[str, ...]

    def colour(self, results: Results, run: RunRecord) -> str:
        """Return the colour that a run has in every plot."""
        if run.name == EXACT:
            return self.exact
        others = [other for other in results.runs if other.name != EXACT]
        return self.methods[others.index(run) % len(self.methods)]


LIGHT = Theme(
    "", "#1b2430", "#5d6978", "#dfe4ea", "#8793a3", ("#0f766e", "#b45309", "#6d28d9", "#be123c")
)
DARK = Theme(
    "-dark",
    "#e6eaf0",
    "#9aa6b5",
    "#303a47",
    "#8b98a9",
    ("#2dd4bf", "#fbbf24", "#a78bfa", "#fb7185"),
)


def plot_loss(results: Results, theme: Theme) -> bytes | None:
    """Draw the training loss by step; long curves as points with their running mean over them."""
    if not any(run.train_loss for run in results.runs):
        return None
    figure, axes = _canvas(_CURVE_INCHES, theme)
    for run in results.runs:
        steps, losses = [s for s, _ in run.train_loss], [v for _, v in run.train_loss]
        colour = theme.colour(results, run)
        if len(losses) >= _SMOOTH_FROM_POINTS:
            axes.plot(steps, losses, color=colour, alpha=0.25, linewidth=0.8)
            losses = _running_mean(losses)
        marker = "o" if len(losses) == 1 else None
        axes.plot(steps, losses, color=colour, linewidth=1.8, label=run.name, marker=marker)
    axes.set_ylabel("training loss", color=theme.muted)
    return _finish_curves(figure, axes, theme)


def plot_evaluations(results: Results, theme: Theme) -> bytes | None:
    """Draw the main metric on the validation split by step, with the baseline's line."""
    name = results.main_metric
    curves = {
        run.name: [(step, values[name]) for step, values in run.evaluations if name in values]
        for run in results.runs
    }
    if not any(curves.values()):
        return None
    figure, axes = _canvas(_CURVE_INCHES, theme)
    for run in results.runs:
        axes.plot(
            [step for step, _ in curves[run.name]],
            [value for _, value in curves[run.name]],
            color=theme.colour(results, run),
            linewidth=1.8,
            marker="o",
            markersize=4.5,
            label=run.name,
        )
    if results.baseline is not None:
        label, value = results.baseline
        axes.axhline(value, color=theme.muted, linewidth=1.2, linestyle=(0, (4, 3)), label=label)
    axes.set_ylabel(f"validation {name}", color=theme.muted)
    return _finish_curves(figure, axes, theme)


def plot_blocks(results: Results, theme: Theme) -> bytes | None:
    """Draw saved bytes by block, top to bottom as the forward runs, every run beside the other."""
    return _plot_bars(results, theme, lambda entry: block_of(entry["module"]))


def plot_modules(results: Results, theme: Theme) -> bytes | None:
    """Draw saved bytes by module inside a block, summed over the blocks."""
    return _plot_bars(results, theme, lambda entry: place_in_block(entry["module"]), by_size=True)


def plot_kinds(results: Results, theme: Theme) -> bytes | None:
    """Draw saved bytes by what they are, largest first."""
    return _plot_bars(results, theme, lambda entry: entry["kind"], by_size=True)


PLOTS: Mapping[str, Callable[[Results, Theme], bytes | None]] = {
    "loss": plot_loss,
    "evaluation": plot_evaluations,
    "saved-by-block": plot_blocks,
    "saved-by-module": plot_modules,
    "saved-by-kind": plot_kinds,
}
"""File name -> function that draws it, or returns None where the run has nothing to show."""


def figures_of(results: Results) -> dict[str, tuple[RunRecord, FigureRecord]]:
    """Return file name -> a figure that a run's methods measured, and that run."""
    found = [(run, figure) for run in results.runs for figure in run.figures]
    return {f"figure-{number}": pair for number, pair in enumerate(found, start=1)}


def plot_figure(results: Results, run: RunRecord, figure: FigureRecord, theme: Theme) -> bytes:
    """Draw one method's figure as horizontal bars from top to bottom, each with its number."""
    height = 0.9 + 0.3 * len(figure.values)
    canvas, axes = _canvas((_BARS_WIDTH_INCHES, height), theme)
    colour = theme.colour(results, run)
    places = range(len(figure.values))
    bars = axes.barh(places, list(figure.values.values()), 0.7, color=colour, label=run.name)
    labels = [format_number(value) for value in figure.values.values()]
    axes.bar_label(bars, labels, padding=3, fontsize=7.5, color=theme.muted)
    _finish_bars(axes, list(figure.values), theme)
    return _finish(canvas, axes, theme)


def format_number(value: float) -> str:
    """Return a figure with three significant digits."""
    return f"{value:.3g}"


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


def saved_table(
    results: Results, key: Callable[[Mapping[str, Any]], str], *, by_size: bool = False
) -> dict[str, list[int]]:
    """Return name -> saved bytes of every run, 0 where a run has none of that name.

    Args:
        key: names the group of a ledger entry.
        by_size: largest first, instead of the order of the forward.
    """
    columns = [run.saved(key) for run in results.runs]
    names = list(dict.fromkeys(name for column in columns for name in column))
    rows = {name: [column.get(name, 0) for column in columns] for name in names}
    if by_size:
        rows = dict(sorted(rows.items(), key=lambda item: -max(item[1])))
    return rows


def _plot_bars(
    results: Results,
    theme: Theme,
    key: Callable[[Mapping[str, Any]], str],
    by_size: bool = False,
) -> bytes | None:
    rows = _shorten(saved_table(results, key, by_size=by_size))
    if not rows:
        return None
    unit, size = _unit(max(max(values) for values in rows.values()))
    num_runs = len(results.runs)
    thick = 0.8 / num_runs
    height = 0.9 + len(rows) * (0.1 + 0.16 * num_runs)
    figure, axes = _canvas((_BARS_WIDTH_INCHES, height), theme)
    for number, run in enumerate(results.runs):
        places = [row + (number - (num_runs - 1) / 2) * thick for row in range(len(rows))]
        values = [sizes[number] / size for sizes in rows.values()]
        colour = theme.colour(results, run)
        bars = axes.barh(places, values, height=thick * 0.88, color=colour, label=run.name)
        labels = [format_bytes(round_bytes(sizes[number])) for sizes in rows.values()]
        axes.bar_label(bars, labels, padding=3, fontsize=7.5, color=theme.muted)
    axes.set_xlabel(f"saved for backward ({unit})", color=theme.muted)
    _finish_bars(axes, list(rows), theme)
    return _finish(figure, axes, theme)


def round_bytes(num_bytes: float) -> float:
    """Return a size with three significant digits in its unit, as figures are read."""
    _, size = _unit(num_bytes)
    value = num_bytes / size
    digits = 0 if size == 1 else max(0, 2 - len(str(int(value))) + 1)
    return round(value, digits) * size


def _unit(num_bytes: float) -> tuple[str, int]:
    return next((u for u in _BYTE_UNITS if num_bytes >= u[1]), _BYTE_UNITS[-1])


def _shorten(rows: dict[str, list[int]]) -> dict[str, list[int]]:
    if len(rows) <= _MAX_BARS:
        return rows
    names = list(rows)
    rest = [rows[name] for name in names[_MAX_BARS:]]
    kept = {name: rows[name] for name in names[:_MAX_BARS]}
    return kept | {f"{len(rest)} more": [sum(column) for column in zip(*rest, strict=True)]}


def _running_mean(values: Sequence[float]) -> list[float]:
    """Return the mean of a window of a tenth of the curve around each point."""
    half = max(1, len(values) // 20)
    windows = [values[max(0, i - half) : i + half + 1] for i in range(len(values))]
    return [sum(window) / len(window) for window in windows]


def _canvas(inches: tuple[float, float], theme: Theme) -> tuple[Figure, Axes]:
    figure = Figure(figsize=inches, dpi=_DPI, layout="constrained")
    FigureCanvasAgg(figure)
    figure.patch.set_alpha(0)
    axes = figure.add_subplot()
    axes.patch.set_alpha(0)
    axes.set_axisbelow(True)
    axes.spines[["top", "right", "left"]].set_visible(False)
    for spine in axes.spines.values():
        spine.set_color(theme.grid)
    axes.tick_params(colors=theme.muted, labelsize=9, length=3)
    return figure, axes


def _finish_curves(figure: Figure, axes: Axes, theme: Theme) -> bytes:
    axes.set_xlabel("step", color=theme.muted)
    axes.set_xlim(left=0)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=7, integer=True))
    axes.grid(axis="y", color=theme.grid, linewidth=0.8)
    return _finish(figure, axes, theme)


def _finish_bars(axes: Axes, names: list[str], theme: Theme) -> None:
    axes.set_yticks(range(len(names)), names)
    axes.invert_yaxis()
    axes.set_ylim(len(names) - 0.4, -0.6)
    axes.margins(x=0.12)
    axes.grid(axis="x", color=theme.grid, linewidth=0.8)
    axes.tick_params(axis="y", labelcolor=theme.ink, length=0)
    axes.spines["left"].set_visible(True)
    axes.spines["bottom"].set_visible(False)


def _finish(figure: Figure, axes: Axes, theme: Theme) -> bytes:
    handles, _ = axes.get_legend_handles_labels()
    figure.legend(
        loc="outside upper left",
        frameon=False,
        labelcolor=theme.ink,
        fontsize=9,
        ncols=len(handles),
    )
    out = io.BytesIO()
    figure.savefig(out, format="png")
    return out.getvalue()
