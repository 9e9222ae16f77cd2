"""``leantune init``: a recipe to start from, with every option of a task."""

import dataclasses
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape

from leantune.cli.options import DebugFlag, JsonFlag
from leantune.cli.output import out, print_json, reported_errors
from leantune.errors import ConfigError

_METHODS = """\
# What each method does, and its options: leantune methods
methods:
  - method: checkpoint
  - method: wta_crs
    keep_ratio: 0.1
"""


def init(
    path: Annotated[
        Path | None, typer.Argument(metavar="[PATH]", help="file to write; default: print it")
    ] = None,
    task: Annotated[
        str, typer.Option(help="a GLUE task, text, regression, causal_lm, chat, ...")
    ] = "text",
    json: JsonFlag = False,
    debug: DebugFlag = False,
) -> None:
    """Write a recipe to start from, with every option of a task, its default and its help."""
    with reported_errors(debug):
        text = starting_recipe(task)
        if path is not None:
            if path.exists():
                raise ConfigError(
                    f"init: PATH must be a new file, got {str(path)!r}, which exists; take another"
                )
            from leantune.core.disk import write_atomic

            write_atomic(path, text)
        if json:
            print_json({"path": None if path is None else str(path), "recipe": text})
        elif path is None:
            print(text, end="")
        else:
            command = escape(f"{path}: set data, then: leantune train {path}")
            out().print(command, soft_wrap=True)


def starting_recipe(task: str) -> str:
    """Return a YAML recipe whose lines are set, or comments that hold a default.

    Raises:
        ConfigError: no such task.
    """
    from leantune.core.recipe import FORMAT
    from leantune.training.data import get_task
    from leantune.training.recipe import ONLY_FOR, RunRecipe

    model = "demo-llm" if get_task(task).is_language_model else "demo"
    chosen = {"model": model, "task": task, "data": "data", "output": f"runs/{task}"}
    rows = {row["name"]: row for row in RunRecipe.describe()}
    others = [
        row
        for name, row in rows.items()
        if name not in {*chosen, *RunRecipe.not_saved, "methods"}
        and task in ONLY_FOR.get(name, (task,))
    ]
    lines = [f"format: {FORMAT}", *(_line(rows[name], chosen[name]) for name in chosen)]
    lines += ["", _METHODS, "# Below are the defaults: take away a # to change one."]
    lines += ["# " + _line(row, row["default"]) for row in others]
    return "\n".join(lines) + "\n"


def _line(row: dict[str, Any], value: Any) -> str:
    import json

    # JSON is YAML, too.
    text = value if isinstance(value, str) else json.dumps(value)
    rule = "" if row["default"] is dataclasses.MISSING else f"; {row['rule']}"
    return f"{row['name'] + ': ' + text:34}  # {row['help']}{rule}"
