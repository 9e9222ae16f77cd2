"""Rows sorted by group: gather and scatter, without a dropped row.

Legend: n rows, A groups that each row goes to, m = n A routed rows, G groups, d features.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


class Routing(NamedTuple):
    """Where routed rows come from and where they lie once they are sorted by group.

    Args:
        rows: (m,) int64, the row that each sorted one is a copy of; ascending within a group.
        choices: (m,) int64, the choice that each sorted row follows, as a place in (n, A).
        places: (n, A) int64, where each row's copies lie.
        ends: (G,) int32, where each group's rows end.
    """

    rows: Tensor
    choices: Tensor
    places: Tensor
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
    return Routing(order // chosen.shape[1], order, places.view_as(chosen), ends)


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
