"""Turns a run folder into one HTML page that needs no other file."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from leantune.core.disk import write_atomic
from leantune.core.recipe import RECIPE_FILE
from leantune.report.figures import all_bars, all_curves, show_bytes
from leantune.training.recipe import read_recipe_file
from leantune.training.results import RunResult, VariantResult

REPORT_FILE = "report.html"
_FIRST = ("saved activations", "held in all", "peak", "step time")


@dataclass(frozen=True)
class Cell:
    """One cell of a table.

    Args:
        text: the figure with its unit.
        note: small print below it, in lines: a difference, a ratio or a spread.
    """

    text: str
    note: str = ""


def write_report(folder: Path) -> Path:
    """Write ``report.html`` of a finished run, whole or not at all.

    Returns:
        The path of ``report.html``.

    Raises:
        ConfigError: ``metrics.json`` or ``recipe.json`` is missing or not what a run writes.
    """
    result = RunResult.read(folder)
    recipe = read_recipe_file(folder / RECIPE_FILE)
    path = folder / REPORT_FILE
    write_atomic(path, _render(result, recipe))
    return path


def headline(result: RunResult) -> tuple[list[str], list[list[Cell]]]:
    """Return the header, a run in each column, and a row for each figure, named in its first cell.

    Metrics, what one step holds by ledger, the peak, and times; a row that no run has a figure for
    is left out.
    """
    runs, reference = result.runs, result.reference
    names = dict.fromkeys([result.main_metric, *(n for run in runs for n in run.metrics)])
    rows = {name: [_metric(result, run, name) for run in runs] for name in names}
    for name, size in reference.held_bytes.items():
        rows[name] = [_size(result, run, run.held_bytes[name], size) for run in runs]
    rows["peak"] = [_size(result, run, run.peak_bytes, reference.peak_bytes) for run in runs]
    rows["step time"] = [_time(result, run) for run in runs]
    rows["training"] = [Cell(_duration(run.train_seconds)) for run in runs]
    header = ["", *(run.name for run in runs)]
    return header, [
        [Cell(name), *cells] for name, cells in rows.items() if any(cell.text for cell in cells)
    ]


def floor_line(result: RunResult) -> str:
    """Return the score that needs no learning as a sentence, or an empty string."""
    floor = result.floor
    if floor is None:
        return ""
    return f"Without learning ({floor['name']}): {result.main_metric} {floor['value']:.4f}"


def _metric(result: RunResult, run: VariantResult, name: str) -> Cell:
    value, reference = run.metrics.get(name), result.reference.metrics.get(name)
    if value is None:
        return Cell("")
    if reference is None or run is result.reference:
        return Cell(f"{value:.4f}")
    return Cell(f"{value:.4f}", f"{value - reference:+.4f}")


def _size(
    result: RunResult, run: VariantResult, num_bytes: int | None, reference: int | None
) -> Cell:
    if run is result.reference or num_bytes is None or not reference:
        return Cell(_bytes(num_bytes))
    return Cell(_bytes(num_bytes), f"{num_bytes / reference:.3f} of {result.reference.name}")


def _time(result: RunResult, run: VariantResult) -> Cell:
    digits = 1 if run.step_ms < 100 else 0
    text, spread = f"{run.step_ms:,.{digits}f} ms", run.step_time_ratio_spread
    if run.step_time_ratio is None or spread is None or run is result.reference:
        return Cell(text)
    of = f"{run.step_time_ratio:.3f} of {result.reference.name}"
    return Cell(text, f"{of}\n{spread[0]:.3f} to {spread[1]:.3f}")


def _bytes(num_bytes: int | None) -> str:
    return "" if num_bytes is None else show_bytes(num_bytes)


def _duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {rest:02d} s"


def _render(result: RunResult, recipe: Mapping[str, Any]) -> str:
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("leantune.report", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    header, rows = headline(result)
    return environment.get_template("template.html").render(
        result=result,
        header=header,
        rows=rows,
        # What a reader looks for first, of the recipe's own run.
        cards=[row for row in rows if row[0].text in _FIRST or row[0].text == result.main_metric],
        floor=floor_line(result),
        curves=all_curves(result),
        bars=all_bars(result),
        recipe=_recipe_rows(recipe),
        environment=[("device", result.device), *result.versions.items()],
    )


def _recipe_rows(recipe: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return (option, value) of a recipe; a method is one row with its options."""
    rows = [
        (key, "none" if value in (None, []) else str(value))
        for key, value in recipe.items()
        if key != "methods"
    ]
    for entry in recipe.get("methods", ()):
        options = [f"{k}={v}" for k, v in entry.items() if k not in ("method", "version")]
        rows.append((str(entry["method"]), ", ".join(options)))
    return rows
