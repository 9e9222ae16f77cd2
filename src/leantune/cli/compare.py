"""``leantune compare``: one table of finished runs, seeds with their standard error."""

import json as json_module
import math
import os
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape

from leantune.cli.options import DebugFlag, JsonFlag
from leantune.cli.output import print_figures, print_json, reported_errors
from leantune.errors import ConfigError
from leantune.measure.text import format_bytes

_FIGURES = ("loss", "saved_bytes", "step_time_ratio", "train_seconds", "peak_bytes")
_OF_A_START = ("seed", "output", "methods", "compare")


def compare(
    runs: Annotated[
        list[Path],
        typer.Argument(metavar="RUN...", help="folders of finished runs, or of their seeds"),
    ],
    json: JsonFlag = False,
    debug: DebugFlag = False,
) -> None:
    """Compare finished runs; those that differ in the seed alone share a row with their mean."""
    with reported_errors(debug):
        print_comparison(compare_runs(runs), json)


def compare_runs(folders: Sequence[Path]) -> list[dict[str, Any]]:
    """Return a row for each variant of the runs, with the mean and standard error over its seeds.

    Args:
        folders: of runs, or those in which ``leantune train --seeds`` put them.

    Raises:
        ConfigError: a folder holds no finished run, or runs are judged by different metrics.
    """
    from leantune.core.disk import read_json
    from leantune.core.recipe import RECIPE_FILE
    from leantune.training.results import RunResult, VariantResult

    runs = [run for folder in folders for run in sorted(folder.glob("seed-*")) or [folder]]
    groups: dict[str, dict[int, tuple[Path, VariantResult]]] = {}
    metrics: dict[str, Path] = {}
    for run in runs:
        result, recipe = RunResult.read(run), read_json(run / RECIPE_FILE)
        metrics.setdefault(result.main_metric, run)
        shared = {name: value for name, value in recipe.items() if name not in _OF_A_START}
        for variant in result.runs:
            key = json_module.dumps([variant.name, variant.methods, shared], sort_keys=True)
            # A rival that several runs train with one seed is the same training.
            groups.setdefault(key, {}).setdefault(result.seed, (run, variant))
    if len(metrics) > 1:
        found = " and ".join(f"{name} ({run})" for name, run in metrics.items())
        raise ConfigError(f"compare: runs must be judged by one metric, got {found}; choose others")
    return [_row(next(iter(metrics)), seeds) for seeds in groups.values()]


def _row(main_metric: str, seeds: Mapping[int, tuple[Path, Any]]) -> dict[str, Any]:
    folders, variants = zip(*seeds.values(), strict=True)
    row: dict[str, Any] = {
        "name": variants[0].name,
        "runs": [str(folder) for folder in folders],
        "seeds": [*seeds],
    }
    for name in (main_metric, *_FIGURES):
        values = [v.metrics.get(name, getattr(v, name, None)) for v in variants]
        row[name] = None if None in values else _mean(values)
    return row


def _mean(values: Sequence[float]) -> dict[str, float | None]:
    error = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None
    return {"mean": statistics.fmean(values), "standard_error": error}


def print_comparison(rows: Sequence[Mapping[str, Any]], as_json: bool) -> None:
    """Print what ``compare_runs`` returned, as a table or as JSON."""
    if as_json:
        print_json({"rows": rows})
        return
    names = [name for name in [*rows[0]][3:] if any(row[name] for row in rows)]
    cells: list[list[str]] = []
    for row in rows:
        place, num = os.path.commonpath(row["runs"]), len(row["seeds"])
        head = f"{escape(row['name'])}\n[dim]{escape(place)}[/]"
        cells.append([head, str(num), *(_cell(name, row[name]) for name in names)])
    header = ["", "seeds", *(name.removesuffix("_bytes").replace("_", " ") for name in names)]
    print_figures("Runs, mean \u00b1 standard error over their seeds", header, cells)


def _cell(name: str, found: Mapping[str, Any] | None) -> str:
    if found is None:
        return "-"

    def show(value: float) -> str:
        return format_bytes(value) if name.endswith("_bytes") else f"{value:.4f}"

    error = found["standard_error"]
    return show(found["mean"]) + (f" \u00b1 {show(error)}" if error else "")
