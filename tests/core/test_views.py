"""The view of a linear: the same tensors and the same product for every kind of layer."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import leantune as lt
from leantune.core.swap import with_rule, with_store
from leantune.core.views import LinearView, linear_view, parameters_along, slices
from leantune.errors import UnsupportedError
from leantune.ops.stores import Draw, ExactStore, Factors, grad_weight

# peft asks transformers for a name that transformers is about to drop.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")


class Always:
    def draw_for(self, weight: Tensor) -> Draw:
        return Draw(0, torch.zeros((), dtype=torch.int64))


class Counting(ExactStore):
    num_packed = 0

    def pack(self, *args, **kwargs):
        self.num_packed += 1
        return super().pack(*args, **kwargs)


def conv1d() -> nn.Module:
    from transformers.pytorch_utils import Conv1D

    layer = Conv1D(6, 4)
    nn.init.normal_(layer.bias)
    return layer


def lora(layer: nn.Module) -> nn.Module:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = layer

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(x)

    net = Net()
    lt.apply(net, lt.LoRA(rank=2, alpha=5.0, sites=["inner"]))
    nn.init.normal_(net.inner.lora_B["default"].weight)
    return net.inner


KINDS = {
    "linear": lambda: nn.Linear(4, 6),
    "no bias": lambda: nn.Linear(4, 6, bias=False),
    "conv1d": conv1d,
    "stored": lambda: with_store(nn.Linear(4, 6), ExactStore(), Always()),
    "stored conv1d": lambda: with_store(conv1d(), ExactStore(), Always()),
    "lora": lambda: lora(nn.Linear(4, 6)),
    "lora on conv1d": lambda: lora(conv1d()),
}


def through_view(view: LinearView, x: Tensor) -> Tensor:
    y = view.product(x, view.weight, view.bias)
    for f in view.factors:
        y = y + f.b.product(f.first(x), f.b.weight, f.second_bias)
    return y


@pytest.mark.parametrize("kind", KINDS)
def test_view_computes_what_the_layer_does(kind: str) -> None:
    layer = KINDS[kind]()
    x = torch.randn(3, 5, 4)
    view = linear_view(layer)
    assert view.weight.shape == (6, 4) and (view.bias is None) == (kind == "no bias")
    torch.testing.assert_close(through_view(view, x), layer(x))
    held = {p.untyped_storage().data_ptr() for p in layer.parameters()}
    assert view.weight.untyped_storage().data_ptr() in held, "a view, not a copy"
    assert len(view.factors) == ("lora" in kind)
    # The control: without its factors a LoRA layer is something else.
    if view.factors:
        bare = view.product(x, view.weight, view.bias)
        assert not torch.allclose(bare, layer(x))


def cut(view: LinearView, dim: int, num: int):
    return slices(
        view, dim, lambda t, along: t.chunk(num, along), lambda v, w, b, t: v.product(t, w, b)
    )


@pytest.mark.parametrize("kind", KINDS)
def test_slices_of_outputs_and_inputs_make_up_the_layer(kind: str) -> None:
    layer = KINDS[kind]()
    x = torch.randn(7, 4)
    view = linear_view(layer)
    low = [f.first(x) for f in view.factors]
    parts = [
        s.base(x) + sum(p(a) for p, a in zip(s.adapters, low, strict=True)) for s in cut(view, 0, 3)
    ]
    torch.testing.assert_close(torch.cat(parts, 1), layer(x))
    halves = list(zip(cut(view, 1, 2), x.chunk(2, 1), strict=True))
    total = sum(s.base(t) for s, t in halves)
    for i, f in enumerate(view.factors):
        total = total + f.b.product(sum(s.adapters[i](t) for s, t in halves), f.b.weight)
    if view.bias is not None:
        total = total + view.bias
    torch.testing.assert_close(total, layer(x))


def test_product_goes_through_the_store_in_training_alone() -> None:
    store = Counting()
    layer = with_store(nn.Linear(4, 6), store, Always())
    x = torch.randn(5, 4)
    view = linear_view(layer)
    view.product(x, view.weight[:3]).sum().backward()
    assert store.num_packed == 1
    grad = layer.weight.grad
    assert isinstance(grad, Tensor) and (grad[3:] == 0).all()
    torch.testing.assert_close(grad[:3], x.sum(0).expand(3, 4))
    view = linear_view(layer.eval())
    view.product(x, view.weight)
    assert store.num_packed == 1 and view.draws is None


def test_disabled_and_merged_adapters() -> None:
    layer = lora(nn.Linear(4, 6))
    x = torch.randn(5, 4)
    adapted, base = layer(x), layer.base_layer(x)
    layer.merge()
    assert linear_view(layer).factors == ()
    torch.testing.assert_close(through_view(linear_view(layer), x), adapted)
    layer.enable_adapters(False)
    torch.testing.assert_close(through_view(linear_view(layer), x), base)


@pytest.mark.parametrize("build", [lambda: nn.Linear(4, 6), conv1d])
def test_rows_and_columns_that_belong_to_features(build: Callable[[], nn.Module]) -> None:
    """Of merged and disabled adapters as well: they come back."""
    layer = lora(build())
    layer.merge()
    layer.enable_adapters(False)
    for dim, width, num in ((0, 6, 3), (1, 4, 2)):
        found = list(parameters_along(layer, dim))
        assert len(found) == num
        assert all(p is layer.get_parameter(n) and p.shape[d] == width for n, p, d in found)


def test_what_a_rule_trains_is_not_divisible() -> None:
    class Whole:
        width = None

        def project(self, rows: Tensor) -> Tensor:
            return rows

        def grad(self, factors: list[Factors]) -> Tensor:
            return grad_weight(factors)

    old = nn.Linear(4, 6).requires_grad_(False)
    new = with_rule(old, nn.Parameter(old.weight.clone()), Whole(), Always())
    assert linear_view(old).is_divisible and not linear_view(new).is_divisible


def test_other_modules_are_refused() -> None:
    class Special(nn.Linear):
        pass

    for module in (Special(4, 6), nn.ReLU()):
        with pytest.raises(UnsupportedError, match=r"linear must be nn\.Linear, Conv1D or a LoRA"):
            linear_view(module)
    wrapped = nn.Module()
    wrapped.base_layer = nn.Linear(4, 6)
    with pytest.raises(UnsupportedError, match=r"adapter must be plain LoRA, got .*Module"):
        linear_view(wrapped)
