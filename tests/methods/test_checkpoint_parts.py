"""Checkpointing of a block's MLP or attention: exact, for fewer bytes, beside any method."""

import copy
import functools
import pickle
from typing import Any

import pytest
import torch
import transformers
import zoo
from models import MODELS
from torch import Tensor, nn
from torch.nn import functional as F

import leantune as lt
from leantune.core import registry
from leantune.core.linear import Converted
from leantune.errors import ConfigError, SiteError, UnsupportedError
from leantune.methods.checkpoint import recompute

PARTS = ("mlp", "attention", ("mlp", "attention"))
# A module of its own, a chain of two modules, and one of three.
KINDS = ("llama", "bert", "opt", "t5")


def step(model: nn.Module, batch: Any, seed: int = 1) -> dict[str, Tensor]:
    model.zero_grad()
    torch.manual_seed(seed)
    output = model(**batch) if isinstance(batch, dict) else model(batch)
    (output.square().sum() if isinstance(output, Tensor) else output.loss).backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def kept(model: nn.Module, batch: Any) -> int:
    return lt.ledger(model, batch if isinstance(batch, dict) else (batch,)).activations


@pytest.mark.parametrize("parts", PARTS)
@pytest.mark.parametrize("name", MODELS)
def test_gradients_are_the_plain_ones_to_the_bit_for_fewer_bytes(name: str, parts: Any) -> None:
    plain, model, batch = MODELS[name].build(), MODELS[name].build(), MODELS[name].batch()
    state = [sorted(vars(module)) for module in model.modules()]
    session = lt.apply(model, lt.Checkpoint(parts=parts))
    assert same(step(model, batch), step(plain, batch))
    assert kept(model, batch) < 0.9 * kept(plain, batch)
    model.eval(), plain.eval()
    assert torch.equal(model(**batch).logits, plain(**batch).logits)
    session.remove()
    assert [sorted(vars(module)) for module in model.modules()] == state


@pytest.mark.parametrize("parts", PARTS)
@pytest.mark.parametrize("name", ["bert", "gpt2", "t5", "vit"])
def test_dropout_inside_is_the_same_the_second_time(name: str, parts: Any) -> None:
    plain, batch = zoo.build(name, dropout=0.1)
    model = copy.deepcopy(plain)
    lt.apply(model, lt.Checkpoint(parts=parts))
    assert same(step(model, batch), step(plain, batch))
    assert not same(step(model, batch, seed=2), step(plain, batch))


@pytest.mark.parametrize("name", KINDS)
def test_a_recomputed_mlp_keeps_its_input_alone(name: str) -> None:
    tiny = MODELS[name]
    model, batch = tiny.build(), tiny.batch()
    mlp = next(site for site in lt.find_sites(model) if site.role == "mlp")
    lt.apply(model, lt.Checkpoint(parts="mlp"))
    seen: list[Tensor] = []
    first = model.get_submodule(mlp.whole)
    handle = first.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    book = lt.ledger(model, batch)
    handle.remove()
    linears = [c.name for key, c in mlp.children.items() if key in ("gate", "up", "down")]
    num_bytes = sum(book.saved_bytes(n) for n in {mlp.whole, *linears})
    # torch keeps two scalars, and the norm before it may keep the same tensor.
    assert num_bytes <= seen[0].numel() * 4 + 16


def test_an_input_given_by_name_is_saved_like_any_other() -> None:
    """Held by a closure it would be in no ledger, and offloading would not find it."""
    tiny, places, read = MODELS["llama"], set(), []
    model = tiny.build()
    lt.apply(model, lt.Checkpoint(parts="attention"))
    inside = model.model.layers[0].self_attn
    inside.register_forward_pre_hook(
        lambda module, args, kwargs: read.append(kwargs["hidden_states"]), with_kwargs=True
    )
    hooks = torch.autograd.graph.saved_tensors_hooks
    with hooks(lambda t: places.add(t.data_ptr()) or t, lambda t: t):
        model(**tiny.batch())
    assert read[0].data_ptr() in places


class LlamaBlock(nn.Module):
    """A block of Llama-3.2-1B's proportions: 4 x wide MLP, 32 heads on 8 of keys, by SDPA."""

    def __init__(self, width: int = 128) -> None:
        super().__init__()
        config = transformers.LlamaConfig(
            vocab_size=32,
            hidden_size=width,
            intermediate_size=4 * width,
            num_hidden_layers=1,
            num_attention_heads=32,
            num_key_value_heads=8,
            attn_implementation="sdpa",
            use_cache=False,
        )
        self.model = transformers.LlamaModel(config)

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.model(input_ids=input_ids).last_hidden_state.float()


def test_a_llama_block_keeps_two_fifths_under_sampling_with_its_mlp_recomputed() -> None:
    num_rows, width = 256, 128
    ids = torch.randint(0, 32, (4, num_rows // 4))
    saved: list[int] = []
    for methods in ((), (lt.Checkpoint(parts="mlp"), lt.WTACRS(keep_ratio=0.1))):
        torch.manual_seed(0)
        model = LlamaBlock(width).bfloat16().train()
        if methods:
            lt.apply(model, *methods)
        book = lt.ledger(model, (ids,))
        saved.append(book.saved_bytes("model.layers.0"))
    # What the MLP kept: gate, up, the activation and the product, 4 x wide, in bf16.
    assert saved[0] - saved[1] > 4 * num_rows * 4 * width * 2
    assert book.saved_bytes("model.layers.0.mlp") == num_rows * width * 2
    assert saved[1] * 100 <= 40 * saved[0]


# Other methods.

METHODS = [m for m, s in registry.list_methods().items() if m != "checkpoint" and not s.needs_gpu]


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("method", METHODS)
def test_a_method_inside_computes_what_it_computes_without(method: str, name: str) -> None:
    if (method, name) == ("meprop", "opt"):
        return  # Refused, below.
    tiny, spec = MODELS[name], registry.get(method)
    other = spec.config(**spec.test_options)
    if method == "wta_crs":
        other = lt.WTACRS(**spec.test_options, draw_at="backward")
    ours, found = lt.Checkpoint(parts=("mlp", "attention")), []
    for methods in ((other,), (ours, other), (other, ours)):
        model = tiny.build()
        modules = [type(module) for module in model.modules()]
        session = lt.apply(model, *methods)
        session.calibrate([tiny.batch(90), tiny.batch(91)])
        found.append(step(model, tiny.batch()))
        session.remove()
        assert [type(module) for module in model.modules()] == modules
    assert same(found[0], found[1]) and same(found[0], found[2])


def drawn_in_backward(model: nn.Module) -> set[str]:
    linears = {n: m for n, m in model.named_modules() if isinstance(m, Converted)}
    return {name for name, linear in linears.items() if linear.rows._draws_in_backward()}


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("part", ["mlp", "attention"])
def test_auto_draws_in_the_backward_of_recomputed_parts_alone(name: str, part: str) -> None:
    tiny = MODELS[name]
    for methods in (
        [lt.Checkpoint(parts=part), lt.WTACRS()],
        [lt.WTACRS(), lt.Checkpoint(parts=part)],
    ):
        model = tiny.build()
        sites = [s for s in lt.find_sites(model) if s.role == "linear" and s.part]
        session = lt.apply(model, *methods)
        inside = {s.name for s in sites if (s.part or "").startswith(part)}
        assert drawn_in_backward(model) == inside and 0 < len(inside) < len(sites)
        model.activation_checkpointing_enable()
        assert drawn_in_backward(model) >= {s.name for s in sites}
        model.activation_checkpointing_disable()
        session.remove()


def test_rows_drawn_there_are_those_of_exact_norms() -> None:
    """As with draw_at="backward": a draw in forward gives other gradients."""
    tiny, found = MODELS["bert"], []
    for draw_at in ("auto", "backward", "forward"):
        model = tiny.build()
        rows = lt.WTACRS(min_rows=2, draw_at=draw_at)
        lt.apply(model, rows, lt.Checkpoint(parts=["mlp", "attention"]))
        grads = step(model, tiny.batch())
        found.append({n: g for n, g in grads.items() if ".layer." in n})
    assert same(found[0], found[1]) and not same(found[0], found[2])


# transformers' own switch.


@pytest.mark.parametrize("use_reentrant", [True, False])
@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("name", ["bert", "llama"])
def test_transformers_own_switch_recomputes_whole_blocks(name, when, use_reentrant) -> None:
    tiny = MODELS[name]
    plain, wanted, model, batch = tiny.build(), tiny.build(), tiny.build(), tiny.batch()
    wanted.activation_checkpointing_enable({"use_reentrant": use_reentrant})
    if when == "before":
        model.activation_checkpointing_enable({"use_reentrant": use_reentrant})
    lt.apply(model, lt.Checkpoint(parts="mlp"))
    if when == "after":
        model.activation_checkpointing_enable({"use_reentrant": use_reentrant})
    calls: list[int] = []
    down = next(m for n, m in model.named_modules() if n.endswith(("down_proj", "output.dense")))
    up = next(m for n, m in model.named_modules() if n.endswith(("up_proj", "intermediate.dense")))
    up.register_forward_hook(lambda module, args, output: calls.append(1))
    assert down is not up
    assert same(step(model, batch), step(plain, batch))
    assert len(calls) == 2  # Once more for its block, not twice more.
    if not use_reentrant:
        assert kept(model, batch) == kept(wanted, batch)
    model.activation_checkpointing_disable()
    assert kept(model, batch) < 0.9 * kept(plain, batch)


# Blocks of any class.


class Block(nn.Module):
    """A user's own block that computes its FFN itself, by what is given."""

    def __init__(self, between: Any = None, norm: type[nn.Module] = nn.Identity) -> None:
        super().__init__()
        self.norm = norm(8)
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(8, 8) for _ in range(3))
        self.self_attn = Attention()
        self.fc1, self.fc2, self.activation_fn = nn.Linear(8, 16), nn.Linear(16, 8), nn.GELU()
        self.between = between

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.self_attn(self.norm(x))
        hidden = self.activation_fn(self.fc1(x))
        return x + self.fc2(hidden if self.between is None else self.between(hidden))


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = (nn.Linear(8, 8) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (p(x).unsqueeze(1) for p in (self.q_proj, self.k_proj, self.v_proj))
        return self.o_proj(F.scaled_dot_product_attention(q, k, v).squeeze(1))


class Net(nn.Module):
    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Block(**options), Block(**options)])

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


@pytest.mark.parametrize("parts", PARTS)
def test_a_users_own_blocks_copied_pickled_and_chosen(parts: Any) -> None:
    plain, x = Net(), torch.randn(2, 4, 8)
    model = copy.deepcopy(plain)
    lt.apply(model, lt.Checkpoint(parts=parts, sites="layers.1"))
    assert not [n for n, m in model.layers[0].named_modules() if "forward" in vars(m)]
    for way in (lambda m: m, copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))):
        copied = way(model)
        assert same(step(copied, x), step(plain, x))
        assert kept(copied, x) < kept(plain, x)
        copied._leantune_session.remove()
        assert kept(copied, x) == kept(plain, x)
        if copied is model:
            lt.apply(model, lt.Checkpoint(parts=parts, sites="layers.1"))


def test_an_operation_between_the_modules_of_an_mlp_is_refused_when_it_is_met() -> None:
    model = Net(between=lambda hidden: 2 * hidden)
    lt.apply(model, lt.Checkpoint(parts="mlp"))
    with pytest.raises(UnsupportedError, match=r"layers\.0\.fc1 must be followed by the rest of i"):
        model(torch.randn(2, 4, 8))
    with torch.no_grad():
        model(torch.randn(2, 4, 8))


def test_what_others_put_around_a_part_since_stays_and_ours_is_off() -> None:
    model, x = Net(), torch.randn(2, 4, 8)
    before = kept(model, x)
    session = lt.apply(model, lt.Checkpoint(parts="attention"))
    inside = model.layers[0].self_attn
    theirs = functools.partial(lambda forward, x: forward(x), inside.forward)
    inside.forward = theirs
    assert kept(model, x) < before
    session.remove()
    assert inside.forward is theirs and "forward" not in vars(model.layers[1].self_attn)
    assert kept(model, x) == before


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.slow
def test_compiled_equals_eager() -> None:
    torch._dynamo.reset()
    model, x = Net(), torch.randn(2, 4, 8)
    wanted = step(model, x)
    lt.apply(model, lt.Checkpoint(parts=("mlp", "attention")))
    model.zero_grad()
    torch.compile(model, backend="aot_eager")(x).square().sum().backward()
    torch.testing.assert_close(
        {n: p.grad for n, p in model.named_parameters() if n in wanted}, wanted
    )
    torch._dynamo.reset()


# Kept inputs in host memory.


def test_offloaded_inputs_are_packed_by_torch_and_those_on_a_cpu_are_not(monkeypatch: Any) -> None:
    calls: list[dict[str, Any]] = []
    packed: list[Tensor] = []

    def save_on_cpu(**options: Any) -> Any:
        calls.append(options)
        hooks = torch.autograd.graph.saved_tensors_hooks
        return hooks(lambda t: packed.append(t) or t, lambda t: t)

    monkeypatch.setattr(recompute, "save_on_cpu", save_on_cpu)
    model, x = nn.Sequential(nn.Linear(4, 8), nn.GELU(), nn.Linear(8, 4)), torch.randn(2, 4)
    recompute.run_offloaded(model, x)
    assert not calls
    elsewhere = x.to("meta").requires_grad_()
    recompute.run_offloaded(model.to("meta"), elsewhere)
    assert calls == [{"pin_memory": True, "device_type": "meta"}]
    assert [tuple(t.shape) for t in packed if t.numel()] == [(2, 4)]  # older torch adds one of 0


@pytest.mark.gpu
def test_offloaded_inputs_leave_the_gpu() -> None:
    held: list[int] = []
    plain, x = Net().cuda(), torch.randn(2, 4096, 8, device="cuda")
    wanted = step(plain, x)
    for offload in (False, True):
        model = copy.deepcopy(plain)
        lt.apply(model, lt.Checkpoint(offload=offload))
        before = torch.cuda.memory_allocated()
        output = model(x)
        held.append(torch.cuda.memory_allocated() - before)
        del output
        assert same(step(model, x), wanted)
    assert held[1] < held[0]


def test_offload_is_what_blocks_and_parts_run_by() -> None:
    for parts in ("block", "mlp"):
        model = MODELS["llama"].build()
        lt.apply(model, lt.Checkpoint(parts=parts, offload=True))
        layer = model.model.layers[0]
        run = layer.mlp.forward.run if parts == "mlp" else layer._gradient_checkpointing_func
        assert run is recompute.run_offloaded


# Bad input.


@pytest.mark.parametrize(
    "parts", ["", (), [], "ffn", ("mlp", "ffn"), ("mlp", "block"), ["mlp", "mlp"], None, 3, [[]]]
)
def test_parts_that_are_none_or_unknown_are_refused(parts: Any) -> None:
    with pytest.raises(
        ConfigError, match=r"Checkpoint: parts must be 'block', 'mlp', .* got .*; leave it out"
    ):
        lt.Checkpoint(parts=parts)


@pytest.mark.parametrize("parts", ["mlp", ["mlp"], ("mlp", "attention"), "block"])
def test_parts_round_trip(parts: Any) -> None:
    config = lt.Checkpoint(parts=parts)
    assert registry.config_from_dict(config.to_dict()) == config
    assert config.to_dict()["parts"] == ([parts] if isinstance(parts, str) else list(parts))


@pytest.mark.parametrize("one", ["block", "mlp"])
@pytest.mark.parametrize("other", ["mlp", "attention"])
def test_a_part_and_its_block_or_two_of_its_parts_are_refused_together(one, other) -> None:
    model = MODELS["llama"].build()
    ours = (lt.Checkpoint(parts=one), lt.Checkpoint(parts=other, sites="layers.1"))
    with pytest.raises(SiteError, match=r"layers\.1 \(Checkpoint and Checkpoint, axis 'recompute'"):
        lt.apply(model, *ours)
    # Nothing was touched, and on blocks of their own they go together.
    session = lt.apply(model, lt.Checkpoint(parts=one, sites="layers.0"), ours[1])
    assert len(session.conversions) == 2


@pytest.mark.parametrize(
    ("name", "part", "block"),
    [
        ("albert", "mlp", "AlbertLayerGroup"),  # One module computes both.
        ("mixtral", "mlp", "MixtralDecoderLayer"),
        ("qwen2_moe", "mlp", "Qwen2MoeDecoderLayer"),  # Its shared expert is not all of it.
        ("xlnet", "attention", "XLNetLayer"),
        ("mamba", "mlp", "MambaBlock"),
        ("bart", "mlp", "BartEncoderLayer"),  # With dropout in the midst of linears of its own.
    ],
)
def test_a_block_whose_part_cannot_be_told_is_refused_by_name(name, part, block) -> None:
    model, _ = zoo.build(name, dropout=0.1)
    with pytest.raises(SiteError, match=rf"its {part} must be told from the rest, got {block}, "):
        lt.apply(model, lt.Checkpoint(parts=part))
    assert not [n for n, m in model.named_modules() if "forward" in vars(m)]


def test_hooks_that_would_see_other_tensors_are_refused() -> None:
    with pytest.raises(SiteError, match=r"layers\.0: modules that its block calls in turn must ha"):
        lt.apply(MODELS["opt"].build(), lt.MeProp(), lt.Checkpoint(parts="mlp"))


def test_running_statistics_in_the_part_are_refused() -> None:
    model = Net()
    for layer in model.layers:
        layer.activation_fn = nn.Sequential(nn.GELU(), nn.BatchNorm1d(4))
    with pytest.raises(SiteError, match="must have no running statistics, got BatchNorm1d"):
        lt.apply(model, lt.Checkpoint(parts="mlp"))
    lt.apply(model, lt.Checkpoint(parts="attention"))
