"""What a linear's backward keeps of its input, and what it forms of it: stores and rules.

Legend: n rows (all leading dimensions flattened), k kept rows, d_in, d_out, w features kept.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor


class Draw(NamedTuple):
    """One draw of random numbers: a pure function of these, never of a generator's state.

    Args:
        seed: the session's seed, with the rank folded in.
        number: 0-d int64 on the input's device; counts the training forwards of the model.
    """

    seed: int
    number: Tensor


class Packed(NamedTuple):
    """What a store keeps: tensors for ``save_for_backward`` and plain metadata."""

    tensors: tuple[Tensor, ...]
    meta: Any = None


class Factors(NamedTuple):
    """One term ``scale * left^T right`` of a weight gradient, not multiplied out yet.

    Args:
        left: (k, d_out), from the output's gradient.
        right: (k, w), from what was kept of the input.
        scale: () float32 or None for 1; keeps ``left`` in range in float16.
    """

    left: Tensor
    right: Tensor
    scale: Tensor | None = None


class GradientRule(Protocol):
    """Says which parameter a linear trains in its weight's stead, and forms that one's gradient.

    A rule sees the weight gradient as factors, so that what it does not want is never formed.
    """

    width: int | None
    """Features kept of each input row, w; None for all of them."""

    def project(self, rows: Tensor) -> Tensor:
        """Return what the rule needs of input rows (n, d_in), (n, w); linear, row by row."""
        ...

    def grad(self, factors: Sequence[Factors]) -> Tensor:
        """Return the gradient of the rule's parameter, in its shape."""
        ...


class Cut(NamedTuple):
    """What is left of an output's gradient.

    Args:
        rows: (n, u), the gradient of the output units in ``units``.
        units: (u,) int64, each once; None for all of them in order.
    """

    rows: Tensor
    units: Tensor | None = None


GradientCut = Callable[[Tensor], Cut]
"""Leaves less of a linear's output gradient (n, d_out): input, weight and bias see what is left."""


class ActivationStore(Protocol):
    """Decides what one linear keeps of its input, and how its weight gradient is formed of it."""

    def pack(
        self, x: Tensor, draw: Draw | None, origin: Tensor, rule: GradientRule | None = None
    ) -> Packed:
        """Choose what to keep of ``x`` (..., d_in), already in the dtype of the product.

        ``origin`` is the tensor that the caller passed, before any cast: its identity tells
        which linears read one input. Of the rows it keeps, the store keeps ``rule.project``.
        """
        ...

    def grad_factors(
        self, packed: Packed, grad_output: Tensor, rule: GradientRule | None = None
    ) -> Sequence[Factors]:
        """Return the terms of the weight gradient, from ``grad_output`` (..., d_out)."""
        ...

    def saved_bytes(
        self, shape: torch.Size, dtype: torch.dtype, rule: GradientRule | None = None
    ) -> int:
        """Bytes kept of an input of ``shape``; equal to what the ledger measures."""
        ...


class ExactStore:
    """Keeps the whole input: the plain linear's behaviour."""

    def pack(
        self, x: Tensor, draw: Draw | None, origin: Tensor, rule: GradientRule | None = None
    ) -> Packed:
        return Packed((x if rule is None else rule.project(flatten(x)),))

    def grad_factors(
        self, packed: Packed, grad_output: Tensor, rule: GradientRule | None = None
    ) -> Sequence[Factors]:
        return [exact_factors(packed.tensors[0], grad_output)]

    def saved_bytes(
        self, shape: torch.Size, dtype: torch.dtype, rule: GradientRule | None = None
    ) -> int:
        return shape[:-1].numel() * width(shape, rule) * dtype.itemsize


def flatten(x: Tensor) -> Tensor:
    """Return ``x`` (..., d) as rows, (n, d)."""
    return x.reshape(-1, x.shape[-1])


def width(shape: torch.Size, rule: GradientRule | None) -> int:
    """Return how many features of each row are kept of an input of ``shape``."""
    return shape[-1] if rule is None or rule.width is None else rule.width


def exact_factors(x: Tensor, grad_output: Tensor) -> Factors:
    """Return the factors over all rows, as the plain linear has them."""
    return Factors(flatten(grad_output), flatten(x))


def grad_weight(factors: Sequence[Factors]) -> Tensor:
    """Multiply out the terms of a weight gradient, (d_out, w)."""
    total = None
    for left, right, scale in factors:
        term = left.t() @ right
        if scale is not None:
            term = term.float() * scale
        total = term if total is None else total + term
    assert total is not None
    return total
