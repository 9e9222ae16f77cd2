"""``leantune evaluate``: a finished run's model, scored again on its own or on other data."""

import contextlib
import sys
from typing import Annotated

import typer
from rich.markup import escape

from leantune.cli.options import DebugFlag, JsonFlag, RunArgument
from leantune.cli.output import hide_loading_bars, note, print_figures, print_json, reported_errors


def evaluate(
    run: RunArgument,
    arguments: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[KEY=VALUE]...",
            help="data=FILE (all its rows), or a folder or hub data set with a validation split; "
            "eval_batch_size, max_validation, score_answers; what is left out is the run's own",
            show_default=False,
        ),
    ] = None,
    json: JsonFlag = False,
    debug: DebugFlag = False,
) -> None:
    """Score a finished run's model by the metrics of its training, on its or on other data."""
    with reported_errors(debug):
        note(f"loading {run}: torch and transformers")
        hide_loading_bars(str(run))
        with contextlib.redirect_stdout(sys.stderr):
            import leantune
            from leantune.cli.recipe import build_recipe
            from leantune.core.recipe import RECIPE_FILE
            from leantune.training.recipe import RunRecipe
            from leantune.training.results import RunResult

            pairs = arguments or []
            recipe = build_recipe(RunRecipe, [str(run / RECIPE_FILE), *pairs], [])
            given = [pair.partition("=")[0].replace("-", "_") for pair in pairs]
            options = {name: getattr(recipe, name, None) for name in given}
            found = leantune.evaluate(run, **options)
            trained = RunResult.read(run).runs[-1].metrics
        if json:
            print_json({"run": str(run), **found})
            return
        title = f"{escape(str(run))} on {found['num_rows']} rows of {escape(found['data'])}"
        rows = [
            [escape(name), f"{value:.4f}", f"{trained[name]:.4f}" if name in trained else "-"]
            for name, value in found["metrics"].items()
        ]
        print_figures(title, ("", "now", "after training"), rows)
