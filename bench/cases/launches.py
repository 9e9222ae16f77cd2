"""Kernels that a block launches, and how long host and GPU need for them.

Where the host needs longer than the GPU, fewer products save nothing.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch

import leantune as lt
from bench import device
from bench.cases.wta_crs_speed import ON_GPU, WITH_LIGER
from bench.models import LlamaBlocks
from bench.timing import Bench, settle

RECIPES = ON_GPU | WITH_LIGER
_FEW, _MANY = 2, 4


@dataclass(frozen=True)
class Case:
    """A stack of Llama blocks of some width; see :class:`bench.timing.Case`."""

    name: str
    width: int
    batch: tuple[int, int]
    needs_gpu: bool = True

    @property
    def variants(self) -> list[str]:
        return list(RECIPES)


def _cases(tiny: bool) -> list[Case]:
    width, batch = (128, (2, 64)) if tiny else (2048, (8, 2048))
    return [Case("Llama-1B x 4, 8 x 2048, bf16", width, batch)]


def _measure(case: Case, where: torch.device, variants: Sequence[str]) -> list[dict[str, Any]]:
    """Count launches of the last variant: a block's are the difference between two stacks."""
    name = variants[-1]
    counted: dict[int, int] = {}
    gpu_ms = host_ms = 0.0
    for depth in (_FEW, _MANY):
        step = _step(case, where, depth, name)
        for _ in range(2):
            step()
        counted[depth], gpu_ms = device.launches(step)
        host_ms = _host_ms(step)
    return [
        {
            "case": case.name,
            "variant": name,
            "launches": counted[_MANY],
            "launches_per_block": (counted[_MANY] - counted[_FEW]) / (_MANY - _FEW),
            "host_ms": host_ms,
            "gpu_ms": gpu_ms,
        }
    ]


def _step(case: Case, where: torch.device, depth: int, name: str) -> Callable[[], None]:
    torch.manual_seed(0)
    with where:
        model = LlamaBlocks(depth, case.width).to(torch.bfloat16).train()
        ids = torch.randint(0, 1024, case.batch)
    if methods := RECIPES[name]():
        settle(lt.apply(model, *methods))

    def step() -> None:
        model.zero_grad(set_to_none=True)
        model(ids).backward()

    return step


def _host_ms(step: Callable[[], None]) -> float:
    """Return the median time until a step has launched everything, whatever still runs."""
    times = []
    for _ in range(3):
        device.synchronize()
        start = time.perf_counter()
        step()
        times.append((time.perf_counter() - start) * 1e3)
    device.synchronize()
    return median(times)


COLUMNS = {
    "variant": "",
    "launches_per_block": "launches per block",
    "launches": "launches of four blocks",
    "host_ms": "host ms",
    "gpu_ms": "GPU ms",
}
BENCH = Bench("launches", _cases, _measure, COLUMNS)
