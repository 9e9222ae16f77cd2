"""Long runs: 2,000 steps must leave no more in memory than 1,000 did."""

import gc
import resource
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from models import MODELS

import leantune as lt
from bench.hostile.case import Cases
from leantune.core import registry

CASES = Cases("memory")
NUM_STEPS = 2000
MAX_OBJECTS, MAX_BYTES = NUM_STEPS // 8, 2**21
"""What the second half may add: an object in four steps, and 2 MiB of allocators' habits.

A plain model's adds 38 objects, one with WTA-CRS 66: fewer and fewer, and none for each step.
"""

_TINY = replace(MODELS["bert"], options={**MODELS["bert"].options, "num_hidden_layers": 1})


def _memory() -> tuple[int, int]:
    """Return the number of Python's objects, and the bytes that the process occupies."""
    gc.collect()
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return sys.getallocatedblocks(), pages * resource.getpagesize()


def _train(method: str, after_step: Callable[[Any], None], folder: Path) -> str:
    gc.freeze()  # else every look for garbage goes through all that was imported
    model, spec = _TINY.build(), registry.get(method)
    batches = [_TINY.batch(seed) for seed in range(8)]
    session = lt.apply(model, spec.config(**spec.test_options))
    session.calibrate(batches)
    optimizer = session.optimizer(torch.optim.AdamW, lr=1e-4)
    seen = []
    for step in range(NUM_STEPS):
        loss = model(**batches[step % len(batches)]).loss + session.auxiliary_loss()
        loss.backward()
        optimizer.step()
        session.on_step()
        optimizer.zero_grad()
        after_step(loss)
        if step in (NUM_STEPS // 2, NUM_STEPS - 1):
            seen.append(_memory())
    (objects, size), (more_objects, more) = seen
    said = f"{more_objects - objects} objects and {more - size} bytes more"
    assert more_objects - objects <= MAX_OBJECTS and more - size <= MAX_BYTES, said
    return said


@CASES.works
def control(folder: Path) -> str:
    """A loop that keeps each step's loss must be found out."""
    kept: list[Any] = []
    try:
        _train("wta_crs", kept.append, folder)
    except AssertionError as error:
        return f"found out: {error}"
    raise AssertionError("the leak was not seen")


for _method in (name for name, spec in registry.list_methods().items() if not spec.needs_gpu):
    _tried = f"{NUM_STEPS} steps with {_method} keep no more in memory than half of them"
    CASES.add(_method, "works", _tried, partial(_train, _method, lambda loss: None))
