"""Fidelity measures how far a converted model's gradient is from the exact one."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import inf, isfinite, sqrt
from typing import Any

import torch
from torch import Tensor, nn

from leantune.core.restore import RandomState, find_session, restored_afterwards
from leantune.core.tensors import iter_tensors
from leantune.errors import ConfigError
from leantune.measure.entries import module_of
from leantune.measure.step import Batch, LossFn, Step, make_step
from leantune.measure.text import table

_ALL = "all of the above"
# A self-normalised sum of independent errors exceeds 5 once in a million draws of the test.
_SUSPICIOUS = 5.0


@dataclass(frozen=True)
class ParameterFidelity:
    """A parameter's fidelity is the error of its gradient ``g`` against the exact ``dW``.

    Args:
        name: of the parameter; the module is everything before the last dot.
        num_elements: of the gradient.
        exact_norm: ``||dW||``.
        relative_variance: mean over draws of ``||g - dW||^2 / ||dW||^2``.
        relative_bias: ``||mean(g) - dW|| / ||dW||``.
        expected_bias: size of ``relative_bias`` that noise alone leaves, if there is no bias:
            ``sqrt(relative_variance / num_draws)``.
        bias_ratio: ``relative_bias / expected_bias``; about 1 without a bias, at most
            ``sqrt(num_draws)``, which a constant error reaches.
        cosine: mean over draws of the cosine between ``g`` and ``dW``.
        batch_variance: ``E ||g_b - mean||^2 / ||mean||^2`` of the exact gradients over batches:
            the noise that training has anyway; None where no other batches were given.
    """

    name: str
    num_elements: int
    exact_norm: float
    relative_variance: float
    relative_bias: float
    expected_bias: float
    bias_ratio: float
    cosine: float
    batch_variance: float | None = None

    @property
    def module(self) -> str:
        """Return the name of the module that owns the parameter."""
        return module_of(self.name)

    @property
    def looks_biased(self) -> bool:
        """Return whether the bias is beyond what chance gives once in a million."""
        return self.bias_ratio > _SUSPICIOUS


@dataclass(frozen=True)
class Fidelity:
    """A fidelity holds the gradient error of every parameter that a method's sampling reaches.

    Args:
        parameters: those whose gradient differed from the exact one in any draw.
        overall: the same figures for the gradients of ``parameters`` taken as one vector; None
            if every gradient was exact.
        exact_parameters: names of those whose gradient was exact in every draw.
        num_draws: draws measured.
        num_batches: batches behind ``batch_variance``; 1 means that it was not measured.
    """

    parameters: tuple[ParameterFidelity, ...]
    overall: ParameterFidelity | None
    exact_parameters: tuple[str, ...]
    num_draws: int
    num_batches: int

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON types; an infinite figure (exact gradient zero) becomes None."""

        def plain(item: ParameterFidelity) -> dict[str, Any]:
            return {
                key: None if isinstance(value, float) and not isfinite(value) else value
                for key, value in vars(item).items()
            }

        return {
            "num_draws": self.num_draws,
            "num_batches": self.num_batches,
            "overall": None if self.overall is None else plain(self.overall),
            "parameters": [plain(item) for item in self.parameters],
            "exact_parameters": list(self.exact_parameters),
        }

    def rows(self) -> list[tuple[str, ...]]:
        """Return a heading, then a row for each parameter, worst first, and the overall row."""
        ranked = sorted(self.parameters, key=lambda item: -item.relative_variance)
        found = [
            (
                item.name,
                f"{item.relative_variance:.4g}",
                "-" if item.batch_variance is None else f"{item.batch_variance:.4g}",
                f"{item.relative_bias:.4g}",
                f"{item.expected_bias:.4g}",
                f"{item.bias_ratio:.2f}" + (" !" if item.looks_biased else ""),
                f"{item.cosine:.4f}",
            )
            for item in (*ranked, *([] if self.overall is None else [self.overall]))
        ]
        header = ("parameter", "variance", "of batches", "bias", "by chance", "ratio", "cosine")
        return [header, *found]

    def table(self) -> str:
        """Return the rows as plain text, and how they were taken."""
        header, *rows = self.rows()
        return (
            f"{table(header, rows)}\n\n{self.num_draws} draws; relative to the exact gradient; "
            f"{len(self.exact_parameters)} parameters have an exact gradient"
        )


def fidelity(
    model: nn.Module,
    batch: Batch,
    num_draws: int = 64,
    *,
    loss: LossFn | None = None,
    batches: Sequence[Batch] | None = None,
) -> Fidelity:
    """Compare gradients over ``num_draws`` draws with the exact gradient of the same batch.

    Generator states are the same before every run: dropout draws the same masks, and only the
    methods' own noise is measured. Sums are kept, never a stack of draws. Afterwards the model
    and its session are as before.

    Args:
        model: converted.
        batch: keyword arguments, positional arguments or the only argument of the model.
        num_draws: >= 2; a bias shows up to ``sqrt(num_draws)`` times its size by chance, so that
            at least 32 are needed to tell it from chance.
        loss: output -> scalar; by default found in the output as ``ledger`` does.
        batches: further batches of the same task; they and ``batch`` give ``batch_variance``.

    Raises:
        UnsupportedError: the model is on the meta device.
        ConfigError: no session, too few draws, an empty batch, or no differentiable output.
    """
    if num_draws < 2:
        raise ConfigError(
            f"fidelity: num_draws must be at least 2, got {num_draws}; the default is 64"
        )
    session = _session(model)
    step = make_step("fidelity", model, batch, loss)
    others = [make_step("fidelity", model, item, loss) for item in batches or ()]
    tensors = list(iter_tensors([s.tensors() for s in (step, *others)]))
    with restored_afterwards(model, tensors) as random, torch.enable_grad():
        model.train()
        with session.exact():
            exact = _gradients(step, random)
        noise = _Noise(exact)
        for _ in range(num_draws):
            noise.add(_gradients(step, random))
        spread = _Spread()
        for item in (step, *others) if others else ():
            with session.exact():
                spread.add(_gradients(item, random))
    # Below the rounding of the dtype lies what a GPU's unordered sums change by themselves.
    named = model.named_parameters()
    resolution = {name: torch.finfo(p.dtype).eps for name, p in named if p.requires_grad}
    reached = [name for name, eps in resolution.items() if noise.differs(name, eps)]
    return Fidelity(
        parameters=tuple(noise.figures(name, (name,), spread) for name in reached),
        overall=noise.figures(_ALL, reached, spread) if reached else None,
        exact_parameters=tuple(name for name in exact if name not in reached),
        num_draws=num_draws,
        num_batches=1 + len(others),
    )


def _session(model: nn.Module) -> Any:
    session = find_session(model)
    if session is None:
        raise ConfigError(
            f"fidelity: model must be converted, got {type(model).__name__} without a session; "
            "call leantune.apply on it first"
        )
    return session


class _Noise:
    """The noise is kept as sums of the error, and one float triple per draw and parameter.

    Parameters that have a gradient in a draw alone join ``exact``, with zeros.
    """

    def __init__(self, exact: dict[str, Tensor]) -> None:
        self._exact = exact
        self._exact_square = {name: _square(value) for name, value in exact.items()}
        self._error_sum: dict[str, Tensor] = {}
        # (||g - dW||^2, ||g||^2, <g, dW>) of each draw
        self._draws: list[dict[str, tuple[float, float, float]]] = []

    def add(self, drawn: dict[str, Tensor]) -> None:
        figures: dict[str, tuple[float, float, float]] = {}
        for name in self._exact.keys() | drawn.keys():
            exact, g = self._exact.get(name), drawn.get(name)
            if exact is None:
                assert g is not None
                exact = self._exact[name] = torch.zeros_like(g)
                self._exact_square[name] = 0.0
            g = torch.zeros_like(exact) if g is None else g
            error = g - exact
            figures[name] = (_square(error), _square(g), _dot(g, exact))
            if figures[name][0] > 0:
                total = self._error_sum.get(name)
                self._error_sum[name] = error if total is None else total.add_(error)
        self._draws.append(figures)

    def differs(self, name: str, resolution: float) -> bool:
        """Return whether any draw was off by more than ``resolution`` relative to the norm."""
        limit = resolution**2 * self._exact_square.get(name, 0.0)
        return any(draw[name][0] > limit for draw in self._draws if name in draw)

    def figures(self, name: str, names: Sequence[str], spread: "_Spread") -> ParameterFidelity:
        """Return the figures of the named gradients taken as one vector."""
        num_draws = len(self._draws)
        exact = sum(self._exact_square[n] for n in names)
        sums = [
            [sum(draw[n][i] for n in names if n in draw) for i in range(3)] for draw in self._draws
        ]
        variance = sum(error for error, _, _ in sums) / num_draws
        bias = sum(_square(self._error_sum[n]) for n in names if n in self._error_sum)
        bias /= num_draws**2
        cosines = [dot / sqrt(own * exact) if own * exact > 0 else 0.0 for _, own, dot in sums]

        def relative(square: float) -> float:
            return square / exact if exact > 0 else inf

        return ParameterFidelity(
            name=name,
            num_elements=sum(self._exact[n].numel() for n in names),
            exact_norm=sqrt(exact),
            relative_variance=relative(variance),
            relative_bias=sqrt(relative(bias)),
            expected_bias=sqrt(relative(variance / num_draws)),
            bias_ratio=sqrt(bias / (variance / num_draws)),
            cosine=sum(cosines) / num_draws,
            batch_variance=spread.relative_variance(names),
        )


class _Spread:
    """The spread is kept as running sums of exact gradients over batches."""

    def __init__(self) -> None:
        self._num_batches = 0
        self._sum: dict[str, Tensor] = {}
        self._square: dict[str, float] = {}

    def add(self, gradients: dict[str, Tensor]) -> None:
        self._num_batches += 1
        for name, g in gradients.items():
            self._square[name] = self._square.get(name, 0.0) + _square(g)
            total = self._sum.get(name)
            self._sum[name] = g if total is None else total.add_(g)

    def relative_variance(self, names: Sequence[str]) -> float | None:
        if self._num_batches < 2:
            return None
        n = self._num_batches
        mean_square = sum(_square(self._sum[k]) for k in names if k in self._sum) / n**2
        square = sum(self._square.get(k, 0.0) for k in names)
        if mean_square == 0:
            return inf
        # Rounding may leave a tiny negative number where all batches are equal.
        return max(0.0, (square - n * mean_square) / (n - 1)) / mean_square


def _gradients(step: Step, random: RandomState) -> dict[str, Tensor]:
    random.restore()
    output, loss = step.forward()
    del output
    torch.autograd.backward(loss)
    gradients: dict[str, Tensor] = {}
    for name, parameter in step.model.named_parameters():
        if parameter.grad is not None:
            grad = parameter.grad.to_dense() if parameter.grad.is_sparse else parameter.grad
            wide = torch.promote_types(grad.dtype, torch.float32)
            gradients[name] = grad.detach().to(wide)
            parameter.grad = None
    return gradients


def _square(tensor: Tensor) -> float:
    return float(tensor.square().sum(dtype=torch.float64))


def _dot(a: Tensor, b: Tensor) -> float:
    return float((a * b).sum(dtype=torch.float64))
