"""Rows sorted by group: every copy where it belongs, gather and scatter as transposes."""

import pytest
import torch
from torch import Tensor

from leantune.ops.groups import combine, dispatch, route

G = 5


def chosen_groups(n: int = 9, num_active: int = 2, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(n, G, generator=generator).argsort(1)[:, :num_active].sort(1).values


@pytest.mark.parametrize("multiple", [1, 4])
def test_route_sorts_by_group_and_keeps_the_order_inside(multiple: int) -> None:
    chosen = chosen_groups()
    routing = route(chosen, G, multiple)
    members = [[t for t in range(9) if g in chosen[t]] for g in range(G)]
    assert routing.sizes.tolist() == [-(-len(m) // multiple) * multiple for m in members]
    lists = routing.rows.split([*routing.sizes, len(routing.rows) - int(routing.sizes.sum())])
    for found, wanted in zip(lists, [*members, []], strict=True):
        assert found.tolist() == wanted + [0] * (len(found) - len(wanted))
    groups = torch.arange(G).repeat_interleave(routing.sizes)
    for t in range(9):
        for a in range(2):
            place = routing.places[t, a]
            assert routing.rows[place] == t and groups[place] == chosen[t, a]
            assert routing.choices[place] == 2 * t + a


def test_length_of_all_lists_does_not_depend_on_the_choice() -> None:
    """Otherwise the host would have to read it before rows are gathered."""
    lengths = set()
    for seed in range(9):
        routing = route(chosen_groups(seed=seed), G, 8)
        assert int(routing.sizes.sum()) <= len(routing.rows)
        lengths.add(len(routing.rows))
    assert lengths == {56}  # 18 copies and at most 7 more in each group, in eights
    assert len(route(chosen_groups(), G).rows) == 18


@pytest.mark.parametrize("multiple", [1, 4])
def test_dispatch_and_combine_are_transposes(multiple: int) -> None:
    routing = route(chosen_groups(), G, multiple)
    m = int(routing.sizes.sum())
    x = torch.randn(9, 3, dtype=torch.float64, requires_grad=True)
    y = torch.randn(m, 3, dtype=torch.float64, requires_grad=True)
    assert torch.equal(dispatch(x, routing), x[routing.rows])
    real = torch.zeros(m, 1, dtype=torch.float64).index_fill(0, routing.places.flatten(), 1.0)
    wanted = torch.zeros_like(x).index_add(0, routing.rows[:m], real * y)
    torch.testing.assert_close(combine(y, routing), wanted)
    left, right = (dispatch(x, routing)[:m] * real * y).sum(), (x * combine(y, routing)).sum()
    torch.testing.assert_close(left, right)
    assert torch.autograd.gradcheck(lambda x: dispatch(x, routing)[:m] * real, x)
    assert torch.autograd.gradcheck(lambda y: combine(y, routing), y)
    (grad,) = torch.autograd.grad(combine(y, routing).sum(), y)
    assert torch.equal(grad, real.expand_as(y))
