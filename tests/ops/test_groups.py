"""Rows sorted by group: every copy where it belongs, gather and scatter as transposes, products."""

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from leantune.ops.groups import (
    Routing,
    combine,
    dispatch,
    grouped_linear,
    has_grouped_product,
    route,
)

G = 5


def chosen_groups(n: int = 9, num_active: int = 2, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(n, G, generator=generator).argsort(1)[:, :num_active].sort(1).values


def test_route_sorts_by_group_and_keeps_the_order_inside() -> None:
    chosen = chosen_groups()
    routing = route(chosen, G)
    wanted = [(g, t) for g in range(G) for t in range(9) if g in chosen[t]]
    assert list(zip(routing.groups.tolist(), routing.rows.tolist(), strict=True)) == wanted
    assert routing.ends.tolist() == [sum(1 for g, _ in wanted if g <= i) for i in range(G)]
    assert routing.ends.dtype == torch.int32
    for t in range(9):
        for a in range(2):
            place = routing.places[t, a]
            assert routing.rows[place] == t and routing.groups[place] == chosen[t, a]
            assert routing.choices[place] == 2 * t + a


def test_dispatch_and_combine_are_transposes() -> None:
    routing = route(chosen_groups(), G)
    x = torch.randn(9, 3, dtype=torch.float64, requires_grad=True)
    y = torch.randn(18, 3, dtype=torch.float64, requires_grad=True)
    assert torch.equal(dispatch(x, routing), x[routing.rows])
    wanted = torch.zeros_like(x).index_add(0, routing.rows, y)
    torch.testing.assert_close(combine(y, routing), wanted)
    left, right = (dispatch(x, routing) * y).sum(), (x * combine(y, routing)).sum()
    torch.testing.assert_close(left, right)
    assert torch.autograd.gradcheck(lambda x: dispatch(x, routing), x)
    assert torch.autograd.gradcheck(lambda y: combine(y, routing), y)


def plain(x: Tensor, weights: Tensor, bias: Tensor | None, routing: Routing) -> Tensor:
    rows = [
        F.linear(row, weights[g], None if bias is None else bias[g])
        for row, g in zip(x, routing.groups.tolist(), strict=True)
    ]
    return torch.stack(rows)


@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("d_in", "d_out"), [(16, 8), (3, 8), (16, 5), (3, 5)])
def test_grouped_linear_is_one_linear_per_row(d_in, d_out, dtype, with_bias: bool) -> None:
    """Widths that the grouped product wants padded included, and a group without rows."""
    chosen = chosen_groups(12)
    chosen[chosen == 3] = 4
    chosen = torch.stack([chosen.amin(1), torch.full((12,), 4)], 1)
    chosen[:, 0].clamp_(max=2)
    routing = route(chosen, G)
    leaves = [torch.randn(24, d_in), torch.randn(G, d_out, d_in), torch.randn(G, d_out)]
    leaves = [t.to(dtype).requires_grad_() for t in leaves][: 3 if with_bias else 2]
    grad = torch.randn(24, d_out).to(dtype)
    results = []
    for function in (grouped_linear, plain):
        x, weights, bias = (*leaves, None)[:3]
        y = function(x, weights, bias, routing)
        results.append([y, *torch.autograd.grad(y, leaves, grad)])
    eps = torch.finfo(dtype).eps
    for got, wanted in zip(*results, strict=True):
        torch.testing.assert_close(got, wanted, rtol=8 * eps, atol=64 * eps)
    # The group without rows has a gradient of zero, not of whatever lay in memory.
    assert (results[0][2][3] == 0).all()
    assert not torch.allclose(1.01 * results[0][2], results[1][2], rtol=8 * eps, atol=0.0)


def test_views_of_one_weight_are_multiplied_without_a_copy() -> None:
    """Column slices of a down projection, as they lie in a (d_out, F) weight."""
    weight = torch.randn(16, 8 * G, requires_grad=True)
    stack = weight.unflatten(1, (G, -1)).movedim(1, 0)
    assert stack.untyped_storage().data_ptr() == weight.untyped_storage().data_ptr()
    routing = route(chosen_groups(), G)
    h = torch.randn(18, 8)
    torch.testing.assert_close(
        grouped_linear(h, stack, None, routing), plain(h, stack, None, routing)
    )


def test_autocast_multiplies_in_its_dtype() -> None:
    routing = route(chosen_groups(), G)
    x, weights = torch.randn(18, 16, requires_grad=True), torch.randn(G, 8, 16, requires_grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = grouped_linear(x, weights, None, routing)
        y.float().sum().backward()
    assert y.dtype == torch.bfloat16
    assert x.grad is not None and x.grad.dtype == torch.float32
    torch.testing.assert_close(y.float(), plain(x, weights, None, routing), rtol=0.05, atol=0.1)


def test_missing_grouped_product_is_noticed(monkeypatch) -> None:
    assert not has_grouped_product("cpu", torch.int64)
    has_grouped_product.cache_clear()
    monkeypatch.delattr(F, "grouped_mm")
    try:
        assert not has_grouped_product("cpu", torch.float32)
        routing = route(chosen_groups(), G)
        x, weights = torch.randn(18, 16), torch.randn(G, 8, 16)
        got = grouped_linear(x, weights, None, routing)
        torch.testing.assert_close(got, plain(x, weights, None, routing))
    finally:
        has_grouped_product.cache_clear()
