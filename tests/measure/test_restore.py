"""A measurement leaves no trace on the model, its session, the generators or the gradients."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from leantune.measure.fidelity import fidelity
from leantune.measure.ledger import ledger


class CountingSession:
    """The least that a converted model's session offers."""

    def __init__(self) -> None:
        self.norms = torch.zeros(3)
        self.auxiliary = nn.Parameter(torch.ones(5))

    def state_dict(self) -> dict[str, Tensor]:
        return {"norms": self.norms}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        self.norms = state["norms"]

    def auxiliary_loss(self) -> Tensor:
        self.norms += 1
        return self.auxiliary.sum() * 0

    @contextmanager
    def exact(self) -> Iterator[None]:
        yield


class Replacing(nn.Module):
    """Replaces one buffer by a new tensor and changes another in place."""

    count: Tensor
    total: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("count", torch.zeros(2))
        self.register_buffer("total", torch.zeros(2))

    def forward(self, x: Tensor) -> Tensor:
        self.count = self.count + 1
        self.total.data += 1
        return x


def make_model() -> nn.Sequential:
    model = nn.Sequential(
        nn.Linear(2, 4), nn.BatchNorm1d(4), Replacing(), nn.Dropout(0.5), nn.Linear(4, 3)
    )
    model._leantune_session = CountingSession()  # type: ignore[assignment]
    return model


MEASUREMENTS: list[Callable[[nn.Module, Any], Any]] = [
    lambda model, batch: ledger(model, batch),
    lambda model, batch: fidelity(model, batch, num_draws=2),
]


@pytest.mark.parametrize("measure", MEASUREMENTS, ids=["ledger", "fidelity"])
@pytest.mark.parametrize("fails", [False, True], ids=["returns", "raises"])
def test_everything_is_put_back(measure: Callable[..., Any], fails: bool) -> None:
    torch.manual_seed(0)
    model: Any = make_model()
    session = model._leantune_session
    model.train()
    model[1].eval()
    x = torch.randn(6, 2, requires_grad=True)
    x.grad = torch.full_like(x, 3.0)
    model[0].weight.grad = torch.full_like(model[0].weight, 2.0)
    if fails:
        model[4].forward = _fail
    leaves = [x, *model.parameters()]
    values = [leaf.detach().clone() for leaf in leaves]
    grads = [leaf.grad for leaf in leaves]
    grad_values = [None if g is None else g.clone() for g in grads]
    buffers = dict(model.named_buffers())
    buffer_values = {name: b.clone() for name, b in buffers.items()}
    flags = [module.training for module in model.modules()]
    stream = torch.get_rng_state()

    if fails:
        with pytest.raises(RuntimeError, match="the forward fails"):
            measure(model, x)
    else:
        measure(model, x)

    assert all(a is b.grad for a, b in zip(grads, leaves, strict=True))
    for now, before in zip(leaves, values, strict=True):
        assert torch.equal(now.detach(), before)
    for now, before in zip(grads, grad_values, strict=True):
        assert (now is None) == (before is None)
        assert now is None or before is None or torch.equal(now, before)
    assert all(b is buffers[name] for name, b in model.named_buffers())
    assert all(torch.equal(b, buffer_values[name]) for name, b in buffers.items())
    assert [module.training for module in model.modules()] == flags
    assert torch.equal(torch.get_rng_state(), stream)
    assert torch.equal(session.norms, torch.zeros(3))
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def _fail(x: Tensor) -> Tensor:
    raise RuntimeError("the forward fails")


def test_the_model_trains_on_as_if_it_had_not_been_measured() -> None:
    def train(is_measured: bool) -> list[Tensor]:
        torch.manual_seed(0)
        model, x = make_model(), torch.randn(6, 2)
        optimizer = torch.optim.AdamW(model.parameters())
        for _ in range(3):
            model(x).square().sum().backward()
            if is_measured:
                ledger(model, x, optimizer=optimizer)
                fidelity(model, x, num_draws=2)
            optimizer.step()
            optimizer.zero_grad()
        return [p.detach() for p in model.parameters()] + list(model.buffers())

    for measured, plain in zip(train(True), train(False), strict=True):
        assert torch.equal(measured, plain)


def test_the_callers_graph_survives() -> None:
    class Scale(nn.Module):
        scale: Tensor

        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("scale", torch.full((2,), float("inf")))
            self.weight = nn.Parameter(torch.ones(2))

        def forward(self, x: Tensor) -> Tensor:
            return x * self.weight * self.scale

    model = Scale()
    before = model(torch.randn(6, 2).abs()).exp()
    book = ledger(model, before)
    assert book.batch_inputs == 6 * 2 * 4
    # Nothing that the caller's graph saved was written to or freed.
    before.sum().backward()
    assert model.weight.grad is not None


def test_auxiliary_losses_are_part_of_the_step() -> None:
    class Scale(CountingSession):
        def auxiliary_loss(self) -> Tensor:
            return self.auxiliary.square().sum()

    model = nn.Linear(2, 3)
    plain = ledger(model, torch.randn(6, 2))
    session = Scale()
    model.codebook = session.auxiliary
    model._leantune_session = session  # type: ignore[assignment]
    with_auxiliary = ledger(model, torch.randn(6, 2))
    assert with_auxiliary.gradients - plain.gradients == 5 * 4
    assert with_auxiliary.activations == plain.activations


@pytest.mark.gpu
def test_cuda_generators_are_put_back() -> None:
    model = nn.Sequential(nn.Linear(2, 4), nn.Dropout(0.5)).cuda()
    x = torch.randn(6, 2, device="cuda")
    state = torch.cuda.get_rng_state()
    book = ledger(model, x)
    assert torch.equal(torch.cuda.get_rng_state(), state)
    # the fused dropout of CUDA keeps a mask of one byte
    assert book.by_kind(ledger="activations")["dropout"] == 6 * 4
