"""What a plan promises, and what its step then takes: for all, 3/4 and half of plain's memory.

Plain is the methods that a case gives, on the whole batch. A step is all micro-batches and AdamW.
"""

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import leantune as lt
from bench.cases.spt_smollm import smollm
from bench.cases.wta_crs_speed import Recipe
from bench.models import minilm
from bench.timing import TIMES, Bench, settle, timing_row
from leantune.core.tensors import iter_tensors
from leantune.measure.peak import compare_steps
from leantune.planner.plan import Plan, describe
from leantune.planner.request import PlanRequest
from leantune.training.budget import peak_of_step

PLAIN = "plain"
SHARES = {"planned for 3/4 of its memory": 0.75, "planned for half of its memory": 0.5}
_ROOMY = 2**50


@dataclass(frozen=True)
class Case:
    """A model, what is given with it, and the batch; see :class:`bench.timing.Case`."""

    name: str
    model: Callable[[], nn.Module]
    given: Recipe
    batch_size: int
    max_length: int
    needs_gpu: bool = False

    @property
    def variants(self) -> list[str]:
        return [PLAIN, *SHARES]

    def plan(self, model: nn.Module, budget: int) -> Plan:
        """Plan a step of this case in a budget."""
        size: Any = {"batch_size": self.batch_size, "max_length": self.max_length}
        return lt.plan(model, *self.given(), **size, budget=budget)


def _cases(tiny: bool) -> list[Case]:
    del tiny

    def smol() -> nn.Module:
        return smollm()[0]

    return [
        Case("MiniLM, 16 x 128", lambda: minilm()[0], tuple, 16, 128),
        Case("SmolLM2-135M, 8 x 96", smol, tuple, 8, 96),
        Case("SmolLM2-135M with LoRA, 8 x 96", smol, lambda: (lt.LoRA(rank=16),), 8, 96),
    ]


def _measure(case: Case, where: torch.device, variants: Sequence[str]) -> list[dict[str, Any]]:
    torch.manual_seed(0)
    with where:
        base = case.model().train()
    whole = case.plan(base, _ROOMY)
    plain = next(way for way in (whole, *whole.alternatives) if way.methods == case.given())
    room = plain.num_bytes["peak"]
    plans = {
        name: case.plan(base, int(share * room)) if (share := SHARES.get(name)) else plain
        for name in variants
    }
    request = PlanRequest(batch_size=case.batch_size, max_length=case.max_length, budget=_ROOMY)
    batch = request.batch(base, where)
    steps: dict[str, Callable[[], None]] = {}
    peaks: dict[str, int] = {}
    saved: dict[str, int] = {}
    for name, way in plans.items():
        model = copy.deepcopy(base)
        if way.methods:
            settle(lt.apply(model, *way.methods))
        optimizer = torch.optim.AdamW(
            [p for p in model.parameters() if p.requires_grad], fused=True
        )
        steps[name] = step = _step(model, optimizer, batch, way.batch_size)
        step()
        first = {key: tensor[: way.batch_size] for key, tensor in batch.items()}
        held = lt.ledger(model, first, optimizer=optimizer)
        saved[name] = held.activations
        known = iter_tensors([batch, list(optimizer.state.values())])
        peaks[name] = peak_of_step(model, step, known, held.weights + held.optimizer)
    stats = compare_steps(steps, reference=variants[0], rounds=7, warmup=0)
    return [
        timing_row(case, name, stats[name], saved[name])
        | {
            "methods": describe(way.methods),
            "batch": f"{way.accumulation_steps} x {way.batch_size}",
            "planned_ratio": way.relative_time,
            "planned_peak_mib": round(way.num_bytes["peak"] / 2**20, 1),
            "peak_mib": round(peaks[name] / 2**20, 1),
        }
        for name, way in plans.items()
    ]


def _step(
    model: nn.Module, optimizer: torch.optim.Optimizer, batch: dict[str, Tensor], size: int
) -> Callable[[], None]:
    num_samples = len(batch["input_ids"])

    def step() -> None:
        for at in range(0, num_samples, size):
            part = {name: tensor[at : at + size] for name, tensor in batch.items()}
            # The logits are gone before backward, as in a Trainer.
            (model(**part).loss * (size / num_samples)).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


COLUMNS = {
    "variant": "",
    "methods": "methods",
    "batch": "batch",
    "planned_peak_mib": "peak, planned MiB",
    "peak_mib": "measured",
    "planned_ratio": "time, planned",
    **{key: text for key, text in TIMES.items() if key not in ("variant", "median_ms")},
}
BENCH = Bench("planned", _cases, _measure, COLUMNS)
