"""The options that several commands share; nothing here loads a library that takes time."""

from pathlib import Path
from typing import Annotated

import typer

JsonFlag = Annotated[
    bool, typer.Option("--json", help="print one JSON document on stdout and nothing else there")
]
DebugFlag = Annotated[bool, typer.Option("--debug", help="show the traceback of an error")]
RunArgument = Annotated[Path, typer.Argument(metavar="RUN", help="the folder of a finished run")]
ArgumentsOption = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="[RECIPE.yaml] [KEY=VALUE]...",
        help="a recipe file, and options that win over it: batch_size=16, keep_ratio=0.3, or in "
        "full wta_crs.keep_ratio=0.3",
    ),
]
MethodOption = Annotated[
    list[str] | None,
    typer.Option(
        metavar="NAME",
        help="train with this method (repeatable); replaces the recipe's list of methods and keeps "
        "the options given there",
    ),
]
