"""Runs that are killed at any moment: whoever resumes them gets the weights of a run in one go."""

import gc
import hashlib
import multiprocessing
import os
import random
import sys
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from integration.tiny import bert, tokenizer, write_sentences

import leantune as lt
from bench.hostile.case import Cases
from leantune.core import registry
from leantune.training import run

CASES = Cases("kill")
NUM_KILLS = 20
_LOG = Path("log")
_OPTIONS: Mapping[str, Any] = {
    "model": "model",
    "task": "text",
    "data": "data",
    "max_steps": 6,
    "save_steps": 2,
    "batch_size": 8,
    "max_length": 32,
}


def _train(method: str, output: str) -> None:
    """Go on with the run in ``output``, or begin one, in a process that has nothing else to do."""
    log = _LOG.open("a")
    os.dup2(log.fileno(), 2)
    sys.stdout = sys.stderr = log
    # Half of such a short run would go into looking for garbage among what was imported.
    gc.freeze()
    run.MEASURED_ROUNDS = 1
    spec = registry.get(method)
    methods = [spec.config(**spec.test_options)]
    is_begun = (Path(output) / "recipe.json").is_file()
    lt.train(_OPTIONS, methods=methods, output=output, resume=is_begun)


def _fork(work: Callable[[], None], seconds: float | None = None) -> int | None:
    """Run ``work`` in a fork of this process, which has everything imported; kill -9 it in time."""
    child = multiprocessing.get_context("fork").Process(target=work)
    child.start()
    child.join(seconds)
    child.kill()
    child.join()
    return child.exitcode


def _digests(output: str) -> dict[str, str]:
    """Return the digest of every file of tensors that a run ends with."""
    files = sorted(Path(output).glob("*/*.safetensors"))
    return {f.parent.name + f.name: hashlib.sha256(f.read_bytes()).hexdigest() for f in files}


def _kill(method: str, folder: Path) -> str:
    bert().bert.save_pretrained("model")
    tokenizer().save_pretrained("model")
    write_sentences(Path("data"), lambda good: str(int(good)))
    start = time.perf_counter()
    assert _fork(partial(_train, method, "whole")) == 0, _LOG.read_text()
    duration = time.perf_counter() - start
    wanted, moments, kept = _digests("whole"), random.Random(method), set[str]()
    assert wanted
    for number in range(NUM_KILLS):
        output = f"run-{number}"
        _fork(partial(_train, method, output), moments.uniform(0, duration))
        kept |= {path.name for path in Path(output).glob("checkpoints/*")}
        assert _fork(partial(_train, method, output)) == 0, f"kill {number}: {_LOG.read_text()}"
        assert _digests(output) == wanted, f"kill {number}: the resumed run has other weights"
    return f"{NUM_KILLS} times equal to the bit; found after kills: {', '.join(sorted(kept))}"


for _method in registry.list_methods():
    _tried = f"kill -9 at {NUM_KILLS} random moments of a run with {_method}, then resume"
    CASES.add(_method, "works", _tried, partial(_kill, _method))
