"""What one forward shows of a block, FFNs by value and attention by its products; and no trace."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from models import D_HIDDEN, D_MODEL, MODELS
from torch import Tensor, nn
from torch.nn import functional as F

import leantune as lt
from leantune.core.discovery import discover
from leantune.core.sites import Part
from leantune.core.trace import Trace, trace_parts
from leantune.errors import SiteError


class Block(nn.Module):
    """Linears and other modules under the names given, and a forward of them and of the input."""

    def __init__(self, run: Callable[[Any, Tensor], Any], **modules: nn.Module) -> None:
        super().__init__()
        self.run = run
        for name, module in modules.items():
            self.add_module(name, module)

    def forward(self, x: Tensor) -> Any:
        return self.run(self, x)


class Model(nn.Module):
    """Two copies of a block, with dummy inputs of their own."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.layers = nn.ModuleList([block, copy.deepcopy(block)])

    @property
    def dummy_inputs(self) -> dict[str, Tensor]:
        return {"x": torch.randn(2, 5, D_MODEL, generator=torch.Generator().manual_seed(0))}

    def forward(self, x: Tensor, attention_mask: Any = None) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


def up(times: int = 1) -> nn.Linear:
    return nn.Linear(D_MODEL, times * D_HIDDEN)


def down() -> nn.Linear:
    return nn.Linear(D_HIDDEN, D_MODEL)


def traced(model: nn.Module) -> Trace:
    return trace_parts(model, discover(model, trace=False).blocks)


def mlp(run: Callable[[Any, Tensor], Any], **modules: nn.Module) -> Part:
    """Trace blocks that are a norm, an FFN in a module of its own, and a residual sum."""
    ffn = Block(run, **modules)
    block = Block(lambda m, x: x + m.ffn(m.norm(x)), norm=nn.LayerNorm(D_MODEL), ffn=ffn)
    parts = traced(Model(block)).parts
    assert [part.block for part in parts] == ["layers.0", "layers.1"]
    return parts[0]


def named(part: Part) -> dict[str, str]:
    """Return part -> name inside the FFN."""
    return {key: name.removeprefix("layers.0.ffn.") for key, name in part.modules.items()}


def plain(m: Any, x: Tensor) -> Tensor:
    return m.b(m.act(m.a(x)))


LINEARS = {"up": "a", "down": "b"}
PATTERNS: dict[str, tuple[Callable[[Any, Tensor], Any], dict[str, nn.Module], dict[str, str]]] = {
    "plain": (plain, {"act": nn.GELU()}, LINEARS | {"activation": "act"}),
    "gated": (
        lambda m, x: m.b(m.a(x) * m.act(m.c(x))),
        {"act": nn.SiLU(), "c": up()},
        {"up": "a", "gate": "c", "down": "b", "activation": "act"},
    ),
    "halves": (
        lambda m, x: (lambda gate, other: m.b(m.act(gate) * other))(*m.a(x).chunk(2, -1)),
        {"act": nn.SiLU(), "a": up(2)},
        LINEARS | {"activation": "act"},
    ),
    "dropouts": (
        lambda m, x: m.late(m.b(m.early(m.act(m.a(x))))),
        {"act": nn.ReLU(), "early": nn.Dropout(0.1), "late": nn.Dropout(0.1)},
        LINEARS | {"activation": "act", "hidden_dropout": "early", "output_dropout": "late"},
    ),
    "flat rows": (
        lambda m, x: plain(m, x.flatten(0, 1)).view_as(x),
        {"act": nn.GELU()},
        LINEARS | {"activation": "act"},
    ),
}
# FFNs that no module can compute in another's place: the linears are known, and no more.
STANDING: dict[str, tuple[Callable[[Any, Tensor], Any], dict[str, nn.Module]]] = {
    "function": (lambda m, x: m.b(F.gelu(m.a(x))), {}),
    "erf": (lambda m, x: m.b((h := m.a(x)) * 0.5 * (1.0 + torch.erf(h / 2**0.5))), {}),
    "dropout function": (
        lambda m, x: m.b(F.dropout(m.act(m.a(x)), 0.1, m.training)),
        {"act": nn.GELU()},
    ),
    "scaled": (lambda m, x: m.b(2 * m.act(m.a(x))), {"act": nn.GELU()}),
    "in place": (lambda m, x: m.b(m.act(m.a(x).mul_(2))), {"act": nn.GELU()}),
    "other half": (
        lambda m, x: (lambda one, gate: m.b(one * m.act(gate)))(*m.a(x).chunk(2, -1)),
        {"act": nn.GELU(), "a": up(2)},
    ),
    "dropout before": (
        lambda m, x: (lambda gate, one: m.b(m.act(gate) * one))(*m.a(m.drop(x)).chunk(2, -1)),
        {"act": nn.GELU(), "a": up(2), "drop": nn.Dropout(0.1)},
    ),
    "shared dropout": (
        lambda m, x: x + m.drop(m.b(m.drop(m.act(m.a(x))))),
        {"act": nn.GELU(), "drop": nn.Dropout(0.1)},
    ),
}
NONE: dict[str, tuple[Callable[[Any, Tensor], Any], dict[str, nn.Module]]] = {
    "router": (lambda m, x: m.b(m.act(m.a(x)) * m.c(x).softmax(-1)), {"act": nn.GELU(), "c": up()}),
    "norm": (lambda m, x: m.b(m.act(m.a(x))), {"act": nn.LayerNorm(D_HIDDEN)}),
    "unused": (lambda m, x: x, {"act": nn.GELU()}),
    "no activation": (lambda m, x: m.b(m.a(x)), {}),
    "identity": (plain, {"act": nn.Identity()}),
    "identity by value": (plain, {"act": nn.Dropout1d(0.1)}),
    "constant": (lambda m, x: m.b(m.act(m.a(x)) + torch.ones(2, 5, D_HIDDEN)), {"act": nn.GELU()}),
    "matrix": (lambda m, x: m.b(m.act(m.a(x)) @ torch.eye(D_HIDDEN)), {"act": nn.GELU()}),
    "mean": (lambda m, x: m.b(m.act(m.a(x)).mean(1, keepdim=True)), {"act": nn.GELU()}),
    "two inputs": (
        lambda m, x: m.b(m.act(m.a(x)) * m.c(x + 1)),
        {"act": nn.GELU(), "c": up()},
    ),
}


@pytest.mark.parametrize("name", PATTERNS)
def test_an_ffn_is_seen_by_its_value(name: str) -> None:
    run, modules, wanted = PATTERNS[name]
    part = mlp(run, **{"a": up(), "b": down(), **modules})
    assert (part.role, part.entry, part.also_replaced) == ("mlp", "layers.0.ffn", ())
    assert named(part) == wanted


@pytest.mark.parametrize("name", STANDING)
def test_an_ffn_that_must_stay_where_it_stands_has_no_activation(name: str) -> None:
    run, modules = STANDING[name]
    part = mlp(run, **{"a": up(), "b": down(), **modules})
    assert part.entry == "layers.0.ffn"
    assert named(part) == LINEARS
    assert not part.also_replaced


@pytest.mark.parametrize("name", NONE)
def test_what_only_looks_like_an_ffn_is_none(name: str) -> None:
    run, modules = NONE[name]
    ffn = Block(run, **{"a": up(), "b": down(), **modules})
    model = Model(Block(lambda m, x: x + m.ffn(m.norm(x)), norm=nn.LayerNorm(D_MODEL), ffn=ffn))
    assert traced(model) == Trace([])


def test_what_lies_apart_is_replaced_apart() -> None:
    run = lambda m, x: x + 0.5 * m.b(m.drop(m.act(m.a(m.norm(x)))))  # noqa: E731
    modules = {"norm": nn.LayerNorm(D_MODEL), "a": up(), "b": down()}
    block = Block(run, **modules, act=nn.GELU(), drop=nn.Dropout(0.1))
    part = traced(Model(block)).parts[0]
    assert part.entry == "layers.0.a"
    assert set(part.also_replaced) == {"layers.0.b", "layers.0.act", "layers.0.drop"}
    assert part.modules["hidden_dropout"] == "layers.0.drop"


def test_an_activation_that_others_use_is_not_replaced() -> None:
    run = lambda m, x: m.act(x + m.b(m.act(m.a(m.norm(x)))))  # noqa: E731
    block = Block(run, norm=nn.LayerNorm(D_MODEL), a=up(), b=down(), act=nn.GELU())
    part = traced(Model(block)).parts[0]
    assert part.modules == {"up": "layers.0.a", "down": "layers.0.b"}


def heads(x: Tensor) -> Tensor:
    return x.unflatten(-1, (2, -1)).transpose(1, 2)


def by_torch(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v)


def by_hand(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.matmul((torch.matmul(q, k.transpose(2, 3)) + 1).softmax(-1), v)


@pytest.mark.parametrize("attend", [by_torch, by_hand])
def test_attention_is_seen_by_what_it_multiplies(attend: Any) -> None:
    """In a parallel block, whose FFN reads the same tensor, and with a norm after the query."""

    def attention(m: Any, x: Tensor) -> Tensor:
        q, k, v = m.norm(heads(m.q(x))), heads(m.k(x)), heads(m.v(x))
        return m.o(attend(q, k, v).transpose(1, 2).flatten(2))

    linears = {name: nn.Linear(D_MODEL, D_MODEL) for name in "qkvo"}
    attn = Block(attention, **linears, norm=nn.LayerNorm(D_MODEL // 2))
    ffn = Block(plain, a=up(), b=down(), act=nn.GELU())
    run = lambda m, x: x + m.attn(h := m.norm(x)) + m.ffn(h)  # noqa: E731
    block = Block(run, attn=attn, ffn=ffn, norm=nn.LayerNorm(D_MODEL))
    part, _, other, _ = traced(Model(block)).parts
    names = {"query": "q", "key": "k", "value": "v", "output": "o"}
    assert part.modules == {key: f"layers.0.attn.{name}" for key, name in names.items()}
    assert (part.role, part.entry, part.is_cross) == ("attention", "layers.0.attn", False)
    assert named(other) == LINEARS | {"activation": "act"}


def test_one_product_for_all_three_is_qkv() -> None:
    def attention(m: Any, x: Tensor) -> Tensor:
        q, k, v = map(heads, m.qkv(x).split(D_MODEL, -1))
        return m.o(by_torch(q, k, v).transpose(1, 2).flatten(2))

    qkv, o = nn.Linear(D_MODEL, 3 * D_MODEL), nn.Linear(D_MODEL, D_MODEL)
    block = Block(lambda m, x: x + m.attn(x), attn=Block(attention, qkv=qkv, o=o))
    part = traced(Model(block)).parts[0]
    assert part.modules == {"qkv": "layers.0.attn.qkv", "output": "layers.0.attn.o"}


@pytest.mark.parametrize("name", MODELS)
def test_the_trace_agrees_with_the_table(name: str) -> None:
    model = MODELS[name].build()
    layout = discover(model, trace=False)
    key = lambda p: (p.role, p.block, p.is_cross, sorted(p.modules.items()))  # noqa: E731
    seen = trace_parts(model, layout.blocks)
    assert seen.failure is None
    assert sorted(map(key, seen.parts)) == sorted(map(key, layout.parts))


def test_lora_layers_are_the_linears_inside_them() -> None:
    model = MODELS["llama"].build()
    before = traced(model)
    with lt.apply(model, lt.LoRA(rank=2)).exact():
        assert traced(model) == before


class Restless(nn.Module):
    """Draws random numbers and moves buffers in every mode, and may raise."""

    def __init__(self, error: Exception | None = None) -> None:
        super().__init__()
        self.error = error
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        self.calls = self.calls.clone()
        x = x + torch.rand_like(x)
        if self.error is not None:
            raise self.error
        return x


def restless_model(error: Exception | None = None) -> Model:
    modules = {"a": up(), "act": nn.GELU(), "b": down(), "norm": nn.BatchNorm1d(5)}
    run = lambda m, x: m.more(x + plain(m, m.norm(x)))  # noqa: E731
    model = Model(Block(run, **modules, more=Restless(error)))
    model.train()
    model.layers[1].eval()
    return model


@pytest.mark.parametrize("error", [None, RuntimeError("no such input")])
def test_a_trace_leaves_no_trace(error: Exception | None) -> None:
    model = restless_model(error)
    model.layers[0].a.register_forward_hook(lambda *of_hook: None)
    model.layers[0].a.weight.grad = torch.ones_like(model.layers[0].a.weight)

    def state() -> list[Any]:
        modules = list(model.modules())
        hooks = [(list(m._forward_hooks), list(m._forward_pre_hooks)) for m in modules]
        tensors = [*model.parameters(), *model.buffers()]
        grads = [p.grad for p in model.parameters()]
        return [[m.training for m in modules], hooks, [id(t) for t in (*tensors, *grads)]]

    values = copy.deepcopy(model.state_dict())
    before, random = state(), torch.get_rng_state()
    found = traced(model)
    assert state() == before
    assert torch.equal(torch.get_rng_state(), random)
    assert all(torch.equal(values[key], value) for key, value in model.state_dict().items())
    assert (found.failure is None, len(found.parts)) == ((True, 2) if error is None else (False, 0))


def test_a_forward_that_fails_says_so_and_shows_nothing() -> None:
    model = restless_model(RuntimeError("no such input"))
    why = "forward on dummy inputs must run, got RuntimeError: no such input"
    assert traced(model) == Trace([], why)
    with pytest.raises(SiteError, match=why):
        lt.apply(model, lt.RoutedFFN())


def test_a_model_without_dummy_inputs_has_no_parts() -> None:
    assert traced(nn.Sequential(nn.Sequential(up(), down()))) == Trace([])


def test_a_model_without_numbers_is_not_run() -> None:
    with torch.device("meta"):
        model = restless_model()
    assert traced(model) == Trace(
        [], "forward on dummy inputs must run, got a model on the meta device"
    )


def test_a_gradient_needs_no_graph_of_the_trace() -> None:
    model = restless_model()
    kept: list[Tensor] = []
    model.layers[0].register_forward_hook(lambda m, args, output: kept.append(output))
    traced(model)
    assert not kept[0].requires_grad


class LlamaLike(nn.Module):
    """Has the names of Llama's FFN, and computes twice as much."""

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = factor
        self.gate_proj, self.up_proj, self.down_proj = up(), up(), down()
        self.act_fn = nn.SiLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.factor * self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


def test_a_site_that_only_has_the_names_is_refused_by_name() -> None:
    model = Model(Block(lambda m, x: x + m.mlp(x), mlp=LlamaLike(1.0)))
    model.layers[1].mlp.factor = 2.0
    modules = dict(model.named_modules())
    with pytest.raises(SiteError, match=r"1 of 2 .*: layers\.1\.mlp: FFN must have up"):
        lt.apply(model, lt.RoutedFFN())
    assert dict(model.named_modules()) == modules
    lt.apply(model, lt.RoutedFFN(sites=["layers.0.mlp"]))
