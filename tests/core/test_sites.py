"""Sites of every tiny model, exactly; and the ways of naming them."""

import copy

import pytest
import torch
from models import D_HIDDEN, D_MODEL, MODELS
from torch import Tensor, nn

import leantune as lt
from leantune.core.discovery import find_sites
from leantune.core.linear import ConvertedLinear
from leantune.core.sites import PARTS, ROLES, Site, is_nested, match_sites
from leantune.errors import SiteError

GATED = ("t5_gated", "llama", "mistral", "qwen2", "qwen3")


def block_names(name: str, model: nn.Module) -> list[str]:
    names = [p.replace("*", str(i)) for p in MODELS[name].blocks for i in range(2)]
    modules = dict(model.named_modules())
    assert all(n in modules for n in names)
    return names


def inputs_of(name: str, model: nn.Module, wanted: list[str]) -> dict[str, Tensor]:
    """Run one batch and return the very tensor that each named module was called with."""
    seen: dict[str, Tensor] = {}
    for n in wanted:
        model.get_submodule(n).register_forward_pre_hook(
            lambda module, args, n=n: seen.__setitem__(n, args[0])
        )
    model(**MODELS[name].batch())
    return {n: seen[n] for n in wanted}


def width(module: nn.Module, side: str) -> int:
    """Return the width of a linear's ``"in"`` or ``"out"`` side, of either layout."""
    d_out, d_in = module.weight.shape if isinstance(module, nn.Linear) else module.weight.t().shape
    return d_in if side == "in" else d_out


@pytest.mark.parametrize("name", MODELS)
def test_blocks_hold_their_attention_and_mlp(name: str) -> None:
    model = MODELS[name].build()
    modules = dict(model.named_modules())
    sites = find_sites(model)
    blocks = block_names(name, model)
    assert [s.name for s in sites if s.role == "block"] == blocks
    for block in blocks:
        has_cross = name.startswith("t5") and block.startswith("decoder")
        inside = [s for s in sites if s.block == block]
        roles = [s.role for s in inside]
        assert roles.count("mlp") == roles.count("activation") == 1
        is_cross = [s.is_cross for s in inside if s.role == "attention"]
        assert is_cross == ([False, True] if has_cross else [False])
    assert all(modules[s.name] is s.module for s in sites)
    for site in sites:
        assert all(modules[child.name] is child.module for child in site.children.values())
    order = list(modules)
    assert [order.index(s.name) for s in sites] == sorted(order.index(s.name) for s in sites)
    assert {s.role for s in sites} == set(ROLES)


@pytest.mark.parametrize("name", MODELS)
def test_mlp_parts_are_what_they_are_called(name: str) -> None:
    """The activation reads gate (or up), and down reads what it made (times up)."""
    model = MODELS[name].build()
    for site in (s for s in find_sites(model) if s.role == "mlp"):
        parts = {part: child.module for part, child in site.children.items()}
        assert {"up", "down", "activation"} <= set(parts)
        assert ("gate" in parts) == (name in GATED)
        assert width(parts["up"], "out") == width(parts["down"], "in") == D_HIDDEN
        assert width(parts["up"], "in") == width(parts["down"], "out") == D_MODEL
        names = [site.children[part].name for part in ("up", "activation", "down")]
        x, before, hidden = inputs_of(name, model, names).values()
        up, gate = parts["up"], parts.get("gate")
        assert torch.equal((up if gate is None else gate)(x).view_as(before), before)
        after = parts["activation"](before)
        wanted = after if gate is None else after * up(x).view_as(after)
        assert torch.equal(wanted.view_as(hidden), hidden)


@pytest.mark.parametrize("name", MODELS)
def test_attention_parts_are_what_they_are_called(name: str) -> None:
    model = MODELS[name].build()
    for site in (s for s in find_sites(model) if s.role == "attention"):
        parts = {part: child.module for part, child in site.children.items()}
        if "qkv" in parts:
            assert set(parts) == {"qkv", "output"} and width(parts["qkv"], "out") == 3 * D_MODEL
            continue
        assert set(parts) == {"query", "key", "value", "output"}
        assert width(parts["query"], "out") == width(parts["output"], "in") == D_MODEL
        assert width(parts["key"], "out") == width(parts["value"], "out") <= D_MODEL
        names = [site.children[part].name for part in ("query", "key", "value")]
        assert [n.rpartition(".")[2][0] for n in names] == ["q", "k", "v"]
        query, key, value = inputs_of(name, model, names).values()
        assert key is value and (query is key) == (not site.is_cross)


@pytest.mark.parametrize("name", MODELS)
def test_every_linear_of_a_block_is_a_part_and_parts_name_it_everywhere(name: str) -> None:
    sites = find_sites(MODELS[name].build())
    linears = {s.name: s for s in sites if s.role == "linear" and s.block is not None}
    parts = {
        child.name: f"{site.role}.{part}"
        for site in sites
        for part, child in site.children.items()
        if child.name in linears
    }
    assert {n: s.part for n, s in linears.items()} == parts and set(parts.values()) <= set(PARTS)
    down = match_sites(sites, ("mlp.down",), lambda s: False, "Test")
    assert [s.name for s in down] == [s.children["down"].name for s in sites if s.role == "mlp"]


@pytest.mark.parametrize("name", MODELS)
def test_norms_are_found_exactly(name: str) -> None:
    model = MODELS[name].build()
    norms = [s.name for s in find_sites(model) if s.role == "norm"]
    assert norms == [n for n, m in model.named_modules() if "norm" in type(m).__name__.lower()]


@pytest.mark.parametrize("name", MODELS)
def test_linears_are_found_exactly(name: str) -> None:
    model = MODELS[name].build()
    wanted = [
        n for n, m in model.named_modules() if type(m) is nn.Linear or type(m).__name__ == "Conv1D"
    ]
    sites = [s for s in find_sites(model) if s.role == "linear"]
    assert [s.name for s in sites] == wanted
    inside = [s for s in sites if any(s.name.startswith(b + ".") for b in block_names(name, model))]
    assert [s for s in sites if s.block is not None] == inside
    # Everything outside the blocks of these models is a head, and none of the blocks' linears is.
    assert all(s.is_head_or_embedding == (s.block is None) for s in sites)


@pytest.mark.parametrize("name", MODELS)
def test_linears_share_a_key_exactly_where_they_read_one_tensor(name: str) -> None:
    model = MODELS[name].build()
    linears = [s for s in find_sites(model) if s.role == "linear" and s.block is not None]
    seen = inputs_of(name, model, [s.name for s in linears])
    by_key: dict[str, set[int]] = {}
    by_tensor: dict[int, list[Site]] = {}
    for site in linears:
        if site.shared_input is not None:
            by_key.setdefault(site.shared_input, set()).add(id(seen[site.name]))
        # T5's cross attention reads the encoder's output in every block: one key for each.
        if "EncDecAttention" not in site.name:
            by_tensor.setdefault(id(seen[site.name]), []).append(site)
    assert all(len(tensors) == 1 for tensors in by_key.values())
    together = [sites for sites in by_tensor.values() if len(sites) > 1]
    assert bool(together) == (name != "gpt2")
    for sites in together:
        assert len({s.shared_input for s in sites}) == 1 and sites[0].shared_input is not None


def test_also_replaced_names_what_a_whole_mlp_replaces() -> None:
    def also_replaced(name: str) -> tuple[str, ...]:
        return next(s.also_replaced for s in find_sites(MODELS[name].build()) if s.role == "mlp")

    assert also_replaced("bert") == ("bert.encoder.layer.0.output.dense",)
    assert also_replaced("opt") == (
        "model.decoder.layers.0.activation_fn",
        "model.decoder.layers.0.fc2",
    )
    assert also_replaced("llama") == ()


# peft asks transformers for a name that transformers is about to drop.
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
def test_factors_of_a_peft_model_are_linears() -> None:
    from peft import LoraConfig, get_peft_model

    targets = ["q_proj", "k_proj", "v_proj", "gate_proj", "up_proj", "down_proj"]
    model = get_peft_model(MODELS["llama"].build(), LoraConfig(r=2, target_modules=targets))
    sites = {s.name: s for s in find_sites(model)}
    layer = "base_model.model.model.layers.0"
    first = [sites[f"{layer}.self_attn.{x}_proj.lora_A.default"] for x in "qkv"]
    assert len({s.shared_input for s in first}) == 1 and first[0].shared_input is not None
    base = [sites[f"{layer}.self_attn.{x}_proj.base_layer"] for x in "qkv"]
    assert (
        len({s.shared_input for s in base}) == 1 and base[0].shared_input != first[0].shared_input
    )
    assert not base[0].is_trainable and first[0].is_trainable
    gated = [sites[f"{layer}.mlp.{x}_proj.lora_A.default"] for x in ("gate", "up")]
    assert (
        len({s.shared_input for s in gated}) == 1 and gated[0].shared_input != first[0].shared_input
    )
    assert sites[f"{layer}.mlp.down_proj.lora_A.default"].shared_input is None
    second = [s for s in sites.values() if ".lora_B." in s.name]
    assert len(second) == 12 and all(s.shared_input is None for s in second)
    assert sum(s.role == "attention" for s in sites.values()) == 2


class Anything(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(4, 8)
        self.layers = nn.ModuleList([nn.Linear(8, 8) for _ in range(2)])
        self.mlp = nn.Sequential(nn.Linear(8, 4), nn.ReLU(), nn.Bilinear(4, 4, 4))
        self.classifier = nn.Linear(4, 2)
        self.lm_head = nn.Linear(4, 2)
        self.score = nn.Sequential(nn.Linear(2, 2))
        self.forehead_of_it = nn.Linear(4, 4)


def test_any_module_has_its_linears() -> None:
    sites = find_sites(Anything())
    assert [s.name for s in sites] == [
        "layers.0",
        "layers.1",
        "mlp.0",
        "classifier",
        "lm_head",
        "score.0",
        "forehead_of_it",
    ]
    assert all(s.role == "linear" and s.shared_input is None for s in sites)
    heads = [s.name for s in sites if s.is_head_or_embedding]
    assert heads[:3] == ["classifier", "lm_head", "score.0"]


class Same(nn.Linear):
    """A linear of a class of its own, whose forward is another way of writing the same."""

    def forward(self, input: Tensor) -> Tensor:
        y = input @ self.weight.T
        return y if self.bias is None else y + self.bias


class Scaled(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return 1.001 * super().forward(input)


class Dropped(Same):
    def forward(self, input: Tensor) -> Tensor:
        return nn.functional.dropout(super().forward(input), 0.5, self.training)


class Counting(Same):
    """What it holds besides weight and bias might change what it computes."""

    def __init__(self) -> None:
        super().__init__(4, 4, bias=False)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, input: Tensor) -> Tensor:
        self.calls += 1
        return super().forward(input)


class Named(nn.Linear):
    """A class of its own that changes nothing."""


class Quantised(Tensor):
    """A weight that is no plain tensor, as quantisers make them."""


def quantised() -> nn.Linear:
    layer = nn.Linear(4, 4, bias=False)
    data = torch.zeros(4, 4).as_subclass(Quantised)
    layer.weight = nn.Parameter(data)
    return layer


def replaced() -> nn.Linear:
    layer = nn.Linear(4, 4)
    layer.forward = lambda x: x  # as hooks of other libraries do
    return layer


def computed() -> nn.Linear:
    return nn.utils.parametrizations.weight_norm(nn.Linear(4, 4))


def test_linear_classes_are_taken_by_their_value() -> None:
    model = nn.Sequential(Same(4, 4, bias=False), Named(4, 4))
    assert [(s.role, s.unusable) for s in find_sites(model)] == [("linear", None)] * 2
    plain = copy.deepcopy(model)
    session = lt.apply(model, lt.WTACRS(keep_ratio=0.5, min_rows=1))
    assert all(isinstance(m, ConvertedLinear) for m in model)
    x = torch.randn(3, 8, 4)
    assert torch.equal(model(x), plain(x))
    session.remove()
    assert [type(m) for m in model] == [Same, Named]


def test_a_class_is_tried_without_starting_every_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert find_sites(nn.Sequential(Same(4, 4)))[0].unusable is None


@pytest.mark.parametrize(
    ("make", "why"),
    [
        (lambda: Scaled(4, 4), "output must be that of a linear to the bit, got another from Scal"),
        (
            lambda: Dropped(4, 4),
            "output must be that of a linear to the bit, got another from Drop",
        ),
        (Counting, "output must be that of a linear to the bit, got another from Counting"),
        (quantised, "weight must be a plain tensor, got Quantised"),
        (replaced, "forward must be that of its class, got one that was put on the module"),
        (computed, "weight must be a parameter of the module itself, got one that is computed"),
        (lambda: nn.MultiheadAttention(4, 1).out_proj, "got torch's attention, which reads it"),
    ],
)
def test_what_is_no_linear_is_refused_by_name_and_never_taken_unasked(make, why: str) -> None:
    model = nn.Sequential(nn.Linear(4, 4), make())
    state = torch.get_rng_state()
    site = next(s for s in find_sites(model) if s.name == "1")
    assert site.unusable is not None and why in site.unusable
    assert torch.equal(torch.get_rng_state(), state) and site.module.training
    assert not list(model.buffers()) or float(model[1].calls) == 0
    with pytest.raises(SiteError, match="1 of 1 sites cannot be used: 1: ") as error:
        lt.apply(model, lt.WTACRS(sites="1"))
    assert why in str(error.value)
    lt.apply(model, lt.WTACRS(min_rows=1))
    assert isinstance(model[0], ConvertedLinear) and model[1] is site.module
    with pytest.raises(SiteError, match="got none by the method's own choice") as error:
        lt.apply(nn.Sequential(make()), lt.WTACRS())
    assert why in str(error.value)


class Conv1D(nn.Module):
    """A real convolution that has the name of transformers' linear."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3, 4, 5))
        self.bias = nn.Parameter(torch.zeros(3))

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.conv1d(x, self.weight, self.bias)


class TransformerBlock(nn.Module):
    """A user's own block that has the name and the parts of DistilBERT's."""

    def __init__(self) -> None:
        super().__init__()
        self.attention, self.ffn = nn.Module(), nn.Module()
        for name in ("q_lin", "k_lin", "v_lin", "out_lin"):
            self.attention.add_module(name, nn.Linear(4, 4))
        self.ffn.lin1, self.ffn.lin2 = nn.Linear(4, 8), nn.Linear(8, 4)
        self.ffn.activation, self.ffn.dropout = nn.GELU(), nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.ffn.lin2(self.ffn.activation(self.ffn.lin1(x)))


def test_a_users_own_class_conv1d_is_no_linear() -> None:
    model = nn.Sequential(Conv1D(), nn.Linear(4, 2))
    assert [s.name for s in find_sites(model)] == ["1"]
    with pytest.raises(SiteError, match="got '0', which matches none"):
        lt.apply(model, lt.WTACRS(sites=["0"]))
    lt.apply(model, lt.WTACRS(min_rows=1))
    assert type(model[0]) is Conv1D
    model(torch.randn(2, 4, 8)).sum().backward()
    # The control: transformers' own is one.
    from transformers.pytorch_utils import Conv1D as Linear1D

    assert [s.role for s in find_sites(nn.Sequential(Linear1D(3, 4)))] == ["linear"]


def test_a_users_own_class_transformer_block_is_not_distilberts() -> None:
    sites = find_sites(nn.ModuleDict({"layer": TransformerBlock()}))
    assert {s.role for s in sites} == {"linear"} and len(sites) == 6
    for site in sites:
        assert (site.block, site.part, site.shared_input) == (None,) * 3
    # The control: DistilBERT's own is a block.
    theirs = [s for s in find_sites(MODELS["distilbert"].build()) if s.role == "block"]
    assert theirs


@pytest.mark.parametrize(
    ("one", "other", "expected"),
    [("a.b", "a.b", True), ("a", "a.b", True), ("a.b.c", "a", True), ("a.b", "a.bc", False)],
)
def test_nested_names(one: str, other: str, expected: bool) -> None:
    assert is_nested(one, other) is is_nested(other, one) is expected


@pytest.fixture(scope="module")
def bert_sites() -> list[Site]:
    return find_sites(MODELS["bert"].build())


def names(sites: list[Site], *wanted: str) -> list[str]:
    return [s.name for s in match_sites(sites, wanted, lambda s: False, "Test")]


LAYER = "bert.encoder.layer"


@pytest.mark.parametrize(
    ("pattern", "found"),
    [
        ("block", [f"{LAYER}.0", f"{LAYER}.1"]),
        ("attention", [f"{LAYER}.0.attention.self", f"{LAYER}.1.attention.self"]),
        ("query", [f"{LAYER}.0.attention.self.query", f"{LAYER}.1.attention.self.query"]),
        ("self.query", [f"{LAYER}.0.attention.self.query", f"{LAYER}.1.attention.self.query"]),
        ("bert.*.1.*.query", [f"{LAYER}.1.attention.self.query"]),
        ("1.attention.*.[kq]*y", [f"{LAYER}.1.attention.self.{x}" for x in ("query", "key")]),
        (
            "re:layer\\.0.*(query|value)$",
            [f"{LAYER}.0.attention.self.{x}" for x in ("query", "value")],
        ),
        ("classifier", ["classifier"]),
        (f"{LAYER}.0.output.dense", [f"{LAYER}.0.output.dense"]),
    ],
)
def test_patterns(bert_sites, pattern, found) -> None:
    assert names(bert_sites, pattern) == found


def test_role_matches_every_site_of_it(bert_sites) -> None:
    assert names(bert_sites, "linear") == [s.name for s in bert_sites if s.role == "linear"]


def test_patterns_add_up_in_model_order(bert_sites) -> None:
    assert names(bert_sites, "classifier", "1.*.key", "0.*.key") == [
        f"{LAYER}.0.attention.self.key",
        f"{LAYER}.1.attention.self.key",
        "classifier",
    ]


@pytest.mark.parametrize("pattern", ["uery", "nothing", "re:^nothing$", "QUERY"])
def test_pattern_without_a_match_is_an_error(bert_sites, pattern) -> None:
    with pytest.raises(
        SiteError, match="Test: sites must match at least one module, got "
    ) as error:
        names(bert_sites, "query", pattern)
    assert repr(pattern) in str(
        error.value
    ) and "linear, attention, mlp, norm, activation, block" in str(error.value)


def test_broken_regular_expression(bert_sites) -> None:
    with pytest.raises(SiteError, match=r"valid regular expressions, got 're:\('"):
        names(bert_sites, "re:(")


def test_predicate_and_default(bert_sites) -> None:
    chosen = match_sites(bert_sites, lambda s: s.name.endswith("key"), lambda s: False, "Test")
    assert [s.name.rpartition(".")[2] for s in chosen] == ["key", "key"]
    assert match_sites(bert_sites, None, lambda s: s.role == "block", "Test") == [
        s for s in bert_sites if s.role == "block"
    ]


def test_trainable_is_about_own_parameters() -> None:
    layer = nn.Linear(2, 2)
    layer.weight.requires_grad_(False)
    assert Site("x", "linear", layer).is_trainable
    layer.bias.requires_grad_(False)
    assert not Site("x", "linear", layer).is_trainable
