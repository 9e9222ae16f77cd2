"""A plan says whether a training step fits a budget of memory, and what makes it fit."""

import dataclasses
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from leantune.core import registry
from leantune.core.config import MethodConfig
from leantune.core.recipe import method_configs
from leantune.errors import ConfigError, LeantuneError, SiteError
from leantune.integrations.configs import build_on_meta
from leantune.measure.entries import LEDGERS
from leantune.measure.text import format_bytes, table
from leantune.methods import WTACRS, Checkpoint, Liger, LoRA
from leantune.ops.backend import by_device, own_device
from leantune.planner.forecast import Blueprint
from leantune.planner.meter import Speed
from leantune.planner.request import PlanRequest

ON_CPU = Speed(flops=5e10, traffic=4e9, call=5e-5, overlaps=False)
ON_GPU = Speed(flops=4e14, traffic=3e12, call=1e-5, overlaps=True)
"""With products in half precision; in float32 they take eight times as long."""
_MLP, _BLOCK, _LIGER = Checkpoint(parts=("mlp",)), Checkpoint(), Liger()
_SOME, _FEW = WTACRS(keep_ratio=0.3), WTACRS(keep_ratio=0.1)
_ADDED: tuple[tuple[MethodConfig, ...], ...] = (
    (),
    (_SOME,),
    (_FEW,),
    (_MLP,),
    (_MLP, _SOME),
    (_MLP, _FEW),
    (_BLOCK,),
    (_BLOCK, _FEW),
)
"""What a plan may add."""
_ON_LIGER = tuple((_LIGER, *added) for added in _ADDED)
"""The same on Liger's kernels, on a GPU; the first is tried first, and says why none can be."""


@dataclass(frozen=True)
class Plan:
    """A plan is a way to train, and what it costs.

    Args:
        methods: to apply; none trains the plain model.
        batch_size: samples of a micro-batch.
        accumulation_steps: micro-batches of an optimiser step.
        num_bytes: by ledger, as ``leantune.ledger`` measures them; the ``peak``, the most that a
            step holds at once; and ``transients``, the peak less weights, optimizer and
            activations: gradients, and what is made in passing.
        relative_time: of a step, an estimate; 1 is the given methods on the whole batch at once.
        gradient: what is done to it, in words. Rows drawn evenly would add to its variance so many
            times the sum of their squared contributions; rows drawn by their norms add less.
        fits: whether the peak is within the budget.
        alternatives: other ways, those that fit first, then by time.
        left_out: what could not be added -> why.
    """

    methods: tuple[MethodConfig, ...]
    batch_size: int
    accumulation_steps: int
    num_bytes: Mapping[str, int]
    relative_time: float
    gradient: str
    fits: bool
    alternatives: tuple["Plan", ...] = field(default=(), repr=False)
    left_out: Mapping[str, str] = field(default_factory=dict[str, str], repr=False)

    def recipe(self) -> dict[str, Any]:
        """Return the options that ``leantune train`` takes for it, as plain JSON types."""
        return {
            "methods": [method.to_dict() for method in self.methods],
            "batch_size": self.batch_size,
            "gradient_accumulation_steps": self.accumulation_steps,
        }

    def to_dict(self) -> dict[str, Any]:
        """Return everything as plain JSON types; sizes in bytes."""
        others = [other.to_dict() for other in self.alternatives]
        names = ("num_bytes", "relative_time", "gradient", "fits", "left_out")
        costs = {name: getattr(self, name) for name in names}
        return {"recipe": self.recipe(), **costs, "alternatives": others}

    def rows(self) -> list[tuple[str, ...]]:
        """Return a table of the plan and its alternatives, its header first."""
        sizes = ("weights", "optimizer", "activations", "transients", "peak")
        rows = [
            (
                describe(way.methods),
                f"{way.accumulation_steps} x {way.batch_size}",
                *(format_bytes(way.num_bytes[name]) for name in sizes),
                "yes" if way.fits else "no",
                f"{way.relative_time:.2f}",
                way.gradient,
            )
            for way in (self, *self.alternatives)
        ]
        return [("methods", "batch", *sizes, "fits", "time", "gradient"), *rows]

    def __str__(self) -> str:
        header, *rows = self.rows()
        notes = [f"\nleft out: {methods} ({why})" for methods, why in self.left_out.items()]
        return table(header, rows) + "".join(notes)


def describe(methods: Sequence[MethodConfig]) -> str:
    """Return methods as Python spells them, with the options that are not the default."""
    calls: list[str] = []
    for method in methods:
        options = {f.name: getattr(method, f.name) for f in dataclasses.fields(method)}
        changed = {k: v for k, v in options.items() if v != getattr(type(method), k)}
        calls.append(
            f"{type(method).__name__}({', '.join(f'{k}={v!r}' for k, v in changed.items())})"
        )
    return " + ".join(calls) or "plain"


def plan(
    model: Any,
    *methods: MethodConfig | str,
    batch_size: int,
    max_length: int,
    budget: str | int,
    min_keep_ratio: float = 0.3,
    precision: str = "float32",
) -> Plan:
    """Choose the fastest way to train a model in a budget of memory.

    Nothing is loaded: the methods are applied to a model without numbers, whose step runs on
    shapes. What it saves is what :func:`leantune.ledger` measures, to the byte. Time is an
    estimate, good for an order. To the methods given it adds what is recomputed (each block's MLP,
    or each block), WTA-CRS (0.3, 0.1), on a GPU Liger's kernels, and halved micro-batches where the
    batch does not fit. Where all weights are trained and that fits in no way, it trains LoRA's
    factors instead.

    Args:
        model: of token ids: loaded, on the meta device, or its configuration.
        methods: to keep in any case, such as ``LoRA()``, or by name; what recomputes or samples
            already is not added a second time.
        batch_size: samples of an optimiser step.
        max_length: tokens of the longest sample.
        budget: ``"22GiB"``, ``"8 GB"``, or bytes: for tensors, without what the allocator rounds
            up and the driver takes.
        min_keep_ratio: bound on the variance that WTA-CRS may add: the least share of rows that it
            keeps, or a third of that where whole blocks run again; 1 leaves it out.
        precision: of the products, as in a recipe: float32, bf16 or fp16.

    Raises:
        ConfigError: a bad value, or nothing fits; the message says what the smallest takes.
        SiteError: the model has no sites for the methods given.
        UnsupportedError: the forward asks for numbers, or weights are quantised.
    """
    options: Any = {"budget": budget, "min_keep_ratio": min_keep_ratio, "precision": precision}
    request = PlanRequest(batch_size=batch_size, max_length=max_length, **options)
    given = method_configs(methods, "plan")
    search = _Search(model, request)
    ways = search.ways(given)
    if not any(way.fits for way in ways) and "trained" not in _axes(given):
        with suppress(LeantuneError):  # no place for an adapter, by itself or beside what is given
            ways += search.ways((LoRA(), *given))
    ways.sort(key=lambda way: (not way.fits, way.relative_time))
    if not ways[0].fits:
        raise ConfigError(_nothing_fits(search, ways, budget))
    return dataclasses.replace(ways[0], alternatives=tuple(ways[1:]), left_out=search.left_out)


def _axes(methods: Sequence[MethodConfig]) -> set[str]:
    return {registry.get(method.method).axis for method in methods}


def _keep_ratio(methods: Sequence[MethodConfig]) -> float:
    return min((m.keep_ratio for m in methods if isinstance(m, WTACRS)), default=1.0)


def _gradient(methods: Sequence[MethodConfig]) -> str:
    """Say what is done to the gradient, as far as the methods are known to keep or sample it."""
    known = LoRA | Checkpoint | WTACRS | Liger
    own = [type(m).__name__ for m in methods if not isinstance(m, known)]
    if own or any(isinstance(m, WTACRS) and m.estimator == "topk" for m in methods):
        return f"as {' and '.join(own) or 'topk'} makes it"
    ratio = _keep_ratio(methods)
    drawn = "unbiased by exact norms" if _BLOCK in methods else "unbiased"
    return "exact" if ratio == 1 else f"{drawn}, variance <= {1 / ratio - 1:.1f}"


class _Search:
    """A search tries methods on a model, in micro-batches that fit a budget."""

    def __init__(self, model: Any, request: PlanRequest) -> None:
        module = model if isinstance(model, nn.Module) else build_on_meta(model)
        first = next(module.parameters(), torch.empty(0))
        self.device = device = own_device() if first.is_meta else first.device
        is_half = (request.dtype or first.dtype).itemsize == 2
        on_gpu = ON_GPU if is_half else ON_GPU._replace(flops=ON_GPU.flops / 8)
        self.name, self.request = type(module).__name__, request
        self._speed = by_device(device, cpu=ON_CPU, gpu=on_gpu)
        self._batch = request.batch(module, device)
        self._blueprint = Blueprint(module, device, self._speed)
        self._seconds: float | None = None
        self.left_out: dict[str, str] = {}

    def ways(self, given: Sequence[MethodConfig]) -> list[Plan]:
        """Return the methods given, as they are and with each of what may be added to them."""
        ways: list[Plan] = []
        taken, least = _axes(given), self.request.min_keep_ratio
        for added in by_device(self.device, cpu=_ADDED, gpu=_ADDED + _ON_LIGER):
            # Where whole blocks run again, rows are drawn by exact norms: a third will do.
            ratio = _keep_ratio(added) * (3 if _BLOCK in (*given, *added) else 1)
            if ratio < least or not taken.isdisjoint(_axes(added)):
                continue
            is_ligers = added[:1] == (_LIGER,)
            if is_ligers and describe((_LIGER,)) in self.left_out:
                continue
            try:
                ways.append(self.largest((*given, *added)))
            except LeantuneError as error:
                if not added or not (is_ligers or isinstance(error, SiteError)):
                    raise
                self.left_out[describe(added)] = str(error).partition("; ")[0]
        return ways

    def largest(self, methods: Sequence[MethodConfig]) -> Plan:
        """Return the way with the largest micro-batch that fits, or else the smallest way."""
        way = whole = self.way(methods, self.request.batch_size)
        size = whole.batch_size
        resident = sum(whole.num_bytes[name] for name in ("weights", "optimizer", "gradients"))
        while not way.fits and size > 1:
            size = size // 2 if size % 2 == 0 else 1
            # The rest grows with the batch: sizes that are far too large are not tried.
            rest = (whole.num_bytes["peak"] - resident) * size / whole.batch_size
            if resident + rest <= self.request.budget or size == 1:
                way = self.way(methods, size)
        # Gradients that accumulate may take more than small micro-batches save.
        return way if way.fits else min(whole, way, key=lambda way: way.num_bytes["peak"])

    def way(self, methods: Sequence[MethodConfig], size: int) -> Plan:
        """Forecast methods on micro-batches of a size."""
        batch = {name: tensor[-size:] for name, tensor in self._batch.items()}
        found = self._blueprint.forecast(batch, methods, self.request.dtype)
        steps = self.request.batch_size // size
        # AdamW reads gradients, and reads and writes weights and its state.
        update = (3 * found.gradients + 2 * found.optimizer) / self._speed.traffic
        seconds = steps * found.seconds + update
        self._seconds = self._seconds or seconds
        peak = found.peak(accumulates=steps > 1)
        ledgers = {name: getattr(found, name) for name in LEDGERS}
        others = peak - found.weights - found.optimizer - found.activations
        return Plan(
            methods=tuple(methods),
            batch_size=size,
            accumulation_steps=steps,
            num_bytes={**ledgers, "transients": others, "peak": peak},
            relative_time=seconds / self._seconds,
            gradient=_gradient(methods),
            fits=peak <= self.request.budget,
        )


def _nothing_fits(search: _Search, ways: Sequence[Plan], budget: str | int) -> str:
    smallest = min(ways, key=lambda way: way.num_bytes["peak"])
    weights = smallest.num_bytes["weights"]
    below = f", below its weights' {format_bytes(weights)}"
    got = budget if isinstance(budget, str) else format_bytes(budget)
    return (
        f"plan: budget must be at least {-(-smallest.num_bytes['peak'] // 2**20)}MiB for "
        f"{search.name}, got {got}{below if weights > search.request.budget else ''}; the smallest "
        f"is {describe(smallest.methods)} on {smallest.batch_size} x {search.request.max_length} "
        "tokens at a time: raise it, or shorten max_length"
    )
