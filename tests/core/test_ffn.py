"""The view of an FFN: one product for every kind of layer, whole and in groups, built once."""

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import leantune as lt
from leantune.core.adapters import base_name, is_factor, is_second_factor, linears_along, unwrap
from leantune.core.ffn import FFN, HiddenUnits, LinearView, view_ffn
from leantune.core.linear import converted, swap
from leantune.core.runtime import Runtime
from leantune.errors import ConfigError, UnsupportedError
from leantune.ops.random import RandomKey
from leantune.ops.rows import KeptRows, OuterProduct

# peft asks transformers for a name that transformers is about to drop.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")

D, F = 4, 6


class AllRows:
    """Keeps every row, and counts how often it was asked."""

    num_kept = 0

    def keep(self, x: Tensor, source: Tensor, key: RandomKey) -> tuple[KeptRows, Any]:
        self.num_kept += 1
        return KeptRows(x), None

    def outer_product(self, kept: KeptRows, note: Any, grad_output: Tensor) -> OuterProduct:
        return OuterProduct(grad_output, kept.rows.flatten(0, -2))

    def nbytes(self, shape: torch.Size, dtype: torch.dtype) -> int:
        return shape.numel() * dtype.itemsize


class Whole:
    """Trains a copy of the weight instead of the weight."""

    def __init__(self, weight: Tensor) -> None:
        self.parameter = nn.Parameter(weight.detach().clone())

    def effective(self, base: Tensor, trained: Tensor) -> Tensor:
        return base

    def project(self, rows: Tensor) -> Tensor:
        return rows

    def grad(self, outer: OuterProduct) -> Tensor:
        return outer.dense()


def conv1d(d_in: int, d_out: int) -> nn.Module:
    from transformers.pytorch_utils import Conv1D

    layer = Conv1D(d_out, d_in)
    nn.init.normal_(layer.bias)
    return layer


class Parts(nn.Module):
    """An FFN's modules under one roof."""

    def __init__(self, modules: dict[str, nn.Module], is_halved: bool = False) -> None:
        super().__init__()
        self.is_halved = is_halved
        for name, module in modules.items():
            self.add_module(name, module)

    def forward(self, x: Tensor) -> Tensor:
        if self.is_halved:
            gate, up = self.up(x).chunk(2, -1)
            return self.down(self.activation(gate) * up)
        if "gate" not in self._modules:
            return self.down(self.activation(self.up(x)))
        return self.down(self.activation(self.gate(x)) * self.up(x))

    def view(self, before: FFN | None = None) -> FFN:
        return view_ffn(dict(self.named_children()), before)


def parts(kind: str, dtype: torch.dtype = torch.float64) -> Parts:
    build: Callable[..., nn.Module] = conv1d if "conv1d" in kind else nn.Linear
    is_halved = "halved" in kind
    modules = {"up": build(D, (1 + is_halved) * F), "down": build(F, D), "activation": nn.SiLU()}
    if "gated" in kind:
        modules["gate"] = build(D, F)
    ffn = Parts(modules, is_halved).to(dtype)
    runtime = Runtime(ffn, 0)
    if "lora" in kind:
        linears = [n for n, m in ffn.named_children() if hasattr(m, "weight")]
        runtime = lt.apply(ffn, lt.LoRA(rank=2, alpha=5.0, sites=linears))._runtime
        for name, parameter in ffn.named_parameters():
            if "lora_B" in name:
                nn.init.normal_(parameter)
    if "converted" in kind:
        for name, module in list(ffn.named_modules()):
            if name and not list(module.children()) and hasattr(module, "weight"):
                swap(ffn, name, converted(module, runtime, rows=AllRows()))
    return ffn


ORDERED = ("plain", "gated", "conv1d", "lora", "gated lora", "conv1d lora", "gated lora converted")
KINDS = (*ORDERED, "halved", "halved conv1d", "halved lora converted")


def by_groups(ffn: FFN, x: Tensor, num: int, scale: Tensor | None = None) -> Tensor:
    """Send every row to every group, in order of the groups."""
    scale = torch.ones(len(x), num, dtype=x.dtype) if scale is None else scale
    low = [z.repeat(num, 1) for z in ffn.project(x)]
    weights = scale.t().reshape(-1, 1)
    outputs = ffn.run_groups(x.repeat(num, 1), low, [len(x)] * num, weights)
    y, *rest = [t.unflatten(0, (num, -1)).sum(0) for t in outputs]
    return ffn.finish(y, rest)


@pytest.mark.parametrize("kind", KINDS)
def test_groups_make_up_the_ffn(kind: str) -> None:
    ffn = parts(kind)
    x = torch.randn(7, D, dtype=torch.float64)
    wanted = ffn(x)
    view = ffn.view()
    torch.testing.assert_close(by_groups(view, x, 3), wanted)
    torch.testing.assert_close(view.output(view.hidden(x)), wanted)
    # The control: a group is missing.
    assert not torch.allclose(by_groups(view, x, 3, torch.tensor([[1.0, 1, 0]] * 7)), wanted)


@pytest.mark.parametrize("kind", KINDS)
def test_scales_of_groups_multiply_their_hidden_units(kind: str) -> None:
    ffn = parts(kind).view()
    x, scale = torch.randn(7, D, dtype=torch.float64), torch.rand(7, 3, dtype=torch.float64)
    wanted = ffn.output(ffn.hidden(x), scale)
    torch.testing.assert_close(by_groups(ffn, x, 3, scale), wanted)


@pytest.mark.parametrize("kind", ["lora", "conv1d lora", "halved lora converted"])
@pytest.mark.parametrize("change", ["bias", "dtype"])
def test_factors_of_another_kind_are_added_all_the_same(kind: str, change: str) -> None:
    """A factor with a bias, or in another dtype than its linear, cannot be added in place."""
    ffn = parts(kind)
    for adapted in ffn.view().linears.values():
        for first, second, *_ in adapted.adapters:
            if change == "bias":
                second.bias = nn.Parameter(torch.randn(len(second.weight), dtype=torch.float64))
            else:
                (adapted.linear.float(), first.double(), second.double())
    x = torch.randn(7, D, dtype=torch.float64 if change == "bias" else torch.float32)
    wanted = ffn(x)
    torch.testing.assert_close(by_groups(ffn.view(), x, 3), wanted)


@pytest.mark.parametrize("kind", KINDS)
def test_merged_weight_is_the_product_of_linear_and_adapters(kind: str) -> None:
    ffn = parts(kind)
    x = torch.randn(7, F, dtype=torch.float64)
    merged = x @ ffn.view().merged("down").t()
    torch.testing.assert_close(merged, ffn.down(x) - ffn.down(torch.zeros_like(x)))


def test_extra_is_added_before_the_output_is_dropped() -> None:
    ffn = parts("plain")
    x, extra = torch.randn(7, D, dtype=torch.float64), torch.randn(7, D, dtype=torch.float64)
    hidden = ffn.view().hidden(x)
    torch.testing.assert_close(ffn.view().output(hidden, extra=extra), ffn(x) + extra)
    ffn.output_dropout = nn.Dropout(1.0)
    assert not ffn.view().output(hidden, extra=extra).any()


@pytest.mark.parametrize("kind", ["gated", "gated lora", "conv1d lora", "halved lora"])
def test_gradients_of_groups(kind: str) -> None:
    ffn = parts(kind)
    names = [n for n, p in ffn.named_parameters() if p.requires_grad]

    def run(x: Tensor, scale: Tensor, *values: Tensor) -> Tensor:
        with torch.nn.utils.stateless._reparametrize_module(
            ffn, dict(zip(names, values, strict=True))
        ):
            return by_groups(ffn.view(), x, 3, scale)

    x = torch.randn(2, D, dtype=torch.float64, requires_grad=True)
    scale = torch.rand(2, 3, dtype=torch.float64, requires_grad=True)
    values = [ffn.get_parameter(n).detach().clone().requires_grad_() for n in names]
    assert torch.autograd.gradcheck(run, (x, scale, *values))


def test_products_go_through_the_row_policy_in_training_alone() -> None:
    policy = AllRows()
    ffn = parts("plain", torch.float32)
    ffn.up = converted(ffn.up, Runtime(ffn, 0), rows=policy)
    x = torch.randn(5, D)
    view = LinearView.of(ffn.up)
    view.multiply_groups(x, [5, 0]).sum().backward()
    assert policy.num_kept == 2  # one in each group
    grad = ffn.up.weight.grad
    assert isinstance(grad, Tensor) and (grad[3:] == 0).all()
    torch.testing.assert_close(grad[:3], x.sum(0).expand(3, D))
    with ffn.up.runtime.exact():
        view.multiply(x)
    with torch.no_grad():
        view.multiply(x)
    ffn.eval()
    view.multiply_groups(x, [5, 0])
    assert policy.num_kept == 2


def test_view_is_built_once_until_something_changes() -> None:
    ffn = parts("gated lora", torch.float32)
    x = torch.randn(5, D)
    view = ffn.view()

    def is_kept() -> bool:
        """Ask for the view again; whether or not it is the same one, it must be right."""
        nonlocal view
        now = ffn.view(view)
        torch.testing.assert_close(by_groups(now, x, 2), ffn(x))
        kept, view = now is view, now
        return kept

    assert is_kept()
    ffn.eval()
    assert is_kept()
    ffn.train()
    # Sharding replaces parameter objects before and after each forward.
    ffn.up.base_layer.weight = nn.Parameter(torch.randn(F, D))
    ffn.up.lora_A["default"].weight = nn.Parameter(torch.randn(2, D))
    assert is_kept()
    changes: list[tuple[Callable[[], Any], bool]] = [
        (lambda: ffn.up.enable_adapters(False), True),
        (lambda: ffn.up.enable_adapters(True), True),
        (lambda: ffn.down.merge(), True),
        (lambda: ffn.down.unmerge(), True),
        (lambda: ffn.gate.set_scale("default", 3.0), True),
        (lambda: ffn.up.update_layer("more", 3, 4, config=lora_config()), False),
        (lambda: ffn.up.set_adapter("more"), True),
        (lambda: ffn.up.set_adapter(["default", "more"]), True),
        (lambda: swap_in(ffn, "up.lora_A.default"), True),
        (lambda: swap_in(ffn, "gate.base_layer"), True),
        (lambda: setattr(ffn, "activation", nn.ReLU()), True),
    ]
    for change, is_new in changes:
        change()
        assert is_kept() != is_new
        assert is_kept()


def lora_config() -> Any:
    from peft import LoraConfig

    return LoraConfig(r=3, lora_alpha=4)


def swap_in(ffn: Parts, name: str) -> None:
    swap(ffn, name, converted(ffn.get_submodule(name), Runtime(ffn, 0), rows=AllRows()))


@pytest.mark.parametrize("how", [copy.deepcopy, lambda t: pickle.loads(pickle.dumps(t))])
def test_copies_have_views_of_their_own(how: Callable[[Any], Any]) -> None:
    ffn = parts("gated lora converted", torch.float32)
    ffn.cached = ffn.view()
    other = how(ffn)
    assert other.view(other.cached) is other.cached
    assert other.view(ffn.cached) is not ffn.cached
    with torch.no_grad():
        other.up.base_layer.weight.zero_()
    x = torch.randn(5, D)
    torch.testing.assert_close(by_groups(other.cached, x, 2), other(x))
    assert not torch.allclose(other(x), ffn(x))


def test_merged_adapter_that_is_switched_off_is_taken_out() -> None:
    ffn = parts("lora", torch.float32)
    x = torch.randn(5, D)
    base = ffn.up.base_layer(x)
    ffn.up.merge()
    assert unwrap(ffn.up).adapters == ()
    ffn.up.enable_adapters(False)
    assert not torch.allclose(ffn.up.base_layer(x), base)
    view = LinearView.of(unwrap(ffn.up).linear)
    torch.testing.assert_close(view.multiply(x), base)


@pytest.mark.parametrize("kind", ["lora", "conv1d lora"])
def test_linears_that_belong_to_features(kind: str) -> None:
    """Of merged and disabled adapters as well: they come back."""
    layer = parts(kind).up
    layer.merge()
    layer.enable_adapters(False)
    for dim, names in (
        (0, ["base_layer.", "lora_B.default."]),
        (1, ["base_layer.", "lora_A.default."]),
    ):
        found = dict(linears_along(layer, dim))
        assert list(found) == names
        assert all(m is layer.get_submodule(n.rstrip(".")) for n, m in found.items())
    assert dict(linears_along(layer.base_layer, 0)) == {"": layer.base_layer}


def test_names_of_factors() -> None:
    model = nn.Module()
    model.mlp = parts("gated lora")
    names = [n for n, _ in model.named_modules() if n]
    assert {base_name(n) for n in names if is_factor(n)} == {
        f"mlp.{p}" for p in ("up", "gate", "down")
    }
    assert [n for n in names if is_second_factor(n)] == [
        n for n in names if n.endswith("lora_B.default")
    ]
    assert base_name("mlp.up.base_layer") == base_name("mlp.up") == "mlp.up"
    assert not is_factor("mlp.up.base_layer") and not is_factor("mlp.up.lora_A")


def test_what_trains_something_else_is_not_divisible() -> None:
    ffn = parts("plain")
    assert ffn.view().is_divisible
    ffn.up = converted(ffn.up, Runtime(ffn, 0), subspace=Whole(ffn.up.weight))
    assert not ffn.view().is_divisible


def test_other_modules_are_refused() -> None:
    class Special(nn.Linear):
        def forward(self, input: Tensor) -> Tensor:
            return 2 * super().forward(input)

    for module in (Special(D, F), nn.ReLU()):
        ffn = parts("plain")
        ffn.up = module
        with pytest.raises(UnsupportedError, match=r"linear must be nn\.Linear, Conv1D or a LoRA"):
            ffn.view()
    ffn.up = nn.Module()
    ffn.up.base_layer = nn.Linear(D, F)
    with pytest.raises(UnsupportedError, match=r"adapter must be plain LoRA, got .*Module"):
        ffn.view()


@pytest.mark.parametrize("kind", ORDERED)
def test_any_order_of_hidden_units_is_the_same_function(kind: str) -> None:
    ffn = parts(kind)
    linears = {part: part for part in ffn.view().linears}
    x = torch.randn(5, D, dtype=torch.float64)
    wanted, before = ffn(x), {n: p.clone() for n, p in ffn.named_parameters()}
    saved = {n: p.clone() for n, p in ffn.state_dict().items()}
    units = HiddenUnits(ffn, ffn, linears)
    order = torch.randperm(F)
    units.reorder(order)
    torch.testing.assert_close(ffn(x), wanted)
    assert not torch.equal(
        unwrap(ffn.up).linear.weight,
        before["up.base_layer.weight" if "lora" in kind else "up.weight"],
    )
    # Files keep the original order, and load in it.
    state = ffn.state_dict()
    assert torch.equal(state.pop("permutation"), order)
    assert all(torch.equal(state[n], saved[n]) for n in saved) and state.keys() == saved.keys()
    ffn.load_state_dict({n: 2 * p for n, p in saved.items()}, strict=False)
    units.load(torch.arange(F))
    assert all(torch.equal(p, 2 * before[n]) for n, p in ffn.named_parameters())
    with pytest.raises(ConfigError, match="permutation must be an order of 6 hidden units"):
        units.load(torch.zeros(F, dtype=torch.int64))


def test_shared_weight_cannot_be_reordered() -> None:
    ffn = parts("plain")
    model = nn.Module()
    model.one, model.two = ffn, copy.copy(ffn)
    with pytest.raises(
        UnsupportedError, match=r"no weight is shared, got one\.up\.weight tied to two\.up"
    ):
        HiddenUnits(model, ffn, {"up": "up", "down": "down"})
