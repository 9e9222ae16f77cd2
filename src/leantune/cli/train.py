"""``leantune train``: one recipe to a trained model, its results and its report."""

import shlex
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape

from leantune.cli.compare import compare_runs, print_comparison
from leantune.cli.options import ArgumentsOption, DebugFlag, JsonFlag, MethodOption
from leantune.cli.output import (
    err,
    exit_code,
    loading,
    note,
    out,
    print_figures,
    print_json,
    reported_errors,
)
from leantune.errors import ConfigError
from leantune.training.interrupt import end_process, handled_by

BudgetOption = Annotated[
    str | None,
    typer.Option(
        metavar="SIZE",
        help="memory that a step may take, such as 22GiB: the planner adds what makes it fit",
    ),
]
SeedsOption = Annotated[
    str | None,
    typer.Option(
        metavar="0,1,2",
        help="train with each of these seeds, in OUTPUT/seed-0 and so on, and compare",
    ),
]
DryRunFlag = Annotated[
    bool,
    typer.Option(
        "--dry-run", help="check and measure everything, print the table, and write nothing"
    ),
]
ResumeOption = Annotated[
    str | None,
    typer.Option(
        metavar="CHECKPOINT",
        help="go on from this checkpoint of the run, such as checkpoint-60",
    ),
]


def train(
    arguments: ArgumentsOption = None,
    method: MethodOption = None,
    budget: BudgetOption = None,
    resume_from: ResumeOption = None,
    seeds: SeedsOption = None,
    dry_run: DryRunFlag = False,
    json: JsonFlag = False,
    debug: DebugFlag = False,
) -> None:
    """Fine-tune a model by a recipe; write the model, metrics.json and report.html.

    leantune train task=text data=DATA model=demo output=runs/one --method wta_crs compare=baseline
    """
    with reported_errors(debug):
        note("loading torch")
        with handled_by(end_process):
            from leantune.cli.recipe import build_recipe, with_seeds
            from leantune.core.extras import require
            from leantune.training.recipe import RunRecipe

        given = {"budget": budget, "resume_from": resume_from}
        pairs = [f"{name}={value}" for name, value in given.items() if value]
        recipe = build_recipe(RunRecipe, [*(arguments or []), *pairs], method or [])
        require("jinja2", extra="report", who="leantune train")
        recipes = [recipe] if seeds is None else with_seeds(recipe, seeds)
        if dry_run and len(recipes) > 1:
            raise ConfigError(
                f"train: seeds must be one with --dry-run, got {seeds}; steps of all are alike"
            )
        written: dict[str, Path] = {}
        doing = f"training {', '.join(recipe.variants())}: loading transformers"
        with loading(recipe.model, doing):
            with handled_by(end_process):
                import leantune
                from leantune.core.distributed import is_first_process

                train_recipe = leantune.train

            for recipe in recipes:
                folder = Path(recipe.output)
                try:
                    result = train_recipe(recipe, dry_run=dry_run)
                except KeyboardInterrupt as stop:
                    if is_first_process():
                        err().print(_interrupted(folder, recipe, seeds), soft_wrap=True)
                    raise typer.Exit(exit_code(stop)) from None
                if is_first_process() and not dry_run:
                    from leantune.report.page import write_report

                    written = {"output": folder, "report": write_report(folder)}
        if not is_first_process():
            return
        if seeds is not None and not dry_run:
            print_comparison(compare_runs([Path(recipe.output) for recipe in recipes]), json)
        else:
            _print_results(result, json, **written)


def _print_results(
    result: Any, as_json: bool, output: Path | None = None, report: Path | None = None
) -> None:
    if as_json:
        written = {} if output is None else {"output": str(output), "report": str(report)}
        # The ledgers' entries, one for each tensor, are in metrics.json.
        runs = [{**vars(run), "ledger": run.held_bytes} for run in result.runs]
        print_json({**result.to_dict(), **written, "runs": runs})
        return
    from leantune.report.page import floor_line, headline

    header, rows = headline(result)
    cells = [[_cell(cell.text or "-", cell.note) for cell in row] for row in rows]
    print_figures(escape(f"{result.task} on {result.model}"), header, cells)
    console = out()
    if floor := floor_line(result):
        console.print(escape(floor), soft_wrap=True)
    if output is None:
        console.print("nothing was trained or written; training: the steps alone", soft_wrap=True)
        return
    # Without a dense equivalent there is no plain model; something goes onto the base.
    kept = next(name for name in ("model", "adapter", "session") if (output / name).is_dir())
    console.print(f"{kept:7} {escape(str(output / kept))}", soft_wrap=True)
    console.print(f"report  {escape(str(report))}", soft_wrap=True)


def _cell(text: str, note: str) -> str:
    return escape(text) + (f"\n[dim]{escape(note)}[/]" if note else "")


def _interrupted(folder: Path, recipe: Any, seeds: str | None) -> str:
    """Say which checkpoint an interrupted run has kept and how to go on from it."""
    from leantune.core.manifest import MANIFEST_FILE
    from leantune.training.results import METRICS_FILE

    kept = [path.parent for path in folder.glob(f"checkpoints*/checkpoint-*/{MANIFEST_FILE}")]
    if not kept:
        return "[yellow]interrupted[/] before the first checkpoint; nothing was kept"
    last = max(kept, key=lambda path: (path.stat().st_mtime, int(path.name.partition("-")[2])))
    command = f"leantune train {shlex.quote(str(folder / 'recipe.json'))} resume=true"
    if (folder / METRICS_FILE).is_file():
        # The folder's recipe is still that of the shorter run.
        name = "max_steps" if recipe.max_steps else "epochs"
        command += f" {name}={getattr(recipe, name)}"
    if seeds is not None:
        command += f" output={shlex.quote(str(folder.parent))} --seeds {shlex.quote(seeds)}"
    return (
        f"[yellow]interrupted[/] checkpoint kept: {escape(str(last))}; resume with: "
        f"{escape(command)}"
    )
