"""Swapping: the same parameter objects, hooks, ties and names, and the same modules back."""

import pytest
import torch
from torch import Tensor, nn

import leantune as lt
from leantune.core.linear import ConvertedLinear, converted, share_parameters_as, swap
from leantune.core.runtime import Runtime
from leantune.errors import SiteError


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(6, 4)
        self.inner = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4))
        self.out = nn.Linear(4, 6, bias=False)
        self.out.weight = self.embed.weight

    def forward(self, ids: Tensor) -> Tensor:
        return self.out(self.inner(self.embed(ids)))


def test_twin_shares_everything() -> None:
    old = nn.Linear(3, 2)
    seen = []
    old.register_forward_hook(lambda *_: seen.append("before"))
    new = converted(old, Runtime(old, 0))
    assert isinstance(new, ConvertedLinear) and isinstance(new, nn.Linear)
    assert new.weight is old.weight and new.bias is old.bias
    assert (new.in_features, new.out_features) == (3, 2)
    new.register_forward_hook(lambda *_: seen.append("after"))
    x = torch.randn(5, 3)
    assert torch.equal(new(x), old(x))
    assert seen == ["before", "after"] * 2
    # A parameter replaced on one side is replaced on the other, as sharding does.
    new.weight = nn.Parameter(torch.ones(2, 3))
    assert old.weight is new.weight
    assert not hasattr(old, "runtime")


def test_twin_has_its_own_training_flag() -> None:
    old = nn.Linear(3, 2)
    new = share_parameters_as(ConvertedLinear, old)
    new.eval()
    assert old.training and not new.training


def test_swap_and_undo() -> None:
    model = Tied()
    old, state = model.inner[2], list(model.state_dict())
    new = converted(old, Runtime(old, 0))
    change = swap(model, "inner.2", new)
    assert model.inner[2] is new and list(model.state_dict()) == state
    assert list(dict(model.inner.named_children())) == ["0", "1", "2"]
    model.eval()
    change.undo()
    assert model.inner[2] is old and not old.training


def test_the_root_cannot_be_swapped() -> None:
    with pytest.raises(SiteError, match="must be a module inside the model, got the model itself"):
        swap(nn.Linear(2, 2), "", nn.Linear(2, 2))


def test_ties_survive_and_the_tied_gradient_is_the_sum() -> None:
    model = Tied()
    ids = torch.randint(0, 6, (3, 5))
    model(ids).square().sum().backward()
    plain = model.embed.weight.grad
    model.zero_grad()
    session = lt.apply(model, lt.WTACRS(keep_ratio=1.0, sites=["out", "inner.*"]))
    assert isinstance(model.out, ConvertedLinear) and model.out.weight is model.embed.weight
    model(ids).square().sum().backward()
    assert plain is not None and torch.equal(model.embed.weight.grad, plain)
    session.remove()
    assert type(model.out) is nn.Linear and model.out.weight is model.embed.weight


def test_hooks_survive_apply_and_remove() -> None:
    model = Tied()
    calls = []
    model.inner[0].register_forward_hook(lambda *_: calls.append("forward"))
    model.inner[0].register_full_backward_hook(lambda *_: calls.append("backward"))
    model.inner[0].weight.register_hook(lambda grad: calls.append("weight"))
    session = lt.apply(model, lt.WTACRS(min_rows=1))
    for _ in range(2):
        model(torch.randint(0, 6, (3, 5))).sum().backward()
        assert sorted(calls) == ["backward", "forward", "weight"]
        calls.clear()
        session.remove()


def test_optimizer_made_before_apply_still_trains() -> None:
    model = Tied()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    session = lt.apply(model, lt.WTACRS(min_rows=1))
    before = model.inner[0].weight.detach().clone()
    model(torch.randint(0, 6, (3, 5))).square().sum().backward()
    optimizer.step()
    assert not torch.equal(model.inner[0].weight, before)
    trained = model.inner[0].weight.detach().clone()
    session.remove()
    assert torch.equal(model.inner[0].weight, trained)


def test_conv1d_equals_the_plain_layer() -> None:
    from transformers.pytorch_utils import Conv1D

    old = Conv1D(6, 4)
    new = converted(old, Runtime(old, 0))
    assert new.weight is old.weight and isinstance(new.weight, nn.Parameter)
    x = torch.randn(2, 3, 4, requires_grad=True)
    grad_output = torch.randn(2, 3, 6)
    results = []
    for layer in (old, new):
        y = layer(x)
        results.append([y, *torch.autograd.grad(y, (x, old.weight, old.bias), grad_output)])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_moving_and_casting_the_model_reaches_the_twin() -> None:
    model = Tied()
    session = lt.apply(model, lt.WTACRS(min_rows=1))
    model.double()
    assert model.inner[0].weight.dtype == torch.float64
    model(torch.randint(0, 6, (3, 5))).sum().backward()
    session.remove()
    assert model.inner[0].weight.dtype == torch.float64
