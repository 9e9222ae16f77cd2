"""``leantune merge``: a base model and a saved session become one plain checkpoint."""

from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape

from leantune.cli.options import DebugFlag, JsonFlag
from leantune.cli.output import loading, out, print_json, reported_errors


def merge(
    source: Annotated[
        Path,
        typer.Argument(
            metavar="RUN_OR_SESSION", help="a run folder, or a folder that session.save wrote"
        ),
    ],
    output: Annotated[Path, typer.Argument(metavar="OUTPUT", help="folder of the new checkpoint")],
    model: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="the base model: a folder, a hub name, or demo; default: the run's own",
        ),
    ] = None,
    overwrite: Annotated[
        bool,
        typer.Option("--overwrite", help="replace OUTPUT where it is a model that leantune wrote"),
    ] = False,
    json: JsonFlag = False,
    debug: DebugFlag = False,
) -> None:
    """Write a checkpoint that loads without leantune: the base model with what was trained."""
    with reported_errors(debug):
        with loading(model or str(source)):
            import leantune

            methods = leantune.merge_checkpoint(source, output, model, overwrite=overwrite)
        if json:
            print_json({"output": str(output), "methods": methods})
        else:
            message = f"{output}: {', '.join(methods)} merged; loads with from_pretrained"
            out().print(escape(message), soft_wrap=True)
