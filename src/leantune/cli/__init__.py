"""The command ``leantune``; each command's machinery is imported when it runs."""

import io
import os
import sys

from leantune.core.extras import require
from leantune.errors import UnsupportedError
from leantune.training.interrupt import end_process, handled_by


def main() -> None:
    """Run the command line; the entry point of the ``leantune`` script."""
    try:
        _main()
    except KeyboardInterrupt:
        # Before a command had begun, or in one that leaves nothing half-made.
        sys.stderr.write("interrupted\n")
        sys.exit(130)


def _main() -> None:
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            # A name that the screen has no letters for is no reason to fail.
            stream.reconfigure(errors="backslashreplace")
    # A new head, which every fine-tuning has, is no news; the user's own setting wins.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    # An import may swallow what a signal raises in it.
    with handled_by(end_process):
        try:
            for package in ("typer", "rich", "yaml"):
                require(package, extra="cli", who="leantune")
        except UnsupportedError as error:
            sys.exit(f"error {error}")
        from leantune.cli.app import app
    app(prog_name="leantune")
