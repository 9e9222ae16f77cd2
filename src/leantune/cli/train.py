"""``leantune train``: one recipe to a trained model, its results and its report."""

import contextlib
import shlex
import sys
from pathlib import Path
from typing import Any

import typer
from rich.console import Console
from rich.markup import escape

from leantune.cli.output import (
    INTERRUPTED,
    DebugFlag,
    JsonFlag,
    err,
    hide_loading_bars,
    make_table,
    out,
    print_json,
    reported_errors,
)
from leantune.cli.recipe import ArgumentsOption, MethodOption, build_recipe
from leantune.core.extras import require
from leantune.training.recipe import RunRecipe


def train(
    arguments: ArgumentsOption = None,
    method: MethodOption = None,
    json: JsonFlag = False,
    debug: DebugFlag = False,
) -> None:
    """Fine-tune a model by a recipe; write the model, metrics.json and report.html.

    leantune train task=text data=DATA model=demo output=runs/one --method wta_crs compare=baseline
    """
    with reported_errors(debug):
        recipe = build_recipe(RunRecipe, arguments or [], method or [])
        for package in ("matplotlib", "jinja2"):
            require(package, extra="report", who="leantune train")
        folder = Path(recipe.output)
        try:
            result = _train(recipe, err())
        except KeyboardInterrupt:
            err().print(_interrupted(folder), soft_wrap=True)
            raise typer.Exit(INTERRUPTED) from None
        from leantune.report.page import write_report

        report = write_report(folder)
        if json:
            document = result.to_dict()
            # The ledgers' entries, one for each tensor, are in metrics.json.
            runs = [{k: v for k, v in run.items() if k != "ledger"} for run in document["runs"]]
            print_json({**document, "runs": runs, "output": str(folder), "report": str(report)})
        else:
            _print_results(out(), result, folder, report)


def _train(recipe: RunRecipe, console: Console) -> Any:
    hide_loading_bars(recipe.model)
    import leantune

    console.print(f"training {escape(', '.join(recipe.variants()))}")
    # Stdout belongs to the result: the trainer's progress and its log go elsewhere.
    with contextlib.redirect_stdout(sys.stderr):
        return leantune.train(recipe)


def _print_results(console: Console, result: Any, folder: Path, report: Path) -> None:
    from leantune.report.page import floor_line, headline

    header, rows = headline(result)
    table = make_table(f"{result.task} on {result.model}", header)
    for row in rows:
        cells = [(escape(cell.text or "-"), escape(cell.note)) for cell in row]
        table.add_row(*(text + (f"\n[dim]{note}[/]" if note else "") for text, note in cells))
    console.print(table)
    if floor := floor_line(result):
        console.print(escape(floor))
    # Without a dense equivalent there is no plain model; the session goes onto the base.
    kept = "model" if (folder / "model").is_dir() else "session"
    console.print(f"{kept:7} {escape(str(folder / kept))}", soft_wrap=True)
    console.print(f"report  {escape(str(report))}", soft_wrap=True)


def _interrupted(folder: Path) -> str:
    """Say which checkpoint an interrupted run has kept and how to go on from it."""
    kept = [path for path in folder.glob("checkpoints*/checkpoint-*") if path.is_dir()]
    if not kept:
        return "[yellow]interrupted[/] before the first checkpoint; nothing was kept"
    last = max(kept, key=lambda path: (path.stat().st_mtime, int(path.name.partition("-")[2])))
    command = f"leantune train {shlex.quote(str(folder / 'recipe.json'))} resume=true"
    return (
        f"[yellow]interrupted[/] checkpoint kept: {escape(str(last))}; resume with: "
        f"{escape(command)}"
    )
