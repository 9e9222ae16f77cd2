"""What the commands print: one JSON document or tables on stdout, everything else on stderr."""

import json
import math
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from leantune.errors import LeantuneError

BAD_INPUT = 2
INTERRUPTED = 130

JsonFlag = Annotated[
    bool, typer.Option("--json", help="print one JSON document on stdout and nothing else there")
]
DebugFlag = Annotated[bool, typer.Option("--debug", help="show the traceback of an error")]


def out() -> Console:
    """Return a console on the current stdout; narrow pipes do not cut tables short."""
    return _console(sys.stdout)


def err() -> Console:
    """Return a console on the current stderr."""
    return _console(sys.stderr)


def _console(stream: Any) -> Console:
    console = Console(file=stream, highlight=False)
    if not console.is_terminal:
        console.width = max(console.width, 140)
    return console


@contextmanager
def reported_errors(debug: bool) -> Iterator[None]:
    """Turn what a user can cause into one message on stderr and exit code 2 (130 for Ctrl-C).

    Args:
        debug: let the exception through instead.
    """
    try:
        yield
    except KeyboardInterrupt:
        if debug:
            raise
        err().print("[yellow]interrupted[/]")
        raise typer.Exit(INTERRUPTED) from None
    except (LeantuneError, OSError) as error:
        if debug:
            raise
        err().print(f"[bold red]error[/] {escape(str(error))}", soft_wrap=True)
        raise typer.Exit(BAD_INPUT) from None


def hide_loading_bars(model: str) -> None:
    """Keep the libraries' own bars off the screen, unless a model may have to be downloaded.

    Has an effect before transformers is imported; a setting of the user's wins.
    """
    if model == "demo" or Path(model).exists():
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")


def print_json(document: Mapping[str, Any] | Sequence[Any]) -> None:
    """Print one strict JSON document on stdout; numbers that JSON lacks (NaN) become null."""
    sys.stdout.write(json.dumps(_strict(document), indent=2) + "\n")


def make_table(title: str, header: Sequence[str], *, left: int = 1) -> Table:
    """Return an empty table: the first ``left`` columns to the left, numbers to the right."""
    table = Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD)
    for position, name in enumerate(header):
        is_text = position < left
        table.add_column(
            escape(name),
            justify="left" if is_text else "right",
            no_wrap=not is_text,
            overflow="fold" if is_text else "ellipsis",
        )
    return table


def _strict(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _strict(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_strict(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
