"""The one linear autograd Function: exact output and input gradient, pluggable activation store.

Legend: n rows (all leading dimensions flattened), d_in, d_out.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from leantune.ops.autocast import autocast_dtype, autocast_off
from leantune.ops.stores import (
    ActivationStore,
    Draw,
    GradientCut,
    GradientRule,
    Packed,
    flatten,
    grad_weight,
)


def linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    store: ActivationStore,
    draw: Draw | None = None,
    trained: Tensor | None = None,
    rule: GradientRule | None = None,
    cut: GradientCut | None = None,
) -> Tensor:
    """Return ``x weight^T + bias``; only the weight gradient comes from what ``store`` kept.

    The output, the input gradient and the bias gradient are the plain linear's, to the bit in
    float32. Under autocast the product runs in the autocast dtype; the weight is cast again in
    backward, so that no second copy of it is kept. A frozen weight keeps no input.

    Args:
        x: (..., d_in).
        weight: (d_out, d_in).
        bias: (d_out,) or None.
        store: decides what is kept of ``x``; unused where nothing trains.
        draw: random numbers for a sampling store.
        trained: the parameter that ``rule`` trains in the weight's stead, of any shape; the weight
            itself then gets no gradient.
        rule: forms the gradient of ``trained``; given together with it.
        cut: leaves less of the output's gradient, before anything is formed of it; not with a rule.

    Returns:
        (..., d_out).
    """
    assert (trained is None) == (rule is None) and (rule is None or cut is None)
    dtype = autocast_dtype(x)
    with torch.no_grad():
        xc = x if dtype is None else x.to(dtype)
    # Saved first, multiplied second: where a block is checkpointed, its recomputation ends with the
    # last tensor saved, and so without the last product (a quarter to a third of a pre-norm block).
    promise = _Linear.apply(x, xc.detach(), weight, bias, trained, store, draw, rule, cut)
    wc, bc = (t if t is None else t.detach() for t in (weight, bias))
    return _Product.apply(promise, xc.detach(), wc, bc, dtype)  # type: ignore[no-any-return]


class _Linear(torch.autograd.Function):
    """Saves what backward needs and forms all gradients; its output only stands for the product."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        xc: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        trained: Tensor | None,
        store: ActivationStore,
        draw: Draw | None,
        rule: GradientRule | None,
        cut: GradientCut | None,
    ) -> Tensor:
        trains = ctx.needs_input_grad[2 if rule is None else 4]
        with autocast_off(x):
            kept = x if xc.dtype == x.dtype else xc
            packed = store.pack(kept, draw, x, rule) if trains else Packed(())
        ctx.save_for_backward(weight, *packed.tensors)
        ctx.meta = packed.meta
        ctx.store, ctx.rule, ctx.cut = store, rule, cut
        ctx.dtypes = [None if t is None else t.dtype for t in (x, weight, bias, trained)]
        ctx.shape = x.shape
        # One element however large the output: the promise is never read.
        return xc.new_empty(()).expand(*x.shape[:-1], len(weight))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor):  # type: ignore[override]
        weight, *tensors = ctx.saved_tensors
        rule = ctx.rule
        grads: list[Tensor | None] = [None, None, None, None]
        g2 = flatten(grad_output)
        units = None
        with autocast_off(grad_output):
            if ctx.cut is not None:
                g2, units = ctx.cut(g2)
            if ctx.needs_input_grad[0]:
                used = weight if units is None else weight.index_select(0, units)
                grads[0] = (g2 @ used.to(g2.dtype)).view(ctx.shape)
            if ctx.needs_input_grad[2 if rule is None else 4]:
                packed = Packed(tuple(tensors), ctx.meta)
                factors = ctx.store.grad_factors(packed, g2, rule)
                if rule is None:
                    grads[1] = _spread(grad_weight(factors), units, len(weight))
                else:
                    grads[3] = rule.grad(factors)
            if ctx.needs_input_grad[3]:
                grads[2] = _spread(g2.sum(0), units, len(weight))
        for_x, *others = [
            g if g is None else g.to(d) for g, d in zip(grads, ctx.dtypes, strict=True)
        ]
        return (for_x, None, *others, None, None, None, None)


def _spread(rows: Tensor, units: Tensor | None, d_out: int) -> Tensor:
    """Put the rows of ``units`` (u, ...) into (d_out, ...), zero elsewhere."""
    if units is None:
        return rows
    return rows.new_zeros(d_out, *rows.shape[1:]).index_copy_(0, units, rows)


class _Product(torch.autograd.Function):
    """The product itself; keeps nothing, and hands its gradient to the promise."""

    @staticmethod
    def forward(
        ctx: Any,
        promise: Tensor,
        xc: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        dtype: torch.dtype | None,
    ) -> Tensor:
        wc, bc = (t if t is None or dtype is None else t.to(dtype) for t in (weight, bias))
        assert wc is not None
        with autocast_off(xc):
            return F.linear(xc, wc, bc)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor):  # type: ignore[override]
        return grad_output, None, None, None, None
