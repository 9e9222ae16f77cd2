"""Turns a run folder into one HTML page that needs no other file, and PNG plots beside it."""

import base64
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from leantune.core.state import atomic_folder, write_atomic
from leantune.measure import format_bytes
from leantune.report.plots import (
    DARK,
    LIGHT,
    PLOTS,
    block_of,
    figures_of,
    format_number,
    place_in_block,
    plot_figure,
    round_bytes,
    saved_table,
)
from leantune.report.results import EXACT, Results, RunRecord, read_json, read_results

REPORT_FILE = "report.html"
PLOTS_FOLDER = "plots"
RECIPE_FILE = "recipe.json"


@dataclass(frozen=True)
class Cell:
    """One cell of a table.

    Args:
        text: the figure with its unit.
        note: small print beside it: a spread or a difference.
    """

    text: str
    note: str = ""


def write_report(folder: Path) -> Path:
    """Write ``report.html`` and ``plots/*.png`` of a finished run, each whole or not at all.

    Args:
        folder: a run folder with ``metrics.json`` and ``recipe.json``.

    Returns:
        The path of ``report.html``.

    Raises:
        ConfigError: a file is missing, not valid JSON, or not what a run writes.
    """
    folder = Path(folder)
    results = read_results(folder)
    recipe = read_json(folder / RECIPE_FILE)
    images = _draw(results)
    with atomic_folder(folder / PLOTS_FOLDER) as fresh:
        for name, pair in images.items():
            for theme, data in zip((LIGHT, DARK), pair, strict=True):
                (fresh / f"{name}{theme.suffix}.png").write_bytes(data)
    path = folder / REPORT_FILE
    write_atomic(path, _render(results, recipe, images))
    return path


def headline(results: Results) -> tuple[list[str], list[list[Cell]]]:
    """Return the header and one row per run: metrics, memory and time, exact beside methods.

    A column that no run has a figure for is left out.
    """
    names = [results.main_metric]
    for run in results.runs:
        names += [name for name in run.metrics if name not in names]
    columns: list[tuple[str, list[Cell]]] = [("run", [Cell(run.name) for run in results.runs])]
    for name in names:
        columns.append((name, [_metric(results, run, name) for run in results.runs]))
    columns += [
        ("saved activations", [_saved(results, run) for run in results.runs]),
        ("peak", [Cell(_bytes(run.peak_bytes)) for run in results.runs]),
        ("step time", [_step_time(run) for run in results.runs]),
        ("ratio to exact", [_time_ratio(run) for run in results.runs]),
        ("tokens/s", [Cell(_number(run.tokens_per_second)) for run in results.runs]),
        ("training", [Cell(_duration(run.train_seconds)) for run in results.runs]),
    ]
    shown = [(title, cells) for title, cells in columns if any(cell.text for cell in cells)]
    rows = [[cells[i] for _, cells in shown] for i in range(len(results.runs))]
    return [title for title, _ in shown], rows


def baseline_line(results: Results) -> str:
    """Return the score that needs no learning as a sentence, or an empty string."""
    if results.baseline is None:
        return ""
    name, value = results.baseline
    return f"{name} baseline: {results.main_metric} {value:.4f}"


def _metric(results: Results, run: RunRecord, name: str) -> Cell:
    value, exact = run.metrics.get(name), results.exact
    if value is None:
        return Cell("")
    reference = exact.metrics.get(name) if exact is not None and exact is not run else None
    return Cell(f"{value:.4f}", "" if reference is None else f"{value - reference:+.4f}")


def _saved(results: Results, run: RunRecord) -> Cell:
    ratio = results.saved_ratio(run) if run.name != EXACT else None
    return Cell(_bytes(run.saved_bytes), "" if ratio is None else f"{ratio:.3f} of exact")


def _step_time(run: RunRecord) -> Cell:
    return Cell("" if run.step_ms is None else f"{run.step_ms:.1f} ms")


def _time_ratio(run: RunRecord) -> Cell:
    if run.step_time_ratio is None or run.name == EXACT:
        return Cell("")
    spread = run.step_time_ratio_spread
    note = "" if spread is None else f"{spread[0]:.3f} to {spread[1]:.3f}"
    return Cell(f"{run.step_time_ratio:.3f}", note)


def _bytes(num_bytes: int | None) -> str:
    return "" if num_bytes is None else format_bytes(round_bytes(num_bytes))


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:,.0f}"


def _duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {rest:02d} s"


def _draw(results: Results) -> dict[str, tuple[bytes, bytes]]:
    images = {}
    for name, plot in PLOTS.items():
        light, dark = plot(results, LIGHT), plot(results, DARK)
        if light is not None and dark is not None:
            images[name] = (light, dark)
    for name, (run, figure) in figures_of(results).items():
        light, dark = (plot_figure(results, run, figure, theme) for theme in (LIGHT, DARK))
        images[name] = (light, dark)
    return images


def _figures(results: Results) -> dict[str, dict[str, str]]:
    """Return title and note of each figure, and its numbers in words for who cannot see it."""
    return {
        name: {
            "title": figure.title,
            "note": figure.note,
            "numbers": ", ".join(f"{k} {format_number(v)}" for k, v in figure.values.items()),
        }
        for name, (_, figure) in figures_of(results).items()
    }


def _cards(results: Results) -> list[dict[str, str]]:
    """Return the figures that a reader looks for first, of the first method or else of exact."""
    run = next((run for run in results.runs if run.name != EXACT), results.runs[0])
    score = _metric(results, run, results.main_metric)
    saved, time = _saved(results, run), _time_ratio(run)
    ratio = results.saved_ratio(run) if run.name != EXACT else None
    cards = [{"label": results.main_metric, "value": score.text, "note": _against(results, run)}]
    if ratio is not None and results.exact is not None:
        note = f"{saved.text} instead of {_bytes(results.exact.saved_bytes)}"
        cards.append({"label": "saved activations", "value": f"{ratio:.2f}\u00d7", "note": note})
    elif saved.text:
        cards.append({"label": "saved activations", "value": saved.text, "note": "one step"})
    if time.text:
        note = f"{time.note} of the exact step" if time.note else "of the exact step"
        cards.append(
            {"label": "step time", "value": f"{run.step_time_ratio:.2f}\u00d7", "note": note}
        )
    if run.peak_bytes is not None:
        cards.append({"label": "peak", "value": _bytes(run.peak_bytes), "note": "CUDA allocator"})
    return [card for card in cards if card["value"]]


def _against(results: Results, run: RunRecord) -> str:
    parts = []
    if results.exact is not None and results.exact is not run:
        parts.append(f"exact {_metric(results, results.exact, results.main_metric).text}")
    if results.baseline is not None:
        parts.append(f"{results.baseline[0]} {results.baseline[1]:.4f}")
    return ", ".join(parts)


def _saved_rows(results: Results) -> list[dict[str, Any]]:
    """Return the tables behind the bar plots: title and rows of (name, sizes, ratio)."""
    keys = (
        ("saved-by-block", lambda entry: block_of(entry["module"]), False),
        ("saved-by-module", lambda entry: place_in_block(entry["module"]), True),
        ("saved-by-kind", lambda entry: entry["kind"], True),
    )
    tables = []
    for name, key, by_size in keys:
        rows = saved_table(results, key, by_size=by_size)
        cells = [
            (row, [_bytes(size) for size in sizes], _row_ratio(results, sizes))
            for row, sizes in rows.items()
        ]
        tables.append({"plot": name, "rows": cells})
    return tables


def _row_ratio(results: Results, sizes: list[int]) -> str:
    if len(sizes) != 2 or results.runs[0].name != EXACT or not sizes[0]:
        return ""
    return f"{sizes[1] / sizes[0]:.3f}"


def _render(
    results: Results, recipe: Mapping[str, Any], images: Mapping[str, tuple[bytes, bytes]]
) -> str:
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("leantune.report", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    header, rows = headline(results)
    return environment.get_template("template.html").render(
        results=results,
        header=header,
        rows=rows,
        cards=_cards(results),
        baseline=baseline_line(results),
        images={
            name: {"light": _data_uri(light), "dark": _data_uri(dark)}
            for name, (light, dark) in images.items()
        },
        figures=_figures(results),
        tables={table["plot"]: table["rows"] for table in _saved_rows(results)},
        has_ratio=len(results.runs) == 2 and results.runs[0].name == EXACT,
        recipe=_recipe_rows(recipe),
        environment=_environment_rows(results),
    )


def _data_uri(png: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(png).decode()


def _recipe_rows(recipe: Any) -> list[tuple[str, str]]:
    """Return (option, value) of a recipe; a method is one row with its options."""
    if not isinstance(recipe, Mapping):
        return [("recipe", str(recipe))]
    rows = []
    for key, value in recipe.items():
        if key != "methods":
            rows.append((key, "" if value is None else str(value)))
    for entry in recipe.get("methods") or ():
        options = [f"{k}={v}" for k, v in entry.items() if k not in ("method", "version")]
        rows.append((str(entry["method"]), ", ".join(options) or "defaults"))
    return rows


def _environment_rows(results: Results) -> list[tuple[str, str]]:
    return [
        ("device", results.device),
        ("leantune", results.leantune),
        *((name, str(version)) for name, version in results.versions.items()),
    ]
