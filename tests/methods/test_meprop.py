"""meProp's three variants against the float64 oracle, with controls that must fail."""

import numpy as np
import pytest
import torch
from models import MODELS
from oracles import meprop as oracle
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

import leantune as lt
from leantune.errors import SiteError

D_OUT, D_IN, NUM_ROWS = 20, 12, 7
VARIANTS = ["unified", "weight"]


def build(conv: bool = False) -> nn.Module:
    torch.manual_seed(0)
    layer = Conv1D(D_OUT, D_IN) if conv else nn.Linear(D_IN, D_OUT)
    return nn.ModuleDict({"layer": layer}).double()


def run(layer: nn.Module, *shape: int) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Return input, output gradient and the gradients (dW, dX, db)."""
    torch.manual_seed(1)
    x = torch.randn(*(shape or (NUM_ROWS,)), D_IN, dtype=torch.float64, requires_grad=True)
    y = layer(x)
    # Negative where it is large: a signed top-k would keep the wrong ones.
    grad_output = -torch.randn_like(y).abs() + 0.3
    grads = list(torch.autograd.grad(y, (layer.weight, x, layer.bias), grad_output))
    if isinstance(layer, Conv1D) or grads[0].shape[0] == D_IN:
        grads[0] = grads[0].t()
    return x.detach(), grad_output, grads


def convert(variant: str, keep_ratio: float, conv: bool = False) -> nn.Module:
    model = build(conv)
    lt.apply(model, lt.MeProp(variant=variant, keep_ratio=keep_ratio, sites="layer"))
    return model["layer"]


def wanted(variant: str, k: int, x: Tensor, grad_output: Tensor, weight: Tensor):
    x2, g2 = x.reshape(-1, D_IN).numpy(), grad_output.reshape(-1, D_OUT).numpy()
    if variant == "weight":
        exact = oracle.gradients(x2, g2, weight.numpy())
        return (oracle.keep_entries(exact[0], k), *exact[1:])
    return oracle.gradients(x2, oracle.keep_units(g2, k), weight.numpy())


@pytest.mark.parametrize("conv", [False, True])
@pytest.mark.parametrize("shape", [(), (2, 3)])
@pytest.mark.parametrize("variant", VARIANTS)
def test_gradients_are_the_oracles(variant: str, shape: tuple[int, ...], conv: bool) -> None:
    layer = convert(variant, 0.25, conv)
    x, grad_output, grads = run(layer, *shape)
    weight = (layer.weight.t() if conv else layer.weight).detach()
    k = 5 if variant != "weight" else 60
    exact = wanted(variant, k, x, grad_output, weight)
    wrong = wanted(variant, k + 1, x, grad_output, weight)
    for got, expected in zip(grads, exact, strict=True):
        got = got.reshape(expected.shape).numpy()
        np.testing.assert_allclose(got, expected, rtol=1e-10, atol=1e-12)
    assert not np.allclose(grads[0].numpy(), wrong[0])
    assert np.count_nonzero(grads[0].numpy()) <= 60


@pytest.mark.parametrize("variant", VARIANTS)
def test_keeping_everything_is_the_plain_linear_to_the_bit(variant: str) -> None:
    got, plain = (run(layer)[2] for layer in (convert(variant, 1.0), build()["layer"]))
    assert all(torch.equal(a, b) for a, b in zip(got, plain, strict=True))


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_output_and_evaluation_are_the_plain_linears(variant: str) -> None:
    model, plain = build(), build()["layer"]
    lt.apply(model, lt.MeProp(variant=variant, keep_ratio=0.1, sites="layer"))
    x = torch.randn(3, D_IN, dtype=torch.float64)
    assert torch.equal(model["layer"](x), plain(x))
    model.eval()
    assert all(
        torch.equal(a, b) for a, b in zip(run(model["layer"])[2], run(plain)[2], strict=True)
    )


def test_exact_mode_is_the_plain_linear() -> None:
    for variant in VARIANTS:
        model = build()
        session = lt.apply(model, lt.MeProp(variant=variant, keep_ratio=0.1, sites="layer"))
        with session.exact():
            got = run(model["layer"])[2]
        plain = run(build()["layer"])[2]
        assert all(torch.equal(a, b) for a, b in zip(got, plain, strict=True))


def test_less_reaches_the_layers_below() -> None:
    """The original thins the gradient that flows down, too; the later variant does not."""
    plain = MODELS["bert"].build()
    plain(**MODELS["bert"].batch()).loss.backward()
    name = "bert.embeddings.word_embeddings.weight"
    for variant, is_same in (("unified", False), ("weight", True)):
        model = MODELS["bert"].build()
        lt.apply(model, lt.MeProp(variant=variant, keep_ratio=0.2))
        model(**MODELS["bert"].batch()).loss.backward()
        got = model.get_parameter(name).grad
        assert torch.allclose(got, plain.get_parameter(name).grad) == is_same


def test_heads_stay_exact_and_frozen_weights_are_refused() -> None:
    model = MODELS["bert"].build()
    lt.apply(model, lt.MeProp())
    assert type(model.classifier) is nn.Linear and type(model.bert.pooler.dense) is nn.Linear
    frozen = build()
    frozen["layer"].weight.requires_grad_(False)
    with pytest.raises(SiteError, match="layer: the weight must train, got a frozen one"):
        lt.apply(frozen, lt.MeProp(sites="layer"))


@pytest.mark.parametrize("variant", VARIANTS)
def test_hooks_and_modules_are_taken_out_again(variant: str) -> None:
    model = build()
    layer = model["layer"]
    session = lt.apply(model, lt.MeProp(variant=variant, keep_ratio=0.1, sites="layer"))
    session.remove()
    assert model["layer"] is layer and not layer._forward_hooks
    plain = run(build()["layer"])[2]
    assert all(torch.equal(a, b) for a, b in zip(run(layer)[2], plain, strict=True))


@pytest.mark.parametrize("variant", VARIANTS)
def test_it_goes_with_sampled_rows(variant: str) -> None:
    """Of a sampled gradient the same units are kept, and only those."""
    model = MODELS["bert"].build()
    lt.apply(model, lt.MeProp(variant=variant, keep_ratio=0.25), lt.WTACRS(min_rows=2))
    model(**MODELS["bert"].batch()).loss.backward()
    grad = model.get_parameter("bert.encoder.layer.0.intermediate.dense.weight").grad
    assert torch.isfinite(grad).all() and bool(grad.any())
    kept = int((grad != 0).any(1).sum())
    assert kept <= (8 if variant == "unified" else 32)
