"""The commands and their options; ``--help`` and ``--version`` load none of the machinery."""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable
from importlib import metadata
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

_COMMANDS = {
    "train": ("leantune.cli.train:train", "Fine-tune a model by a recipe."),
    "measure": (
        "leantune.cli.measure:measure",
        "Count the bytes that one training step keeps, exact and with methods.",
    ),
    "methods": ("leantune.cli.methods:methods", "List the methods, or the options of one."),
    "merge": (
        "leantune.cli.merge:merge",
        "Turn a base model and a saved session into a plain checkpoint.",
    ),
    "env": ("leantune.cli.environment:env", "Show versions and devices."),
}
_WITH_FLAGS = {"train", "measure"}


class _LazyGroup(TyperGroup):
    """Builds a command when it is called: the flags of some come from the configs."""

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        if args and args[0] in _COMMANDS:
            self.commands[args[0]] = _build(args[0])
        return super().resolve_command(ctx, args)


def _build(name: str) -> Any:
    module, _, function = _COMMANDS[name][0].partition(":")
    command: Callable[..., None] = getattr(importlib.import_module(module), function)
    if name in _WITH_FLAGS:
        from leantune.cli.options import with_flags

        command = with_flags(command)
    single = typer.Typer(add_completion=False, rich_markup_mode="rich")
    single.command(name)(command)
    return typer.main.get_command(single)


def _listed(summary: str) -> Callable[[], None]:
    def placeholder() -> None:
        raise AssertionError("replaced when it is called")

    placeholder.__doc__ = summary
    return placeholder


app = typer.Typer(
    cls=_LazyGroup,
    add_completion=False,
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_show_locals=False,
)
for _name, (_, _summary) in _COMMANDS.items():
    app.command(_name)(_listed(_summary))


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"leantune {metadata.version('leantune')}")
        raise typer.Exit


@app.callback()
def leantune(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_show_version, is_eager=True, help="show the version"),
    ] = False,
) -> None:
    """Fine-tune transformers with less memory and less compute."""


def main() -> None:
    """Run the command line; the entry point of the ``leantune`` script."""
    # A new head, which every fine-tuning has, is no news; the user's own setting wins.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    app(prog_name="leantune")
