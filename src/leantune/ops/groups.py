"""Rows sorted by group: gather, products with a slice of a weight for each group, and scatter.

Legend: n rows, A groups that each row goes to, m routed rows, G groups, d features.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from leantune.ops.backend import read_later


class Routing(NamedTuple):
    """Where routed rows come from and where they lie once they are sorted by group.

    m is n A where no list is rounded up. Rows that only fill a list, after the routed ones of their
    group, are copies of the first.

    Args:
        rows: (m or more,) int64, the row that each sorted one is a copy of; ascending in a group.
        places: (A, n) int64, where each row's copies lie.
        read_sizes: returns how long each group's list is, as soon as a GPU has counted.
    """

    rows: Tensor
    places: Tensor
    read_sizes: Callable[[], list[int]]


def route(chosen: Tensor, num_groups: int, multiple: int = 1) -> Routing:
    """Sort rows by the groups that they go to; stable, and nothing waits for a GPU.

    Args:
        chosen: (n, A) int64 group numbers, distinct within a row.
        num_groups: G.
        multiple: a power of two; lists are rounded up to it, so that their products fill a GPU's
            tiles and have few different shapes.
    """
    n, num_active = chosen.shape
    by_choice = chosen.t()  # (A, n)
    ranks = chosen.new_zeros(num_groups, n).scatter_(0, by_choice, 1).cumsum(1)  # from 1
    sizes = ranks[:, -1]
    if multiple > 1:
        sizes = sizes.add(multiple - 1).bitwise_and_(-multiple)
    read_sizes = read_later(sizes)
    before = sizes.cumsum(0).sub_(sizes).sub_(1)
    places = ranks.add(before[:, None]).gather(0, by_choice)
    rows = chosen.new_zeros(n * num_active + num_groups * (multiple - 1))
    rows.index_put_((places,), torch.arange(n, device=chosen.device))
    return Routing(rows, places, read_sizes)


def dispatch(x: Tensor, routing: Routing) -> Tensor:
    """Copy rows to their groups: (n, d) -> (m, d); its transpose is :func:`combine`.

    The gradient of a row is the sum over its copies in a fixed order, unlike an ``index_add`` of
    atomic additions.
    """
    return _Dispatch.apply(x, routing)  # type: ignore[no-any-return]


def combine(y: Tensor, routing: Routing) -> Tensor:
    """Add up the copies of every row: (m, d) -> (n, d).

    What only fills lists gets a gradient as well, that of the first row: whoever multiplies by
    :func:`spread` stops it.
    """
    return _Combine.apply(y, routing)  # type: ignore[no-any-return]


def spread(weights: Tensor, routing: Routing) -> Tensor:
    """Give each copy its weight, and zero to what only fills lists: (n, A) -> (m, 1)."""
    spread = weights.new_zeros(sum(routing.read_sizes()))
    return spread.index_put_((routing.places,), weights.t())[:, None]


def grouped_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    sizes: Sequence[int],
    *,
    dim: int = 0,
    onto: Tensor | None = None,
    scaling: float = 1.0,
) -> Tensor:
    """Multiply each group's rows by its slice of a weight, all into one tensor.

    Nothing is cut up or put together, in forward or backward: every product writes where its result
    belongs. A frozen weight keeps no input. All tensors have the same dtype, under autocast too.

    Args:
        x: (m, d_in of a slice), sorted by group.
        weight: (d_out, d_in), cut into G slices of equal size along ``dim``.
        bias: (d_out,), cut with the weight; not with ``dim=1`` or ``onto``.
        sizes: how many rows each of the G groups has, m together.
        dim: 0 to cut output features, 1 to cut input features.
        onto: (m, d_out of a slice), changed in place: ``scaling`` times the products are added.
        scaling: multiplies the products.

    Returns:
        (m, d_out of a slice), ``onto`` itself if it is given.
    """
    return _GroupedLinear.apply(  # type: ignore[no-any-return]
        x, weight, bias, onto, tuple(sizes), dim, scaling
    )


class _Dispatch(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, routing: Routing) -> Tensor:
        ctx.save_for_backward(routing.places)
        copies = x.index_select(0, routing.rows)  # while the sizes are on their way
        return copies[: sum(routing.read_sizes())]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor):  # type: ignore[override]
        return _sum_copies(grad_output, *ctx.saved_tensors), None


class _Combine(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y: Tensor, routing: Routing) -> Tensor:
        ctx.save_for_backward(routing.rows[: len(y)])
        return _sum_copies(y, routing.places)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor):  # type: ignore[override]
        return grad_output.index_select(0, *ctx.saved_tensors), None


class _GroupedLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        onto: Tensor | None,
        sizes: tuple[int, ...],
        dim: int,
        scaling: float,
    ) -> Tensor:
        ctx.save_for_backward(x if ctx.needs_input_grad[1] else None, weight)
        ctx.sizes, ctx.dim, ctx.scaling = sizes, dim, scaling
        slices = weight.chunk(len(sizes), dim)
        if onto is not None:
            ctx.mark_dirty(onto)
        y = x.new_empty(len(x), len(slices[0])) if onto is None else onto
        outputs = y.split_with_sizes(sizes)
        starts = outputs if bias is None else bias.chunk(len(sizes))
        scale = {"beta": int(onto is not None or bias is not None), "alpha": scaling}
        for out, start, rows, w in zip(
            outputs, starts, x.split_with_sizes(sizes), slices, strict=True
        ):
            torch.addmm(start, rows, w.t(), **scale, out=out)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor):  # type: ignore[override]
        x, weight = ctx.saved_tensors
        num, sizes = len(ctx.sizes), ctx.sizes
        scale = {"beta": 0, "alpha": ctx.scaling}
        grads, slices = grad_output.split_with_sizes(sizes), weight.chunk(num, ctx.dim)
        grad_x = grad_weight = grad_bias = grad_onto = None
        if ctx.needs_input_grad[0]:
            grad_x = grad_output.new_empty(len(grad_output), slices[0].shape[1])
            for out, g, w in zip(grad_x.split_with_sizes(sizes), grads, slices, strict=True):
                out.addmm_(g, w, **scale)
        if ctx.needs_input_grad[1]:
            grad_weight = torch.empty_like(weight)
            outputs = grad_weight.chunk(num, ctx.dim)
            for out, g, rows in zip(outputs, grads, x.split_with_sizes(sizes), strict=True):
                out.addmm_(g.t(), rows, **scale)
        if ctx.needs_input_grad[2]:
            grad_bias = torch.cat([g.sum(0) for g in grads])
        if ctx.needs_input_grad[3]:
            grad_onto = grad_output
        return grad_x, grad_weight, grad_bias, grad_onto, None, None, None


def _sum_copies(y: Tensor, places: Tensor) -> Tensor:
    return y.index_select(0, places.view(-1)).view(*places.shape, -1).sum(0)
