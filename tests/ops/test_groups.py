"""Rows sorted by group: every copy where it belongs, gather and scatter as transposes."""

import torch
from torch import Tensor

from leantune.ops.groups import combine, dispatch, route

G = 5


def chosen_groups(n: int = 9, num_active: int = 2, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(n, G, generator=generator).argsort(1)[:, :num_active].sort(1).values


def test_route_sorts_by_group_and_keeps_the_order_inside() -> None:
    chosen = chosen_groups()
    routing = route(chosen, G)
    wanted = [(g, t) for g in range(G) for t in range(9) if g in chosen[t]]
    sizes = routing.ends.diff(prepend=routing.ends.new_zeros(1))
    groups = torch.arange(G).repeat_interleave(sizes)
    assert list(zip(groups.tolist(), routing.rows.tolist(), strict=True)) == wanted
    assert routing.ends.tolist() == [sum(1 for g, _ in wanted if g <= i) for i in range(G)]
    assert routing.ends.dtype == torch.int32
    for t in range(9):
        for a in range(2):
            place = routing.places[t, a]
            assert routing.rows[place] == t and groups[place] == chosen[t, a]
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
