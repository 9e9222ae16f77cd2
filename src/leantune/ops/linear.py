"""The one linear autograd Function: exact output and input gradient, pluggable activation store.

Legend: n rows (all leading dimensions flattened), d_in, d_out.
"""

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from leantune.ops.stores import ActivationStore, Draw, GradientRule, Packed, flatten, grad_weight


def linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    store: ActivationStore,
    draw: Draw | None = None,
    trained: Tensor | None = None,
    rule: GradientRule | None = None,
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

    Returns:
        (..., d_out).
    """
    assert (trained is None) == (rule is None)
    dtype = _autocast_dtype(x)
    return _Linear.apply(x, weight, bias, trained, store, draw, rule, dtype)  # type: ignore[no-any-return]


def _autocast_dtype(x: Tensor) -> torch.dtype | None:
    """Return the dtype that autocast gives a product of ``x``, or None; float64 is left alone."""
    device = x.device.type
    if x.dtype == torch.float64 or not torch.amp.is_autocast_available(device):
        return None
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None


def _autocast_off(x: Tensor) -> AbstractContextManager:
    """Return a context without autocast; devices such as meta have none to switch off."""
    device = x.device.type
    if torch.amp.is_autocast_available(device):
        return torch.autocast(device, enabled=False)
    return nullcontext()


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        trained: Tensor | None,
        store: ActivationStore,
        draw: Draw | None,
        rule: GradientRule | None,
        dtype: torch.dtype | None,
    ) -> Tensor:
        xc, wc, bc = (t if t is None or dtype is None else t.to(dtype) for t in (x, weight, bias))
        assert xc is not None and wc is not None
        with _autocast_off(x):
            y = F.linear(xc, wc, bc)
            trains = ctx.needs_input_grad[1 if rule is None else 3]
            packed = store.pack(xc, draw, x, rule) if trains else Packed(())
        ctx.save_for_backward(weight, *packed.tensors)
        ctx.meta = packed.meta
        ctx.store, ctx.rule = store, rule
        ctx.dtypes = [None if t is None else t.dtype for t in (x, weight, bias, trained)]
        ctx.shape = x.shape
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor):  # type: ignore[override]
        weight, *tensors = ctx.saved_tensors
        rule = ctx.rule
        grads: list[Tensor | None] = [None, None, None, None]
        g2 = flatten(grad_output)
        with _autocast_off(grad_output):
            if ctx.needs_input_grad[0]:
                grads[0] = (g2 @ weight.to(g2.dtype)).view(ctx.shape)
            if ctx.needs_input_grad[1 if rule is None else 3]:
                packed = Packed(tuple(tensors), ctx.meta)
                factors = ctx.store.grad_factors(packed, grad_output, rule)
                if rule is None:
                    grads[1] = grad_weight(factors)
                else:
                    grads[3] = rule.grad(factors)
            if ctx.needs_input_grad[2]:
                grads[2] = g2.sum(0)
        cast = [g if g is None else g.to(d) for g, d in zip(grads, ctx.dtypes, strict=True)]
        return (*cast, None, None, None, None)
