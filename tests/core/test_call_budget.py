"""What one converted linear costs on the host: calls of our own functions, and operations."""

import copy
import math
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import FrameType, SimpleNamespace

import pytest
import torch
from models import MODELS
from torch import Tensor, nn

import leantune as lt
from bench.host import operations
from leantune.core.linear import ConvertedConv1D, ConvertedLinear

SOURCE = str(Path(lt.__file__).parent)
# Of the forward's, a look for a sample to share, the offer of one, and a look for row masks make
# three: nothing is known of a model beforehand. In each direction one is the choice of kernels.
MAX_FORWARD, MAX_BACKWARD = 32, 10


def calls_of(function: Callable[[], object]) -> list[str]:
    """Run a function and name every Python function of ours that it called."""
    calls: list[str] = []

    def note(frame: FrameType, event: str, arg: object) -> None:
        if event == "call" and frame.f_code.co_filename.startswith(SOURCE):
            calls.append(f"{frame.f_code.co_filename[len(SOURCE) :]}:{frame.f_code.co_qualname}")

    sys.setprofile(note)
    try:
        function()
    finally:
        sys.setprofile(None)
    return calls


def cost(layer: nn.Module, x: Tensor) -> tuple[list[str], list[str]]:
    """Count one forward and one backward of a layer; autograd runs on this thread on the CPU."""
    outputs: list[Tensor] = []
    forward = calls_of(lambda: outputs.append(layer(x)))
    grad = torch.ones_like(outputs[0])
    return forward, calls_of(lambda: outputs[0].backward(grad))


@pytest.mark.parametrize(
    ("name", "site"),
    [
        ("bert", "bert.encoder.layer.0.output.dense"),
        ("bert", "bert.encoder.layer.0.intermediate.dense"),
        ("gpt2", "transformer.h.0.mlp.c_proj"),
    ],
)
def test_a_converted_linear_keeps_to_its_budget_of_calls(name: str, site: str) -> None:
    model = MODELS[name].build()
    session = lt.apply(model, lt.WTACRS(min_rows=2))
    for i in range(3):
        model(**MODELS[name].batch(i)).loss.backward()
    for _ in range(17):  # from then on few steps look at their gradients
        session.on_step()
    layer = model.get_submodule(site)
    assert isinstance(layer, ConvertedLinear | ConvertedConv1D)
    d_in = layer.weight.shape[isinstance(layer, ConvertedLinear)]
    forward, backward = cost(layer, torch.randn(4, 8, d_in, requires_grad=True))
    assert len(forward) <= MAX_FORWARD, "\n".join(forward)
    assert len(backward) <= MAX_BACKWARD, "\n".join(backward)
    # The control: something of ours was called at all, in both directions.
    assert any("SampledRows.keep" in c for c in forward)
    assert any("SampledRows.outer_product" in c for c in backward)


def test_linears_of_one_input_cost_less_after_the_first() -> None:
    model = MODELS["bert"].build()
    lt.apply(model, lt.WTACRS(min_rows=2))
    for i in range(3):
        model(**MODELS["bert"].batch(i)).loss.backward()
    attention = model.bert.encoder.layer[0].attention.self
    x = torch.randn(4, 8, 16, requires_grad=True)
    first, second, third = (
        len(calls_of(lambda layer=layer: layer(x)))
        for layer in (attention.query, attention.key, attention.value)
    )
    assert first <= MAX_FORWARD + 10 and second < 20 and third < 20


def test_a_linear_without_a_row_policy_is_cheap() -> None:
    model = nn.Sequential(nn.Linear(4, 4))
    lt.apply(model, lt.MeProp(variant="weight", sites=["0"]))
    forward, backward = cost(model[0], torch.randn(5, 4, requires_grad=True))
    assert len(forward) <= 12, "\n".join(forward)
    assert len(backward) <= MAX_BACKWARD, "\n".join(backward)


def operations_of_step(model: nn.Module, x: Tensor) -> list[str]:
    """Name the operations of one step, whose gradients are made anew."""
    model.zero_grad()
    x.grad = None
    return operations(lambda: model(x).backward(torch.ones(*x.shape[:-1], 16)))


@pytest.mark.parametrize("bias", [True, False])
def test_a_converted_linear_keeps_to_its_budget_of_operations(bias: bool) -> None:
    """At most 30 above the plain linear's, forward and backward, where gradients are not met."""
    plain = nn.Sequential(nn.Linear(16, 16, bias=bias))
    model = copy.deepcopy(plain)
    session = lt.apply(model, lt.WTACRS(min_rows=2, sites=["0"]))
    x = torch.randn(4, 8, 16, requires_grad=True)
    for _ in range(17):
        operations_of_step(model, x)
        session.on_step()
    wanted, got = operations_of_step(plain, x), operations_of_step(model, x)
    got.remove("add")  # the model's count of its forwards
    assert len(got) - len(wanted) <= 30, got
    # The control: a step that looks at the gradients takes more, every eighth does.
    for _ in range(7):
        session.on_step()
    looking = operations_of_step(model, x)
    assert len(got) < len(looking) <= len(got) + 14, looking


def host_us(layers: Sequence[nn.Module], shape: tuple[int, ...]) -> list[float]:
    """Return what a forward and a backward of each takes this thread, at the least, in us."""
    grad, least = torch.ones(*shape[:-1], 16), [math.inf] * len(layers)
    for _ in range(600):
        for i, layer in enumerate(layers):
            x = torch.randn(shape, requires_grad=True)  # another one: nobody has drawn from it
            start = time.thread_time()
            layer(x).backward(grad)
            least[i] = min(least[i], time.thread_time() - start)
    return [1e6 * seconds for seconds in least]


def test_a_converted_linear_keeps_to_its_budget_of_host_time(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """At most 100 us above ``nn.Linear``, which takes 50 there; a busy machine slows both alike."""
    torch.use_deterministic_algorithms(False)  # which would fill every new tensor
    plain = nn.Linear(16, 16)
    model = nn.Sequential(copy.deepcopy(plain))
    session = lt.apply(model, lt.WTACRS(min_rows=2, sites=["0"]))
    x = torch.randn(4, 8, 16, requires_grad=True)
    for _ in range(17):
        operations_of_step(model, x)
        session.on_step()
    # What a GPU does in one launch each.
    drawn, picked = (torch.arange(9, dtype=torch.int32), torch.ones(9)), torch.ones(9, 16)
    launched = SimpleNamespace(draw_rows=lambda *a, **k: drawn, pick_rows=lambda *a: picked)
    monkeypatch.setattr("leantune.methods.wta_crs.policy.row_functions", lambda x: launched)
    tries = [host_us([model[0], plain], (4, 8, 16)) for _ in range(3)]
    assert min((ours - least) / least for ours, least in tries) <= 100 / 50, tries
    # The control: the very layer that is measured would have drawn.
    monkeypatch.setattr("leantune.methods.wta_crs.policy.row_functions", lambda x: None)
    with pytest.raises(AttributeError, match="draw_rows"):
        model[0](torch.randn(4, 8, 16))
