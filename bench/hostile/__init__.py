"""Hostile input: what was tried against the library and what it said.

Each module beside this one and the harness is an area, and holds its ``CASES``.
"""

import os
import signal
import tempfile
from importlib import import_module
from pathlib import Path

AREAS = sorted({path.stem for path in Path(__file__).parent.glob("[a-z]*.py")} - {"case"})


def main(area: str | None, name: str, num_workers: int) -> None:
    """Try the cases, without network and with a cache of their own."""
    with tempfile.TemporaryDirectory() as cache:
        # Before any import of a library that reads them.
        offline = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_DATASETS_OFFLINE")
        os.environ.update(dict.fromkeys(offline, "1") | {"HF_HOME": cache})
        # A shell may start its background jobs, and so their children, deaf to Ctrl-C.
        signal.signal(signal.SIGINT, signal.default_int_handler)
        areas = [area] if area else AREAS
        import_module("bench.hostile.case").try_areas(areas, name, num_workers)
