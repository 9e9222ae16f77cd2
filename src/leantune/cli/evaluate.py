"""``leantune evaluate``: a finished run's model, scored again on its own or on other data."""

from typing import Annotated

import typer
from rich.markup import escape

from leantune.cli.options import DebugFlag, JsonFlag, RunArgument
from leantune.cli.output import loading, print_figures, print_json, reported_errors


def evaluate(
    run: RunArgument,
    arguments: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[KEY=VALUE]...",
            help="data=FILE (all its rows), or a folder or hub data set with a validation split; "
            "eval_batch_size, score_answers; what is left out is the run's own",
        ),
    ] = None,
    json: JsonFlag = False,
    debug: DebugFlag = False,
) -> None:
    """Score a finished run's model by the metrics of its training, on its or on other data."""
    with reported_errors(debug):
        with loading(str(run), f"loading {run}: torch and transformers"):
            import leantune
            from leantune.cli.recipe import parse_pairs
            from leantune.training.results import RunResult

            found = leantune.evaluate(run, **parse_pairs(arguments or []))
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
