"""Optimisers for sparse gradients, paired with a dense one."""

import copy

import pytest
import torch
from torch import Tensor, nn

from leantune.core.optim import PairedOptimizer, paired

# torch's own warning about its own sparse tensors.
pytestmark = pytest.mark.filterwarnings("ignore:Sparse invariant checks:UserWarning")
SHAPE = (3, 4)


def sparse(positions: list[int], values: list[float]) -> Tensor:
    at = torch.tensor([[p // SHAPE[1] for p in positions], [p % SHAPE[1] for p in positions]])
    return torch.sparse_coo_tensor(at, torch.tensor(values), SHAPE, check_invariants=False)


def pair(**options) -> tuple[nn.Parameter, nn.Parameter, torch.optim.Optimizer]:
    dense, thin = nn.Parameter(torch.ones(5)), nn.Parameter(torch.ones(SHAPE))
    return dense, thin, paired(torch.optim.AdamW, [dense, thin], [thin], options)


def set_gradients(dense: nn.Parameter, thin: nn.Parameter, seed: int) -> None:
    rng = torch.Generator().manual_seed(seed)
    dense.grad = torch.randn(5, generator=rng)
    picked = torch.randperm(12, generator=rng)[:3].tolist()
    thin.grad = sparse(picked, torch.randn(3, generator=rng).tolist())


def test_each_part_does_what_it_does_alone() -> None:
    dense, thin, optimizer = pair(lr=0.1, weight_decay=0.5)
    assert isinstance(optimizer, PairedOptimizer)
    alone = [nn.Parameter(p.detach().clone()) for p in (dense, thin)]
    parts = [
        torch.optim.AdamW([alone[0]], lr=0.1, weight_decay=0.5),
        torch.optim.SparseAdam([alone[1]], lr=0.1),
    ]
    for seed in range(4):
        set_gradients(dense, thin, seed)
        set_gradients(alone[0], alone[1], seed)
        optimizer.step()
        for part in parts:
            part.step()
    assert torch.equal(dense, alone[0]) and torch.equal(thin, alone[1])
    optimizer.zero_grad()
    assert dense.grad is None and thin.grad is None


def test_schedulers_reach_every_part() -> None:
    dense, thin, optimizer = pair(lr=0.1)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5**step)
    for seed in range(2):
        set_gradients(dense, thin, seed)
        optimizer.step()
        schedule.step()
    rates = [g["lr"] for part in optimizer.parts for g in part.param_groups]
    assert rates == [g["lr"] for g in optimizer.param_groups] == [0.025, 0.025]


@pytest.mark.parametrize("way", ["state_dict", "deepcopy"])
def test_a_resumed_pair_goes_on_to_the_bit(way: str) -> None:
    dense, thin, optimizer = pair(lr=0.1)
    for seed in range(2):
        set_gradients(dense, thin, seed)
        optimizer.step()
    if way == "deepcopy":
        other_dense, other_thin, other = copy.deepcopy((dense, thin, optimizer))
    else:
        other_dense, other_thin, other = pair(lr=0.7)
        other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        for p, q in ((other_dense, dense), (other_thin, thin)):
            p.data.copy_(q.data)
    for seed in (2, 3):
        for a, b, o in ((dense, thin, optimizer), (other_dense, other_thin, other)):
            set_gradients(a, b, seed)
            o.step()
    assert torch.equal(dense, other_dense) and torch.equal(thin, other_thin)
    assert other.param_groups[1]["lr"] == 0.1


def test_a_later_group_goes_to_the_first_part() -> None:
    _, _, optimizer = pair(lr=0.1)
    late = nn.Parameter(torch.ones(2))
    optimizer.add_param_group({"params": [late]})
    assert [len(part.param_groups) for part in optimizer.parts] == [2, 1]
    late.grad = torch.ones(2)
    optimizer.step()
    assert (late < 1).all()
    fresh = pair(lr=0.1)[2]
    fresh.add_param_group({"params": [nn.Parameter(torch.ones(2))]})
    fresh.load_state_dict(optimizer.state_dict())
    assert fresh.parts[0].param_groups[1]["params"][0] in fresh.state


def test_closure_is_evaluated_once() -> None:
    dense, thin, optimizer = pair(lr=0.1)
    calls = []

    def closure() -> float:
        set_gradients(dense, thin, len(calls))
        calls.append(1)
        return 3.0

    assert optimizer.step(closure) == 3.0 and len(calls) == 1
