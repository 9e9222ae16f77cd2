"""Rows sorted by group: gather, scatter and matrix products, without a dropped row.

Legend: n rows, A groups that each row goes to, m = n A routed rows, G groups, d features.
"""

from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from leantune.ops.autocast import autocast_dtype, autocast_off

_ALIGNMENT = 16  # bytes; what the grouped product asks of every stride


class Routing(NamedTuple):
    """Where routed rows come from and where they lie once they are sorted by group.

    Args:
        rows: (m,) int64, the row that each sorted one is a copy of; ascending within a group.
        choices: (m,) int64, the choice that each sorted row follows, as a place in (n, A).
        places: (n, A) int64, where each row's copies lie.
        groups: (m,) int64 ascending, the group of each sorted row.
        ends: (G,) int32, where each group's rows end.
    """

    rows: Tensor
    choices: Tensor
    places: Tensor
    groups: Tensor
    ends: Tensor


def route(chosen: Tensor, num_groups: int) -> Routing:
    """Sort rows by the groups that they go to; stable, and never read on the host.

    Args:
        chosen: (n, A) int64 group numbers, distinct within a row.
        num_groups: G.
    """
    flat = chosen.reshape(-1)
    order = flat.argsort(stable=True)
    places = torch.empty_like(order).scatter_(
        0, order, torch.arange(len(order), device=order.device)
    )
    groups = flat.index_select(0, order)
    numbers = torch.arange(num_groups, device=flat.device)
    ends = torch.searchsorted(groups, numbers, right=True, out_int32=True)
    return Routing(order // chosen.shape[1], order, places.view_as(chosen), groups, ends)


def dispatch(x: Tensor, routing: Routing) -> Tensor:
    """Copy rows to their groups: (n, d) -> (m, d); its transpose is :func:`combine`.

    The gradient of a row is the sum over its copies in a fixed order, unlike an ``index_add`` of
    atomic additions.
    """
    return _Dispatch.apply(x, routing.rows, routing.places)  # type: ignore[no-any-return]


def combine(y: Tensor, routing: Routing) -> Tensor:
    """Add up the copies of every row: (m, d) -> (n, d)."""
    return _Combine.apply(y, routing.rows, routing.places)  # type: ignore[no-any-return]


class _Dispatch(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, rows: Tensor, places: Tensor) -> Tensor:
        ctx.save_for_backward(places)
        return x.index_select(0, rows)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor):  # type: ignore[override]
        (places,) = ctx.saved_tensors
        return _sum_copies(grad_output, places), None, None


class _Combine(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y: Tensor, rows: Tensor, places: Tensor) -> Tensor:
        ctx.save_for_backward(rows)
        return _sum_copies(y, places)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor):  # type: ignore[override]
        (rows,) = ctx.saved_tensors
        return grad_output.index_select(0, rows), None, None


def _sum_copies(y: Tensor, places: Tensor) -> Tensor:
    return y.index_select(0, places.reshape(-1)).view(*places.shape, -1).sum(1)


def grouped_linear(x: Tensor, weights: Tensor, bias: Tensor | None, routing: Routing) -> Tensor:
    """Return ``x_i weights[g_i]^T + bias[g_i]`` for rows sorted by group, as one grouped product.

    Where torch has no grouped product for the device and dtype, one product per group runs
    instead, which asks the host for the groups' sizes.

    Args:
        x: (m, d_in), in the order of ``routing``.
        weights: (G, d_out, d_in), any strides that keep one of the last two dimensions dense.
        bias: (G, d_out) or None.
        routing: of ``x``.

    Returns:
        (m, d_out).
    """
    dtype = autocast_dtype(x) or weights.dtype
    if not has_grouped_product(x.device.type, dtype):
        return _by_segment(x.to(dtype), weights, bias, routing)
    num_out = weights.shape[1]
    with autocast_off(x):
        y = _Grouped.apply(*_aligned(x.to(dtype), weights.to(dtype)), routing.ends)
        y = y[:, :num_out]  # type: ignore[index]
        if bias is None:
            return y
        # As a product, so that the bias gradient is one as well instead of atomic additions.
        numbers = torch.arange(len(weights), device=x.device)
        is_mine = (routing.groups[:, None] == numbers).to(dtype)  # (m, G)
        return torch.addmm(y, is_mine, bias.to(dtype))


def _by_segment(x: Tensor, weights: Tensor, bias: Tensor | None, routing: Routing) -> Tensor:
    ends = routing.ends.tolist()
    biases = [None] * len(ends) if bias is None else bias.unbind(0)
    starts = [0, *ends[:-1]]
    parts = zip(starts, ends, weights.unbind(0), biases, strict=True)
    return torch.cat([F.linear(x[start:end], w, b) for start, end, w, b in parts])


def _aligned(x: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """Pad narrow factors with zeros to the strides that the grouped product asks for."""
    multiple = _ALIGNMENT // x.element_size()
    pad_in, pad_out = -x.shape[1] % multiple, -weights.shape[1] % multiple
    if pad_in:
        x = F.pad(x, (0, pad_in))
    if pad_in or pad_out:
        weights = F.pad(weights, (0, pad_in, 0, pad_out))
    return x, weights


class _Grouped(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weights: Tensor, ends: Tensor) -> Tensor:
        ctx.save_for_backward(x if ctx.needs_input_grad[1] else None, weights, ends)
        return F.grouped_mm(x, weights.transpose(1, 2), offs=ends)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor):  # type: ignore[override]
        x, weights, ends = ctx.saved_tensors
        grad_output = grad_output.contiguous()
        grad_x = grad_weights = None
        if ctx.needs_input_grad[0]:
            grad_x = F.grouped_mm(grad_output, weights, offs=ends)
        if ctx.needs_input_grad[1]:
            grad_weights = F.grouped_mm(grad_output.t(), x, offs=ends)
        return grad_x, grad_weights, None


@cache
def has_grouped_product(device: str, dtype: torch.dtype) -> bool:
    """Say whether torch multiplies rows by group in one call, by trying a tiny product."""
    if not hasattr(F, "grouped_mm"):
        return False
    x = torch.ones(16, 16, dtype=dtype, device=device)
    ends = torch.tensor([8, 16], dtype=torch.int32, device=device)
    try:
        with torch.no_grad():
            F.grouped_mm(x, x.expand(2, 16, 16).contiguous(), offs=ends)
            F.grouped_mm(x.t(), x, offs=ends)
    except (RuntimeError, ValueError):
        return False
    return True
