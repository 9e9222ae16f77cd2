"""Variants of a step are timed against a reference in one run, and their peak is noted."""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from leantune.errors import ConfigError


@dataclass(frozen=True)
class StepStats:
    """The stats of a step are time and peak of one variant over the rounds of a comparison.

    Args:
        median_ms: median wall time of a step.
        p20_ms: 20th percentile of the wall time.
        p80_ms: 80th percentile of the wall time.
        ratio: median over rounds of this variant's time over the reference's in that round;
            below 1 is faster.
        ratio_p20: 20th percentile of that ratio.
        ratio_p80: 80th percentile of that ratio.
        peak_bytes: highest peak of the CUDA allocator during a step, whatever else lives on the
            device included; None on the CPU.
        resident_bytes: allocated when that step began, so that ``peak_bytes - resident_bytes``
            is what the step adds; None on the CPU.
        num_rounds: rounds measured, warm-up excluded.
    """

    median_ms: float
    p20_ms: float
    p80_ms: float
    ratio: float
    ratio_p20: float
    ratio_p80: float
    peak_bytes: int | None
    resident_bytes: int | None
    num_rounds: int

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as plain JSON types."""
        return dict(vars(self))


def compare_steps(
    steps: Mapping[str, Callable[[], Any]], *, reference: str, rounds: int = 7, warmup: int = 2
) -> dict[str, StepStats]:
    """Time variants of a step against each other so that drift of the machine hits all alike.

    Each round runs every variant once, starting with another one than the round before; a ratio
    is formed within each round. On CUDA (the current device, if the warm-up used it) each step
    is timed between two synchronisations.

    Args:
        steps: name -> one full step; each call does the same amount of work.
        reference: name of the variant that the ratios refer to.
        rounds: measured rounds, >= 1.
        warmup: unmeasured runs of each variant, >= 0.

    Returns:
        Name -> stats, in the order of ``steps``.

    Raises:
        ConfigError: unknown reference or a count out of range.
    """
    if reference not in steps:
        raise ConfigError(
            f"compare_steps: reference must be one of {list(steps)}, got {reference!r}"
        )
    for name, value, least in (("rounds", rounds, 1), ("warmup", warmup, 0)):
        if value < least:
            raise ConfigError(f"compare_steps: {name} must be at least {least}, got {value}")
    names = list(steps)
    for _ in range(warmup):
        for step in steps.values():
            step()
    # Asked after the warm-up, so that steps on the CPU never create a CUDA context.
    on_cuda = torch.cuda.is_initialized()
    times: dict[str, list[float]] = {name: [] for name in names}
    memory: dict[str, tuple[int, int]] = {}
    for number in range(rounds):
        first = number % len(names)
        for name in names[first:] + names[:first]:
            elapsed_ms, peak = _run(steps[name], on_cuda)
            times[name].append(elapsed_ms)
            if peak is not None:
                memory[name] = max(memory.get(name, peak), peak)
    base = times[reference]
    return {name: _stats(times[name], base, memory.get(name, (None, None))) for name in names}


def _run(step: Callable[[], Any], on_cuda: bool) -> tuple[float, tuple[int, int] | None]:
    resident = 0
    if on_cuda:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        resident = torch.cuda.memory_allocated()
    start = time.perf_counter()
    step()
    if on_cuda:
        torch.cuda.synchronize()
    elapsed_ms = (time.perf_counter() - start) * 1e3
    return elapsed_ms, (torch.cuda.max_memory_allocated(), resident) if on_cuda else None


def _stats(
    times: list[float], base: list[float], memory: tuple[int, int] | tuple[None, None]
) -> StepStats:
    quantiles = torch.tensor([0.5, 0.2, 0.8], dtype=torch.float64)
    own = torch.tensor(times, dtype=torch.float64)
    median, p20, p80 = map(float, own.quantile(quantiles).unbind())
    ratio = own / torch.tensor(base, dtype=torch.float64)
    ratio_median, ratio_p20, ratio_p80 = map(float, ratio.quantile(quantiles).unbind())
    return StepStats(
        median_ms=median,
        p20_ms=p20,
        p80_ms=p80,
        ratio=ratio_median,
        ratio_p20=ratio_p20,
        ratio_p80=ratio_p80,
        peak_bytes=memory[0],
        resident_bytes=memory[1],
        num_rounds=len(times),
    )
