"""A sparse Adam and another optimiser that act as one."""

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


def pair(kind: type[torch.optim.Optimizer] = torch.optim.AdamW, **options):
    dense, thin = nn.Parameter(torch.ones(5)), nn.Parameter(torch.ones(SHAPE))
    return dense, thin, paired(kind, [dense, thin], [thin], options)


def set_gradients(dense: nn.Parameter, thin: nn.Parameter, seed: int) -> None:
    rng = torch.Generator().manual_seed(seed)
    dense.grad = torch.randn(5, generator=rng)
    picked = torch.randperm(12, generator=rng)[:3].tolist()
    thin.grad = sparse(picked, torch.randn(3, generator=rng).tolist())


@pytest.mark.parametrize("kind", [torch.optim.AdamW, torch.optim.Adagrad])
def test_each_part_does_what_it_does_alone(kind: type[torch.optim.Optimizer]) -> None:
    """Adagrad has a state before its first step."""
    dense, thin, optimizer = pair(kind, lr=0.1, weight_decay=0.5)
    assert isinstance(optimizer, PairedOptimizer)
    alone = [nn.Parameter(p.detach().clone()) for p in (dense, thin)]
    parts = [
        kind([alone[0]], lr=0.1, weight_decay=0.5),
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


def test_parameters_of_one_sort_need_no_pair() -> None:
    dense, thin, _ = pair(lr=0.1)
    assert type(paired(torch.optim.AdamW, [dense], [thin], {"lr": 0.1})) is torch.optim.AdamW
    alone = paired(torch.optim.AdamW, [thin], [thin], {"lr": 0.1, "weight_decay": 0.5})
    assert type(alone) is torch.optim.SparseAdam and alone.param_groups[0]["lr"] == 0.1


def test_schedulers_reach_every_part() -> None:
    dense, thin, optimizer = pair(lr=0.1)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5**step)
    for seed in range(2):
        set_gradients(dense, thin, seed)
        optimizer.step()
        schedule.step()
    rates = [g["lr"] for part in (optimizer.sparse, optimizer.dense) for g in part.param_groups]
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


def test_a_later_group_is_the_dense_optimizers_with_its_defaults() -> None:
    _, _, optimizer = pair(lr=0.1, weight_decay=0.5)
    late = nn.Parameter(torch.ones(2))
    optimizer.add_param_group({"params": [late]})
    assert [len(part.param_groups) for part in (optimizer.sparse, optimizer.dense)] == [1, 2]
    assert optimizer.param_groups[2]["weight_decay"] == 0.5
    late.grad = torch.ones(2)
    optimizer.step()
    assert (late < 1).all()
    fresh = pair(lr=0.1)[2]
    fresh.add_param_group({"params": [nn.Parameter(torch.ones(2))]})
    fresh.load_state_dict(optimizer.state_dict())
    assert fresh.dense.param_groups[1]["params"][0] in fresh.state


def test_closure_is_evaluated_once() -> None:
    dense, thin, optimizer = pair(lr=0.1)
    calls = []

    def closure() -> float:
        set_gradients(dense, thin, len(calls))
        calls.append(1)
        return 3.0

    assert optimizer.step(closure) == 3.0 and len(calls) == 1
