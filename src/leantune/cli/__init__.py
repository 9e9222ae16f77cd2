"""The command ``leantune``; each command's machinery is imported when it runs."""

import io
import os
import sys

from leantune.core.extras import require
from leantune.errors import UnsupportedError


def main() -> None:
    """Run the command line; the entry point of the ``leantune`` script."""
    try:
        _main()
    except KeyboardInterrupt:
        # While the machinery was imported, before a command had begun.
        sys.stderr.write("interrupted\n")
        sys.exit(130)


def _main() -> None:
    try:
        for package in ("typer", "rich", "yaml"):
            require(package, extra="cli", who="leantune")
    except UnsupportedError as error:
        sys.exit(f"error {error}")
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            # A name that the screen has no letters for is no reason to fail.
            stream.reconfigure(errors="backslashreplace")
    # A new head, which every fine-tuning has, is no news; the user's own setting wins.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    from leantune.cli.app import app

    app(prog_name="leantune")
