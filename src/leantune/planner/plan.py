"""A plan says whether a training step fits a budget of memory, and what makes it fit."""

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn

from leantune.core import registry
from leantune.core.config import MethodConfig
from leantune.errors import ConfigError, LeantuneError, SiteError
from leantune.integrations.configs import build_on_meta
from leantune.measure.text import format_bytes, table
from leantune.methods import WTACRS, Checkpoint, LoRA
from leantune.ops.backend import by_device
from leantune.planner.forecast import Blueprint, Forecast
from leantune.planner.sizes import check_count, parse_budget, token_batch

Precision = Literal["float32", "bf16", "fp16"]
_DTYPES = {"float32": None, "bf16": torch.bfloat16, "fp16": torch.float16}
_RATIOS = (0.3, 0.1)
_PARTS = ("mlp", "block")


@dataclass(frozen=True)
class Plan:
    """A plan is a way to train in a budget, and what it costs; sizes are in bytes.

    Args:
        methods: to apply; none trains the plain model.
        batch_size: samples in a micro-batch.
        accumulation_steps: micro-batches in an optimiser step.
        weights: parameters and buffers.
        gradients: what one backward leaves on the parameters.
        optimizer: AdamW's state.
        activations: kept for backward at the end of a micro-batch's forward.
        peak: the most that a step holds at once, all of these and what is made in passing.
        budget: what ``peak`` must not exceed.
        relative_time: of a step, predicted; 1 is the given methods on the whole batch at once.
        max_length: tokens of a sample.
        precision: of the products.
        alternatives: the other ways, those that fit first, the fastest first.
    """

    methods: tuple[MethodConfig, ...]
    batch_size: int
    accumulation_steps: int
    weights: int
    gradients: int
    optimizer: int
    activations: int
    peak: int
    budget: int
    relative_time: float
    max_length: int
    precision: Precision
    alternatives: tuple["Plan", ...] = dataclasses.field(default=(), repr=False)

    @property
    def fits(self) -> bool:
        """Whether the peak is within the budget."""
        return self.peak <= self.budget

    @property
    def transients(self) -> int:
        """Bytes at the peak besides weights, optimiser state and activations.

        They are the gradients of that moment, and what operations make in passing: logits and
        their gradient, or a part that is recomputed.
        """
        return self.peak - self.weights - self.optimizer - self.activations

    @property
    def keep_ratio(self) -> float:
        """Share of the rows that weight gradients come from; 1 is the exact gradient."""
        return min((m.keep_ratio for m in self.methods if isinstance(m, WTACRS)), default=1.0)

    @property
    def gradient(self) -> str:
        """What is done to the gradient, in words.

        Rows that are drawn evenly would add ``1 / keep_ratio - 1`` times the sum of their squared
        contributions to its variance; rows drawn by their norms add less.
        """
        ratio = self.keep_ratio
        return "exact" if ratio == 1 else f"unbiased, variance up to {1 / ratio - 1:.1f}"

    def recipe(self) -> dict[str, Any]:
        """Return the options that ``leantune train`` takes for it, as plain JSON types."""
        return {
            "methods": [method.to_dict() for method in self.methods],
            "batch_size": self.batch_size,
            "gradient_accumulation_steps": self.accumulation_steps,
            "max_length": self.max_length,
            "precision": self.precision,
        }

    def to_dict(self) -> dict[str, Any]:
        """Return recipe, bytes, time and alternatives as plain JSON types."""
        names = ("weights", "gradients", "optimizer", "activations", "transients", "peak")
        return {
            "recipe": self.recipe(),
            **{name: getattr(self, name) for name in (*names, "budget", "fits")},
            "relative_time": round(self.relative_time, 3),
            "gradient": self.gradient,
            "alternatives": [other.to_dict() for other in self.alternatives],
        }

    def rows(self) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
        """Return header and rows of a table of the plan and its alternatives."""
        header = ("methods", "batch", "weights", "optimizer", "activations", "transients", "peak")
        rows = [
            (
                describe(way.methods),
                f"{way.accumulation_steps} x {way.batch_size}",
                *(format_bytes(getattr(way, name)) for name in header[2:]),
                "yes" if way.fits else "no",
                f"{way.relative_time:.2f}",
                way.gradient,
            )
            for way in (self, *self.alternatives)
        ]
        return (*header, "fits", "time", "gradient"), rows

    def __str__(self) -> str:
        return table(*self.rows())


def describe(methods: Sequence[MethodConfig]) -> str:
    """Return methods as they are written in Python, with the options that are not the default."""
    return " + ".join(map(_call, methods)) or "plain"


def _call(method: MethodConfig) -> str:
    options: list[str] = []
    for spec in dataclasses.fields(method):
        value = getattr(method, spec.name)
        if value != spec.default:
            one = value[0] if isinstance(value, tuple) and len(value) == 1 else value
            options.append(f"{spec.name}={one!r}")
    return f"{type(method).__name__}({', '.join(options)})"


def plan(
    model: Any,
    *methods: MethodConfig,
    batch_size: int,
    max_length: int,
    budget: str | int,
    min_keep_ratio: float = 0.1,
    precision: Precision = "float32",
) -> Plan:
    """Choose how to train a model in a budget of memory, the fastest way that fits.

    Nothing is loaded or computed: the methods are applied to a model without numbers, and its step
    is run on shapes. Bytes of weights, gradients, optimiser state and activations are those that
    :func:`leantune.ledger` measures. Time is an estimate from products, memory traffic and the
    number of operations, good for an order.

    To the methods given it adds what is recomputed (nothing, each block's MLP, each block), WTA-CRS
    (none, 0.3, 0.1), and a halved micro-batch with accumulated gradients where the batch is too
    large, unless a given method recomputes or samples already.

    Args:
        model: of token ids: loaded, on the meta device, or its configuration.
        methods: to keep in any case, such as ``LoRA()`` or ``Checkpoint()``.
        batch_size: samples of an optimiser step.
        max_length: tokens of the longest sample.
        budget: ``"22GiB"``, ``"8 GB"``, or bytes; for what the step holds, without what the
            allocator rounds up and without the driver's own.
        min_keep_ratio: bound on the variance that WTA-CRS may add; 1 leaves every gradient exact.
        precision: dtype of the products, as in a recipe.

    Raises:
        ConfigError: a bad value, or nothing fits; the message says what the smallest takes.
        SiteError: the model has no sites for the methods given.
        UnsupportedError: the model's forward asks for numbers, or its weights are quantised.
    """
    num_bytes = parse_budget(budget)
    check_count("batch_size", batch_size, least=1)
    if not 0 < min_keep_ratio <= 1:
        raise ConfigError(
            f"plan: min_keep_ratio must be above 0 and at most 1, got {min_keep_ratio!r}; 1 leaves "
            "every gradient exact"
        )
    if precision not in _DTYPES:
        raise ConfigError(f"plan: precision must be one of {list(_DTYPES)}, got {precision!r}")
    search = _Search(model, batch_size, max_length, num_bytes, precision)
    ways = [search.best(methods)]
    for others in _candidates(methods, min_keep_ratio):
        # What has no such parts, or nothing to sample, is no way.
        try:
            ways.append(search.best((*methods, *others)))
        except SiteError:
            continue
    ways.sort(key=lambda way: (not way.fits, way.relative_time if way.fits else way.peak))
    if not ways[0].fits:
        raise ConfigError(_nothing_fits(search, ways[0], budget))
    return dataclasses.replace(ways[0], alternatives=tuple(ways[1:]))


def _candidates(
    given: Sequence[MethodConfig], min_keep_ratio: float
) -> Iterator[tuple[MethodConfig, ...]]:
    """Yield what may be added to the methods given, on axes that they leave free."""
    axes = {registry.get(method.method).axis for method in given}
    recomputed = [()] if "recompute" in axes else [(), *((Checkpoint(parts=(p,)),) for p in _PARTS)]
    ratios = [r for r in _RATIOS if r >= min_keep_ratio and "rows" not in axes]
    for first in recomputed:
        for second in [(), *((WTACRS(keep_ratio=ratio),) for ratio in ratios)]:
            if first or second:
                yield (*first, *second)


class _Search:
    """A search knows a model and a budget, and finds the largest micro-batch of some methods."""

    def __init__(
        self, model: Any, batch_size: int, max_length: int, budget: int, precision: Precision
    ) -> None:
        module = model if isinstance(model, nn.Module) else build_on_meta(model)
        self.name = type(module).__name__
        weight = next(module.parameters(), torch.empty(0))
        gpu = "cuda" if torch.cuda.is_available() else "cpu"
        self._device = torch.device(gpu) if weight.is_meta else weight.device
        self._batch = token_batch(module, batch_size, max_length, self._device)
        self._blueprint = Blueprint(module, self._device)
        self._fixed = {"budget": budget, "max_length": max_length, "precision": precision}
        self._budget, self._dtype = budget, _DTYPES[precision]
        self._plain: float | None = None

    @property
    def batch_size(self) -> int:
        return len(self._batch["input_ids"])

    def best(self, methods: Sequence[MethodConfig]) -> Plan:
        """Return the way with the largest micro-batch that fits, or with one sample."""
        whole = self.way(methods, self.batch_size)
        if whole.fits:
            return whole
        fixed = whole.weights + whole.optimizer + whole.gradients
        for size in _halved(self.batch_size):
            # What grows with the batch does so in proportion, but for what is rounded.
            guess = fixed + max(0, whole.peak - fixed) * size / self.batch_size
            if guess <= self._budget or size == 1:
                way = self.way(methods, size)
                if way.fits or size == 1:
                    return way
        return whole

    def way(self, methods: Sequence[MethodConfig], size: int) -> Plan:
        """Forecast some methods on micro-batches of a size."""
        batch = {name: tensor[-size:] for name, tensor in self._batch.items()}
        found = self._blueprint.forecast(batch, methods, self._dtype)
        steps = self.batch_size // size
        time = self._seconds(found, steps)
        self._plain = self._plain or time
        return Plan(
            methods=tuple(methods),
            batch_size=size,
            accumulation_steps=steps,
            weights=found.weights,
            gradients=found.gradients,
            optimizer=found.optimizer,
            activations=found.activations,
            peak=found.peak(accumulates=steps > 1),
            relative_time=time / self._plain,
            **self._fixed,  # type: ignore[arg-type]
        )

    def _seconds(self, found: Forecast, steps: int) -> float:
        """Estimate an optimiser step: products, bytes moved, and what each operation costs."""
        is_half = self._dtype is not None
        flops, traffic, each = by_device(
            self._device, cpu=(5e10, 1e10, 5e-6), gpu=(4e14 if is_half else 5e13, 3e12, 1e-5)
        )
        passes = found.flops / flops + found.traffic / traffic + found.num_operations * each
        # AdamW reads a gradient, and reads and writes a weight and its state.
        return steps * passes + (3 * found.gradients + 2 * found.optimizer) / traffic


def _halved(batch_size: int) -> Iterator[int]:
    """Yield the micro-batches below a batch: halves as long as they are whole, then one sample."""
    size = batch_size
    while size % 2 == 0:
        size //= 2
        yield size
    if size > 1:
        yield 1


def _nothing_fits(search: _Search, smallest: Plan, budget: str | int) -> str:
    below = f", below the weights' {format_bytes(smallest.weights)}"
    text = (
        f"plan: budget must be at least {_rounded_up(smallest.peak)} for {search.name}, got "
        f"{budget}{below if smallest.weights > smallest.budget else ''}; the smallest is "
        f"{describe(smallest.methods)} on {smallest.batch_size} x {smallest.max_length} tokens at a "
        "time: raise it or shorten max_length"
    )
    if any(registry.get(m.method).axis == "trained" for m in smallest.methods):
        return text
    try:
        lora = search.way((LoRA(), *smallest.methods), smallest.batch_size)
    except LeantuneError:
        return text
    return f"{text}, or train LoRA's factors alone (leantune.LoRA()), in {_rounded_up(lora.peak)}"


def _rounded_up(num_bytes: int) -> str:
    return f"{-(-num_bytes // 2**20)}MiB"
