"""Runs that are ended at any moment, and two of them at once: nothing is lost, nothing is mixed."""

import gc
import hashlib
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import leantune as lt
from bench.hostile.case import Cases
from bench.hostile.runs import tiny_inputs, write_inputs
from leantune.core import registry
from leantune.core.manifest import find_damage
from leantune.training import first_step

CASES = Cases("kill", prepare=tiny_inputs)
NUM_ROUNDS, NUM_KILLS = 2, 10
"""Of each method; a round is a case."""
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
    first_step.MEASURED_ROUNDS = 1
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


def _killed(method: str, kill_round: int, folder: Path) -> str:
    """Kill a run and whoever resumes it, again and again; start another where one comes through."""
    write_inputs(folder)
    start = time.perf_counter()
    assert _fork(partial(_train, method, "whole")) == 0, _LOG.read_text()
    duration = time.perf_counter() - start
    wanted, moments = _digests("whole"), random.Random(f"{method} {kill_round}")
    assert wanted
    num_kills, num_runs, found = 0, 0, set[str]()
    is_whole = True
    while num_kills < NUM_KILLS or not is_whole:
        num_runs += is_whole
        output = f"run-{num_runs}"
        seconds = moments.uniform(0, duration) if num_kills < NUM_KILLS else None
        code = _fork(partial(_train, method, output), seconds)
        is_whole = code == 0
        assert is_whole or (code == -signal.SIGKILL and seconds is not None), _LOG.read_text()
        if is_whole:
            assert _digests(output) == wanted, f"{output}: other weights, {_LOG.read_text()}"
        num_kills += not is_whole
        found |= {path.name for path in Path(output).glob("checkpoints/*")}
    names = ", ".join(sorted(found))
    return f"{num_kills} kills, the end of {num_runs} runs equal to the bit; kills left {names}"


for _method in (name for name, spec in registry.list_methods().items() if not spec.needs_gpu):
    for _round in range(1, NUM_ROUNDS + 1):
        CASES.add(
            f"{_method}, round {_round}",
            "works",
            f"kill -9 at {NUM_KILLS} random moments of a run with {_method}, round {_round}",
            partial(_killed, _method, _round),
        )


def _start(folder: Path, *arguments: str) -> subprocess.Popen[str]:
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    module = (sys.executable, "-c", "from leantune.cli import main; main()")
    return subprocess.Popen(
        [*module, *arguments], cwd=folder, env=env, text=True, stdout=-1, stderr=-1
    )


@CASES.works
def two_runs(folder: Path) -> str:
    """Two runs started at once into one folder."""
    arguments = write_inputs(folder, "max_steps=60")
    both = [_start(folder, *arguments) for _ in range(2)]
    said = {process.communicate()[1]: process.returncode for process in both}
    assert sorted(said.values()) == [0, 2], said
    return next(text.splitlines()[-1] for text, code in said.items() if code)


def _signal(name: str, code: int, folder: Path) -> str:
    process = _start(folder, *write_inputs(folder, "max_steps=100000", "save_steps=50000"))
    while not (folder / "run" / "checkpoints").exists():
        assert process.poll() is None, process.communicate()
        time.sleep(0.05)
    time.sleep(1.0)
    process.send_signal(getattr(signal, name))
    _, said = process.communicate()
    assert process.returncode == code and "Traceback" not in said, (process.returncode, said)
    last = max((folder / "run" / "checkpoints").glob("checkpoint-*"), key=os.path.getmtime)
    assert find_damage(last, "checkpoint") is None, last
    return said.strip().splitlines()[-1]


for _name, _code in (("SIGINT", 130), ("SIGTERM", 143), ("SIGHUP", 129)):
    CASES.add(
        f"{_name} while training",
        "works",
        f"{_name} in training keeps a checkpoint and ends with {_code}",
        partial(_signal, _name, _code),
    )


def _early(seconds: float, folder: Path) -> str:
    process = _start(folder, *write_inputs(folder, "max_steps=100000"))
    time.sleep(seconds)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate()
    assert process.returncode == 130 and "Traceback" not in said, (process.returncode, said)
    assert not (folder / "run").exists() or list(folder.glob("run/checkpoints/checkpoint-*"))
    return (said.strip() or "nothing").splitlines()[-1]


for _tenths in (2, 6, 10, 15, 20, 30, 60):
    CASES.add(
        f"Ctrl-C after {_tenths / 10} s",
        "works",
        f"Ctrl-C {_tenths / 10} s after the start: no traceback, no half-made folder",
        partial(_early, _tenths / 10),
    )
