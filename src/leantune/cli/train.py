"""``leantune train``: one recipe to a trained model, its figures and its report."""

from __future__ import annotations

import contextlib
import re
import shlex
import sys
from pathlib import Path
from typing import Annotated, Any

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
from leantune.cli.recipe import Setting, build_config, split_arguments

Arguments = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="[RECIPE.yaml] [KEY=VALUE]...",
        help="a recipe file, and options that win over it: batch_size=16, keep_ratio=0.3, or in "
        "full wta_crs.keep_ratio=0.3",
        show_default=False,
    ),
]
MethodFlag = Annotated[
    list[str] | None,
    typer.Option(
        "--method",
        metavar="NAME",
        help="train with this method (repeatable); replaces the recipe's list of methods and keeps "
        "the options given there; none at all is exact training",
        show_default=False,
    ),
]


def train(
    arguments: Arguments = None,
    method: MethodFlag = None,
    json: JsonFlag = False,
    debug: DebugFlag = False,
    settings: list[Setting] = [],  # noqa: B006 (replaced by the generated flags)
) -> None:
    """Fine-tune a model by a recipe; write the model, metrics.json and report.html.

    leantune train --task demo --model demo --method wta_crs --compare exact --output runs/demo
    """
    with reported_errors(debug):
        recipe, pairs = split_arguments(arguments or [])
        config = build_config(recipe, [*pairs, *settings], method or [])
        folder = Path(config.output)
        try:
            result = _train(config, err())
        except KeyboardInterrupt:
            err().print(_interrupted(folder), soft_wrap=True)
            raise typer.Exit(INTERRUPTED) from None
        from leantune.report import write_report
        from leantune.report.results import results_from_dict

        document = result.to_dict()
        report = write_report(folder)
        if json:
            print_json(_without_entries(document) | {"output": str(folder), "report": str(report)})
        else:
            _print_results(out(), results_from_dict(document), folder, report)


def _train(config: Any, console: Console) -> Any:
    hide_loading_bars(config.model)
    from leantune.cli.live import LiveCallback, make_progress
    from leantune.train.run import run

    progress = make_progress(console)
    # Stdout belongs to the result: what libraries print on the way goes beside the progress.
    with contextlib.redirect_stdout(sys.stderr):
        try:
            return run(config, callbacks=[LiveCallback(progress, _main_metric(config.task))])
        finally:
            progress.stop()


def _main_metric(task: str) -> str:
    from leantune.train.demo import DEMO_TASK
    from leantune.train.tasks import get_task

    return (DEMO_TASK if task == DEMO_TASK.name else get_task(task)).main_metric


def _print_results(console: Console, results: Any, folder: Path, report: Path) -> None:
    from leantune.report.page import baseline_line, headline

    header, rows = headline(results)
    table = make_table(f"{results.task} on {results.model}", header)
    for row in rows:
        table.add_row(
            *(
                escape(cell.text or "-") + (f"\n[dim]{escape(cell.note)}[/]" if cell.note else "")
                for cell in row
            )
        )
    console.print(table)
    if baseline := baseline_line(results):
        console.print(escape(baseline))
    # Without a dense equivalent there is no plain model; the session goes onto the base.
    kept = "model" if (folder / "model").is_dir() else "session"
    console.print(f"{kept:7} {escape(str(folder / kept))}", soft_wrap=True)
    console.print(f"report  {escape(str(report))}", soft_wrap=True)


def _interrupted(folder: Path) -> str:
    """Say which checkpoint an interrupted run has kept and how to go on from it."""
    kept = sorted(
        (path for path in folder.glob("checkpoints*/checkpoint-*") if path.is_dir()),
        key=lambda path: (path.stat().st_mtime, _step(path)),
    )
    if not kept:
        return "[yellow]interrupted[/] before the first checkpoint; nothing was kept"
    recipe = folder / "recipe.json"
    command = (
        f"leantune train {shlex.quote(str(recipe))} --resume"
        if recipe.is_file()
        else "the command + --resume"
    )
    return (
        f"[yellow]interrupted[/] checkpoint kept: {escape(str(kept[-1]))}; "
        f"resume with: {escape(command)}"
    )


def _step(checkpoint: Path) -> int:
    number = re.search(r"\d+$", checkpoint.name)
    return 0 if number is None else int(number.group())


def _without_entries(document: dict[str, Any]) -> dict[str, Any]:
    """Leave out the ledgers' entries, one per tensor; metrics.json has them."""
    runs = []
    for run in document["runs"]:
        ledger = run["ledger"]
        if ledger is not None:
            ledger = {name: value for name, value in ledger.items() if name != "entries"}
        runs.append({**run, "ledger": ledger})
    return {**document, "runs": runs}
