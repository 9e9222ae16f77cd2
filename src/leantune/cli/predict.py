"""``leantune predict``: what a finished run's model makes of the rows of a file."""

import contextlib
import json as json_module
import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape

from leantune.cli.options import DebugFlag, JsonFlag, RunArgument
from leantune.cli.output import hide_loading_bars, note, out, print_json, reported_errors
from leantune.errors import ConfigError


def predict(
    run: RunArgument,
    data: Annotated[
        Path, typer.Option("--data", metavar="FILE", help="rows; they need no labels or answers")
    ],
    output: Annotated[
        Path, typer.Option("--output", metavar="FILE.jsonl", help="a line of JSON for each row")
    ],
    max_new_tokens: Annotated[
        int,
        typer.Option("--max-new-tokens", min=1, help="chat: where an answer ends at the latest"),
    ] = 256,
    batch_size: Annotated[
        int | None,
        typer.Option(
            "--batch-size", min=1, help="rows at once; default: the run's", show_default=False
        ),
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="replace the output file")] = False,
    json: JsonFlag = False,
    debug: DebugFlag = False,
) -> None:
    """Write the class with its probability, the value, the loss or the answer for each row."""
    with reported_errors(debug):
        if output.exists() and (not overwrite or (data.exists() and output.samefile(data))):
            raise ConfigError(
                f"predict: output must be a new file, got {str(output)!r}, which exists; choose "
                "another, or give --overwrite to replace what is not the data"
            )
        note(f"loading {run}: torch and transformers")
        hide_loading_bars(str(run))
        with contextlib.redirect_stdout(sys.stderr):
            import leantune
            from leantune.core.disk import check_writable, write_atomic

            check_writable(output.parent)
            size = {"batch_size": batch_size, "max_new_tokens": max_new_tokens}
            found = leantune.predict(run, data, **size)
            lines = [json_module.dumps(row, ensure_ascii=False) + "\n" for row in found]
            write_atomic(output, "".join(lines))
        if json:
            print_json({"run": str(run), "output": str(output), "num_rows": len(found)})
        else:
            out().print(escape(f"{output}: {len(found)} rows"), soft_wrap=True)
