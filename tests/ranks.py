"""Two processes under gloo on this machine, started once and given one call after another."""

import os
import pickle
import sys
import tempfile
import traceback
import warnings
from collections.abc import Callable
from datetime import timedelta
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from torch import distributed as dist

NUM_RANKS = 2
# Long enough for a busy machine: it only bounds a hang.
_TIMEOUT_S = 180


class Ranks:
    """Calls functions in all processes at once; a failure in some of them ends and restarts all."""

    def __init__(self) -> None:
        self._workers: list[tuple[Any, Any]] = []
        self._folder: Any = None

    def run(self, call: Callable[..., Any], *args: Any, **options: Any) -> list[Any]:
        """Return what ``call``, a function of an importable module, returned in each process."""
        if not self._workers:
            self._start()
        for _, pipe in self._workers:
            pipe.send_bytes(pickle.dumps((call, args, options)))
        results = []
        for _, pipe in self._workers:
            is_there = pipe.poll(2 * _TIMEOUT_S)
            results.append(pickle.loads(pipe.recv_bytes()) if is_there else (False, "no answer"))
        failures = [f"rank {rank}: {said}" for rank, (ok, said) in enumerate(results) if not ok]
        # All that failed alike have left the same call at the same place, and can go on together.
        if failures and (len(failures) < NUM_RANKS or len({said for _, said in results}) > 1):
            self.close()
        if failures:
            raise AssertionError(failures[0])
        return [value for _, value in results]

    def _start(self) -> None:
        self._folder = tempfile.TemporaryDirectory()
        store = Path(self._folder.name) / "store"
        context = get_context("spawn")
        for rank in range(NUM_RANKS):
            here, there = context.Pipe()
            worker = context.Process(
                target=_serve, args=(rank, str(store), there, sys.path), daemon=True
            )
            worker.start()
            self._workers.append((worker, here))

    def close(self) -> None:
        for worker, pipe in self._workers:
            pipe.close()
            worker.terminate()
            worker.join()
        self._workers = []
        if self._folder is not None:
            self._folder.cleanup()


def _serve(rank: int, store: str, pipe: Any, path: list[str]) -> None:
    sys.path[:] = path
    os.environ["HF_HUB_OFFLINE"] = "1"
    # As torchrun sets it; accelerate warns where several processes share the cores without it.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    torch.set_num_threads(1)
    warnings.simplefilter("error")
    dist.init_process_group(
        "gloo",
        init_method=f"file://{store}",
        rank=rank,
        world_size=NUM_RANKS,
        timeout=timedelta(seconds=_TIMEOUT_S),
    )
    while True:
        try:
            call, args, options = pickle.loads(pipe.recv_bytes())
        except EOFError:
            return
        try:
            answer = True, call(*args, **options)
        except BaseException:
            answer = False, traceback.format_exc()
        # As bytes: torch would share the tensors' memory instead.
        pipe.send_bytes(pickle.dumps(answer))
