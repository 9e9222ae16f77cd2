"""What the commands print: one JSON document or tables on stdout, everything else on stderr."""

import json
import math
import os
import signal
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import Any

import typer
from rich import box
from rich.cells import cell_len
from rich.console import Console
from rich.markup import escape, render
from rich.table import Table

from leantune.errors import ConfigError, LeantuneError

FAILED = 1
BAD_INPUT = 2


def out() -> Console:
    """Return a console on the current stdout; narrow pipes do not cut tables short."""
    return _console(sys.stdout)


def err() -> Console:
    """Return a console on the current stderr."""
    return _console(sys.stderr)


def _console(stream: Any) -> Console:
    console = Console(file=stream, highlight=False)
    if not console.is_terminal and "COLUMNS" not in os.environ:
        console.width = max(console.width, 140)
    return console


def note(text: str) -> None:
    """Say on stderr what is going on; of several processes the launcher's first one alone does."""
    if _process() == "0":
        err().print(escape(text), soft_wrap=True)


def _process() -> str:
    # Asking torch would take the seconds that a note is to explain.
    return os.environ.get("RANK", "0")


@contextmanager
def reported_errors(debug: bool) -> Iterator[None]:
    """Turn what a user can cause into one message on stderr and an exit code.

    The code is 2 for what was asked for (an option, a recipe, data, a model), 1 for everything else
    that has a name, 128 + n for a signal.

    Args:
        debug: let the exception through instead.
    """
    try:
        yield
    except KeyboardInterrupt as stop:
        if debug:
            raise
        err().print("[yellow]interrupted[/]")
        raise typer.Exit(exit_code(stop)) from None
    except BrokenPipeError:
        # Whoever read the output has seen enough; Typer ends without a word.
        raise
    except (LeantuneError, OSError) as error:
        if debug:
            raise
        where = "" if _process() == "0" else f"(process {_process()}) "
        err().print(f"[bold red]error[/] {where}{escape(str(error))}", soft_wrap=True)
        raise typer.Exit(BAD_INPUT if isinstance(error, ConfigError) else FAILED) from None


def exit_code(stop: KeyboardInterrupt) -> int:
    """Return what a command that a signal has ended says to its shell; Ctrl-C is SIGINT."""
    return 128 + getattr(stop, "number", signal.SIGINT)


@contextmanager
def loading(model: str, doing: str | None = None) -> Iterator[None]:
    """Say what is going on, and leave stdout to the result: what libraries print goes to stderr.

    Their own bars stay out of logs, and off the screen unless a model is downloaded. This has an
    effect before transformers is imported; a setting of the user's wins.
    """
    if doing is not None:
        note(doing)
    if model in ("demo", "demo-llm") or Path(model).exists() or not sys.stderr.isatty():
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    with redirect_stdout(sys.stderr):
        yield


def print_json(document: Mapping[str, Any] | Sequence[Any]) -> None:
    """Print one strict JSON document on stdout; numbers that JSON lacks (NaN) become null."""
    print(json.dumps(_strict(document), indent=2))


def print_text(title: str, header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print a table of words, which wrap; the first column keeps its width, up to half of all."""
    console, table = out(), _table(title)
    widest = max(_width(row[0]) for row in [header, *rows])
    table.add_column(header[0], width=min(widest, console.width // 2), overflow="fold")
    for name in header[1:]:
        table.add_column(name, overflow="fold")
    for row in rows:
        table.add_row(*row)
    console.print(table)


def print_figures(title: str, header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print a table of numbers, none of which is cut, with names in its first column.

    Columns for which a narrow screen has no room come in further tables below, with those names.
    """
    console, header = out(), [escape(name) for name in header]
    widths = [max(map(_width, column)) + 2 for column in zip(header, *rows, strict=True)]
    names = min(widths[0], console.width // 2)
    groups: list[list[int]] = [[]]
    for column in range(1, len(header)):
        if groups[-1] and names + sum(widths[c] for c in [*groups[-1], column]) > console.width - 2:
            groups.append([])
        groups[-1].append(column)
    for group in groups:
        table = _table(title if group is groups[0] else None)
        table.add_column(header[0], overflow="fold", min_width=names - 2)
        for column in group:
            table.add_column(header[column], justify="right", no_wrap=True)
        for row in rows:
            table.add_row(row[0], *(row[column] for column in group))
        console.print(table)


def _table(title: str | None) -> Table:
    return Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD)


def _width(cell: str) -> int:
    return max(cell_len(line) for line in render(cell).plain.split("\n"))


def _strict(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _strict(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_strict(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
