"""The commands by name; ``--help`` and ``--version`` load none of the machinery."""

from typing import Annotated

import typer

from leantune._version import __version__
from leantune.cli.compare import compare
from leantune.cli.environment import env
from leantune.cli.evaluate import evaluate
from leantune.cli.fidelity import fidelity
from leantune.cli.init import init
from leantune.cli.measure import measure
from leantune.cli.merge import merge
from leantune.cli.methods import methods
from leantune.cli.plan import plan
from leantune.cli.predict import predict
from leantune.cli.sites import sites
from leantune.cli.train import train

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_show_locals=False,
)
for _command in (
    *(init, train, evaluate, predict, compare, merge),
    *(plan, measure, fidelity, sites, methods, env),
):
    app.command()(_command)


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"leantune {__version__}")
        raise typer.Exit


@app.callback()
def leantune(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_show_version, is_eager=True, help="show the version"),
    ] = False,
) -> None:
    """Fine-tune transformers with less memory and less compute."""
