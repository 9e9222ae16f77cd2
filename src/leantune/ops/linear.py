"""The one linear autograd Function: exact output and input gradient, pluggable activation store.

Legend: n rows (all leading dimensions flattened), d_in, d_out.
"""

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from leantune.ops.stores import ActivationStore, Draw, Packed


def linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    store: ActivationStore,
    draw: Draw | None = None,
) -> Tensor:
    """Return ``x weight^T + bias``; only the weight gradient comes from what ``store`` kept.

    The output, the input gradient and the bias gradient are the plain linear's, to the bit in
    float32. Under autocast the product runs in the autocast dtype; the weight is cast again in
    backward, so that no second copy of it is kept. A frozen weight keeps no input.

    Args:
        x: (..., d_in).
        weight: (d_out, d_in).
        bias: (d_out,) or None.
        store: decides what is kept of ``x``; unused where the weight is frozen.
        draw: random numbers for a sampling store.

    Returns:
        (..., d_out).
    """
    return _Linear.apply(x, weight, bias, store, draw, _autocast_dtype(x))  # type: ignore[no-any-return]


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
        store: ActivationStore,
        draw: Draw | None,
        dtype: torch.dtype | None,
    ) -> Tensor:
        xc, wc, bc = (t if t is None or dtype is None else t.to(dtype) for t in (x, weight, bias))
        assert xc is not None and wc is not None
        with _autocast_off(x):
            y = F.linear(xc, wc, bc)
            packed = store.pack(xc, draw, x) if ctx.needs_input_grad[1] else Packed(())
        ctx.save_for_backward(weight, *packed.tensors)
        ctx.meta = packed.meta
        ctx.store = store
        ctx.dtypes = (x.dtype, None if bias is None else bias.dtype)
        ctx.shape = x.shape
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor):  # type: ignore[override]
        weight, *tensors = ctx.saved_tensors
        x_dtype, bias_dtype = ctx.dtypes
        grads: list[Tensor | None] = [None, None, None]
        g2 = grad_output.reshape(-1, grad_output.shape[-1])
        with _autocast_off(grad_output):
            if ctx.needs_input_grad[0]:
                grads[0] = (g2 @ weight.to(g2.dtype)).view(ctx.shape).to(x_dtype)
            if ctx.needs_input_grad[1]:
                packed = Packed(tuple(tensors), ctx.meta)
                grads[1] = ctx.store.grad_weight(packed, grad_output).to(weight.dtype)
            if ctx.needs_input_grad[2]:
                grads[2] = g2.sum(0).to(bias_dtype)
        return (*grads, None, None, None)
