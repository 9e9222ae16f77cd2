"""``leantune predict``: what a finished run's model makes of the rows of a file."""

import json as json_module
from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape

from leantune.cli.options import DebugFlag, JsonFlag, RunArgument
from leantune.cli.output import loading, out, print_json, reported_errors
from leantune.errors import ConfigError


def predict(
    run: RunArgument,
    data: Annotated[
        Path, typer.Option(metavar="FILE", help="rows; they need no labels or answers")
    ],
    output: Annotated[Path, typer.Option(metavar="FILE.jsonl", help="a line of JSON for each row")],
    max_new_tokens: Annotated[
        int, typer.Option(min=1, help="chat: where an answer ends at the latest")
    ] = 256,
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
        with loading(str(run), f"loading {run}: torch and transformers"):
            import leantune
            from leantune.core.disk import check_writable, write_atomic

            check_writable(output.parent)
            found = leantune.predict(run, data, max_new_tokens=max_new_tokens)
            lines = [json_module.dumps(row, ensure_ascii=False) + "\n" for row in found]
            write_atomic(output, "".join(lines))
        if json:
            print_json({"run": str(run), "output": str(output), "num_rows": len(found)})
        else:
            out().print(escape(f"{output}: {len(found)} rows"), soft_wrap=True)
