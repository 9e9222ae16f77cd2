"""Rows sorted by group: gather and scatter, without a dropped row.

Legend: n rows, A groups that each row goes to, m routed rows, G groups, d features.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


class Routing(NamedTuple):
    """Where routed rows come from and where they lie once they are sorted by group.

    m is n A where no list is rounded up, and else the most that it can be. Rows that only fill
    lists, after the routed ones of their group and after all, are copies of the first.

    Args:
        rows: (m,) int64, the row that each sorted one is a copy of; ascending within a group.
        choices: (m,) int64, the choice that each sorted row follows, as a place in (n, A).
        places: (n, A) int64, where each row's copies lie.
        sizes: (G,) int64, how long each group's list is.
    """

    rows: Tensor
    choices: Tensor
    places: Tensor
    sizes: Tensor


def route(chosen: Tensor, num_groups: int, multiple: int = 1) -> Routing:
    """Sort rows by the groups that they go to; stable, and never read on the host.

    Args:
        chosen: (n, A) int64 group numbers, distinct within a row.
        num_groups: G.
        multiple: lists are rounded up to it, so that their products fill a GPU's tiles and have
            few different shapes.
    """
    n, num_active = chosen.shape
    by_choice = chosen.t()  # (A, n)
    goes = chosen.new_zeros(num_groups, n).scatter_(0, by_choice, 1)
    ranks = goes.cumsum(1)  # within the group, from 1
    sizes = ranks[:, -1].add(multiple - 1).div(multiple, rounding_mode="floor") * multiple
    starts = sizes.cumsum(0) - sizes
    places = (ranks + (starts - 1)[:, None]).gather(0, by_choice).t()
    num_rows = -(-(n * num_active + num_groups * (multiple - 1)) // multiple) * multiple
    numbers = torch.arange(n * num_active, device=chosen.device)
    choices = chosen.new_zeros(num_rows).scatter_(0, places.reshape(-1), numbers)
    return Routing(choices // num_active, choices, places, sizes)


def dispatch(x: Tensor, routing: Routing) -> Tensor:
    """Copy rows to their groups: (n, d) -> (m, d); its transpose is :func:`combine`.

    The gradient of a row is the sum over its copies in a fixed order, unlike an ``index_add`` of
    atomic additions.
    """
    return _Dispatch.apply(x, routing.rows, routing.places)  # type: ignore[no-any-return]


def combine(y: Tensor, routing: Routing) -> Tensor:
    """Add up the copies of every row: (m, d) -> (n, d); what only fills lists has no gradient."""
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
        ctx.num_rows = len(y)
        ctx.save_for_backward(rows if len(y) == places.numel() else places)
        return _sum_copies(y, places)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor):  # type: ignore[override]
        (places,) = ctx.saved_tensors
        if places.ndim == 1:  # rows: no list was rounded up
            return grad_output.index_select(0, places), None, None
        grad = grad_output.new_zeros(ctx.num_rows, grad_output.shape[1])
        copies = grad_output[:, None].expand(*places.shape, -1)
        return grad.index_put_((places,), copies), None, None


def _sum_copies(y: Tensor, places: Tensor) -> Tensor:
    return y.index_select(0, places.reshape(-1)).view(*places.shape, -1).sum(1)
