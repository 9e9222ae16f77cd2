"""Rows sorted by group: every copy where it belongs, gather and scatter as transposes."""

import pytest
import torch
from torch import Tensor

from leantune.ops.groups import combine, dispatch, grouped_linear, route, spread

G = 5


def chosen_groups(n: int = 9, num_active: int = 2, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(n, G, generator=generator).argsort(1)[:, :num_active].sort(1).values


@pytest.mark.parametrize("multiple", [1, 4])
def test_route_sorts_by_group_and_keeps_the_order_inside(multiple: int) -> None:
    chosen = chosen_groups()
    routing = route(chosen, G, multiple)
    sizes = routing.read_sizes()
    members = [[t for t in range(9) if g in chosen[t]] for g in range(G)]
    assert sizes == [-(-len(m) // multiple) * multiple for m in members]
    lists = routing.rows[: sum(sizes)].split(sizes)
    for found, wanted in zip(lists, members, strict=True):
        assert found.tolist() == wanted + [0] * (len(found) - len(wanted))
    groups = torch.arange(G).repeat_interleave(torch.tensor(sizes))
    weights = spread(torch.arange(1.0, 19.0).view(9, 2), routing)
    for t in range(9):
        for a in range(2):
            place = routing.places[a, t]
            assert routing.rows[place] == t and groups[place] == chosen[t, a]
            assert weights[place] == 2 * t + a + 1
    assert weights.sum() == 171.0 and weights.shape == (sum(sizes), 1)


def test_length_of_all_lists_does_not_depend_on_the_choice() -> None:
    """Otherwise the host would have to read it before rows are gathered."""
    lengths = set()
    for seed in range(9):
        routing = route(chosen_groups(seed=seed), G, 8)
        assert sum(routing.read_sizes()) <= len(routing.rows)
        lengths.add(len(routing.rows))
    assert lengths == {18 + 7 * G}
    assert len(route(chosen_groups(), G).rows) == 18


@pytest.mark.parametrize("multiple", [1, 4])
def test_dispatch_and_combine_are_transposes(multiple: int) -> None:
    routing = route(chosen_groups(), G, multiple)
    m = sum(routing.read_sizes())
    x = torch.randn(9, 3, dtype=torch.float64, requires_grad=True)
    y = torch.randn(m, 3, dtype=torch.float64, requires_grad=True)
    weights = torch.rand(9, 2, dtype=torch.float64, requires_grad=True)
    assert torch.equal(dispatch(x, routing), x[routing.rows[:m]])
    scaled = y * spread(weights, routing)  # nothing of what only fills lists
    wanted = torch.zeros_like(x).index_add(0, routing.rows[:m], scaled)
    torch.testing.assert_close(combine(scaled, routing), wanted)
    left = (dispatch(x, routing) * scaled).sum()
    torch.testing.assert_close(left, (x * combine(scaled, routing)).sum())

    def there_and_back(x: Tensor, y: Tensor, weights: Tensor) -> Tensor:
        scale = spread(weights, routing)
        return combine(dispatch(x, routing) * y * scale, routing)

    assert torch.autograd.gradcheck(there_and_back, (x, y, weights))
    (grad,) = torch.autograd.grad(combine(y * spread(weights, routing), routing).sum(), y)
    assert torch.equal(grad, spread(weights, routing).expand_as(y))


SIZES = (3, 0, 4, 1)


@pytest.mark.parametrize("dim", [0, 1])
def test_each_group_has_its_slice_of_the_weight(dim: int) -> None:
    """Groups without a row, with their zeros in the weight's gradient, and what is added to."""
    x = torch.randn(8, 3, dtype=torch.float64, requires_grad=True)
    shape = (8, 3) if dim == 0 else (2, 12)
    weight = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    bias = None if dim else torch.randn(8, dtype=torch.float64, requires_grad=True)
    onto = torch.randn(8, 2, dtype=torch.float64, requires_grad=True)
    slices, rows = weight.chunk(4, dim), x.split(SIZES)
    wanted = torch.cat([t @ w.t() for t, w in zip(rows, slices, strict=True)])
    repeated = [] if bias is None else zip(bias.chunk(4), SIZES, strict=True)
    biases = 0 if bias is None else torch.cat([b.repeat(n, 1) for b, n in repeated])
    got = grouped_linear(x, weight, bias, SIZES, dim=dim)
    torch.testing.assert_close(got, wanted + biases)
    start = onto.clone()
    added = grouped_linear(x, weight, None, SIZES, dim=dim, onto=start, scaling=0.5)
    assert added.data_ptr() == start.data_ptr()
    torch.testing.assert_close(added, onto + 0.5 * wanted)

    def both(x: Tensor, weight: Tensor, onto: Tensor, *bias: Tensor) -> Tensor:
        y = grouped_linear(x, weight, bias[0] if bias else None, SIZES, dim=dim)
        onto = onto.clone()
        return y + grouped_linear(x, weight, None, SIZES, dim=dim, onto=onto, scaling=0.5)

    inputs = (x, weight, onto, *([] if bias is None else [bias]))
    assert torch.autograd.gradcheck(both, inputs)


def test_frozen_weight_keeps_no_input() -> None:
    kept: list[Tensor] = []
    x, weight = torch.randn(8, 3, requires_grad=True), torch.randn(8, 3)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        grouped_linear(x, weight, None, SIZES)
        assert all(t is weight for t in kept)
        grouped_linear(x, weight.requires_grad_(), None, SIZES)
    assert any(t.data_ptr() == x.data_ptr() for t in kept)
