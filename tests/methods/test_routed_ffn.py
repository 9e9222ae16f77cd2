"""Routed FFNs against float64 loops, against the dense FFN, and with the other methods."""

import copy
import math
import pickle
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import zoo
from models import MODELS
from oracles import routed_ffn as oracle
from torch import Tensor, nn

import leantune as lt
from bench.host import operations
from leantune.core.files import trained_weights
from leantune.core.linear import ConvertedLinear, converted, swap
from leantune.core.runtime import Runtime
from leantune.errors import ConfigError, SiteError, UnsupportedError
from leantune.methods.routed_ffn import maths
from leantune.methods.routed_ffn import module as routed_module
from leantune.methods.routed_ffn.compensation import Compensation, fit_compensation
from leantune.methods.routed_ffn.module import RoutedMLP
from leantune.ops.rows import OuterProduct

# peft asks transformers for a name that transformers is about to drop.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")

ACTIVATIONS = {"llama": oracle.silu, "opt": oracle.relu, "gpt2": oracle.gelu_tanh}


def lora_for(name: str) -> lt.LoRA:
    patterns = {"llama": ["mlp.*_proj"], "opt": ["fc1", "fc2"], "gpt2": ["mlp.c_*"]}
    return lt.LoRA(rank=3, alpha=6.0, sites=patterns[name])


class Subspace:
    """Trains a copy of the weight instead of the weight."""

    def __init__(self, weight: Tensor) -> None:
        self.parameter = nn.Parameter(weight.detach().clone())

    def effective(self, base: Tensor, trained: Tensor) -> Tensor:
        return base

    def project(self, rows: Tensor) -> Tensor:
        return rows

    def grad(self, outer: OuterProduct) -> Tensor:
        return outer.dense()


def layers_of(model: nn.Module) -> list[RoutedMLP]:
    return [m for m in model.modules() if isinstance(m, RoutedMLP)]


def make(
    name: str, *methods: Any, spread: float = 1.0, seed: int = 0, **options: Any
) -> tuple[nn.Module, lt.Session, RoutedMLP]:
    """Convert a tiny model in float64; return it, its session and its first routed FFN.

    Router, biases and second LoRA factors are drawn anew, so that nothing is zero.
    """
    model = MODELS[name].build().double()
    session = lt.apply(model, *methods, lt.RoutedFFN(**options), seed=seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for layer in layers_of(model):
            for n, p in (*layer.named_parameters(), *layer.named_buffers()):
                if n.startswith("router") or "lora_B" in n or n.endswith("bias"):
                    scale = spread if n.startswith("router") else 0.3
                    p.copy_(scale * torch.randn(p.shape, generator=generator, dtype=p.dtype))
    return model, session, layers_of(model)[0]


def tokens(n: int = 12, seed: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, 16, generator=generator, dtype=torch.float64)


def numbers(tensor: Tensor | None) -> Any:
    return None if tensor is None else tensor.detach().double().numpy()


def as_oracle(layer: RoutedMLP, part: str) -> oracle.Linear:
    linear, adapters = layer.ffn.linears[part]
    out = oracle.Linear(numbers(layer.ffn.weight(part)), numbers(linear.bias))
    for f in adapters:
        out = out._replace(a=numbers(f.first.weight), b=numbers(f.second.weight), scaling=f.scaling)
    return out


def wanted_output(layer: RoutedMLP, name: str, x: Tensor, **changes: Any) -> np.ndarray:
    """The oracle's output of a layer; ``changes`` break it on purpose."""
    config = layer.config
    router = layer.router
    learnt = numbers(x) @ numbers(router.weight).T + numbers(router.bias)
    logits = learnt + numbers(x) @ numbers(router.start_weight).T + numbers(router.start_bias)
    chosen = oracle.best_groups(changes.pop("logits", logits), config.num_active)
    kind = changes.pop("gate", "output")
    factors = oracle.gate_values(kind, oracle.sigmoid(learnt), chosen)
    gate = as_oracle(layer, "gate") if name == "llama" else None
    up, down = as_oracle(layer, "up"), as_oracle(layer, "down")
    act = ACTIVATIONS[name]
    return oracle.routed_ffn(
        numbers(x), up, down, gate, act, config.num_groups, chosen, factors, **changes
    )


def close(got: Tensor, wanted: np.ndarray, tolerance: float = 1e-10) -> bool:
    return bool(np.abs(numbers(got) - wanted).max() <= tolerance * np.abs(wanted).max())


@pytest.mark.parametrize("with_lora", [False, True])
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_output_is_the_formulas(name: str, with_lora: bool) -> None:
    methods = (lora_for(name),) if with_lora else ()
    _, _, layer = make(name, *methods)
    x = tokens()
    got = layer.eval()(x)
    assert close(got, wanted_output(layer, name, x))
    # Controls: another choice, another gate, the down bias once per group, gates in another place.
    assert not close(got, wanted_output(layer, name, x, logits=-numbers(layer.router(x)[0])))
    assert not close(got, wanted_output(layer, name, x, gate="none"), 1e-3)
    assert not close(got, wanted_output(layer, name, x, before_activation=True), 1e-3)
    if layer.ffn.linears["down"].linear.bias is not None:
        assert not close(got, wanted_output(layer, name, x, num_down_biases=2), 1e-3)


def test_oracles_choose_the_same_groups() -> None:
    logits = tokens(50)[:, :6].round(decimals=1)  # with ties
    assert maths.choose(logits, 3).sort(1).values.tolist() == oracle.best_groups(numbers(logits), 3)
    assert maths.choose(-logits, 3).sort(1).values.tolist() != oracle.best_groups(
        numbers(logits), 3
    )
    assert maths.choose(torch.zeros(2, 5), 2).tolist() == [[0, 1], [0, 1]]


@pytest.mark.parametrize("name", MODELS)
def test_a_few_groups_are_the_whole_ffn_with_the_others_at_zero(name: str) -> None:
    """The other way to compute the same: all hidden units, times zero where a group is idle."""
    results = []
    for is_whole in (False, True):
        model, _, _ = make(name)
        for layer in layers_of(model):
            layer._is_hooked = is_whole
        output = model(**MODELS[name].batch())
        output.loss.backward()
        results.append([output.logits, *(p.grad for p in model.parameters())])
    for ours, theirs in zip(*results, strict=True):
        assert (ours is None) == (theirs is None)
        if ours is not None:
            torch.testing.assert_close(ours, theirs)


def test_all_groups_are_the_dense_model() -> None:
    """To the bit, whatever the router's start and whatever it has learnt."""
    tiny = MODELS["bert"]
    plain, model = tiny.build(), tiny.build()
    session = lt.apply(model, lt.RoutedFFN(num_active=4))
    session.calibrate([tiny.batch(1)])
    wanted, got = plain(**tiny.batch()), model(**tiny.batch())
    assert torch.equal(got.logits, wanted.logits)
    got.loss.backward()
    wanted.loss.backward()
    grads = dict(model.named_parameters())
    for n, p in plain.named_parameters():
        # Parts of BERT's FFN go by other names in the routed one.
        if n in grads:
            torch.testing.assert_close(grads[n].grad, p.grad, rtol=1e-4, atol=1e-7)
    for layer in layers_of(model):
        assert layer.router.weight.grad is None
        nn.init.constant_(layer.router.bias, 20.0)
    assert torch.equal(model(**tiny.batch()).logits, wanted.logits)


def test_gates_are_exactly_one_at_conversion() -> None:
    """And after calibration: with the others at zero, a chosen group is what it is in the FFN."""
    model = MODELS["llama"].build()
    session = lt.apply(model, lt.RoutedFFN())
    session.calibrate([MODELS["llama"].batch(1)])
    layer, x = layers_of(model)[0], tokens().float()
    layer._is_hooked = True
    chosen = torch.zeros(12, 4).scatter(1, maths.choose(layer.router(x)[0], 2), 1.0)
    wanted = layer.ffn.output(layer.ffn.hidden(x), chosen)
    assert torch.equal(layer(x), wanted)
    nn.init.constant_(layer.router.bias, 0.1)
    assert not torch.equal(layer(x), wanted)


def test_exact_is_the_dense_model() -> None:
    tiny = MODELS["bert"]
    model = tiny.build()
    session = lt.apply(model, lt.RoutedFFN())
    wanted = tiny.build()(**tiny.batch()).logits
    with session.exact():
        torch.testing.assert_close(model(**tiny.batch()).logits, wanted)
    assert not torch.allclose(model(**tiny.batch()).logits, wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_all_groups_with_lora_are_the_merged_dense_layer(name: str) -> None:
    model, session, layer = make(name, lora_for(name), num_active=4)
    x = tokens()
    before = layer.eval()(x)
    batch = MODELS[name].batch()
    logits = model.eval()(**batch).logits
    session.merge()
    assert not layers_of(model) and not any("lora" in n for n, _ in model.named_parameters())
    torch.testing.assert_close(model(**batch).logits, logits)
    mlp = next(s for s in lt.find_sites(model) if s.role == "mlp")
    if name != "opt":
        torch.testing.assert_close(mlp.module(x), before)


def force(layer: RoutedMLP, x: Tensor, how: str) -> None:
    """Make the router send tokens where a test wants them."""
    with torch.no_grad():
        layer.router.start_weight.zero_()
        layer.router.start_bias.zero_()
        if how != "as it is":
            layer.router.weight.zero_()
            layer.router.bias.copy_(torch.tensor([0.4, -0.2, 0.1, -0.3]))
        if how == "all but one alike":
            # The last token alone goes to the other two groups.
            towards = 2 * x[-1] / x[-1].square().sum()
            layer.router.weight.copy_(torch.outer(-layer.router.bias, towards))
            layer.router.weight -= layer.router.weight.mean(0)


@pytest.mark.parametrize("how", ["as it is", "alike", "all but one alike"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["llama", "opt", "gpt2"])
def test_both_ways_to_compute_agree(name: str, dtype: torch.dtype, how: str) -> None:
    """Groups without a token, one token alone, every token in one group, strided input."""
    x = tokens(10)
    results = []
    for is_whole in (False, True):
        _, _, layer = make(name, lora_for(name))
        layer._is_hooked = is_whole
        force(layer, x, how)
        layer.to(dtype)
        for rows in (x, x[:1], x[:, None].expand(-1, 2, -1), x.t().contiguous().t()):
            # Conv1D's own forward takes no strided input.
            rows = rows.contiguous() if is_whole else rows
            leaf = rows.to(dtype).detach().requires_grad_()
            layer.zero_grad()
            y = layer(leaf)
            y.square().sum().backward()
            grads = [leaf.grad, *(p.grad for p in layer.parameters() if p.requires_grad)]
            results.append([y, *grads])
    half = len(results) // 2
    eps = torch.finfo(dtype).eps
    for ours, theirs in zip(results[:half], results[half:], strict=True):
        for a, b in zip(ours, theirs, strict=True):
            assert (a is None) == (b is None)
            if a is not None:
                scale = float(b.detach().abs().max())
                torch.testing.assert_close(a, b, rtol=64 * eps, atol=64 * eps * max(scale, 1))


@pytest.mark.parametrize("name", ["llama", "opt"])
def test_every_gradient_is_the_slope_in_a_random_direction(name: str) -> None:
    _, _, layer = make(name, lora_for(name))
    x = tokens(40).requires_grad_()
    leaves = {"x": x, **{n: p for n, p in layer.named_parameters() if p.requires_grad}}
    assert any("lora_A" in n for n in leaves) and "router.weight" in leaves

    def loss(moved: str, by: Tensor | float) -> Tensor:
        given = {n: p + by if n == moved else p for n, p in leaves.items()}
        x = given.pop("x")
        return torch.func.functional_call(layer, given, (x,)).square().sum()

    grads = torch.autograd.grad(loss("", 0.0), list(leaves.values()))
    for (n, leaf), grad in zip(leaves.items(), grads, strict=True):
        step = 1e-6 * torch.randn_like(leaf)  # too small for a token to change its groups
        slope = (grad * step).sum().item()
        wanted = 0.5 * (loss(n, step) - loss(n, -step)).item()
        assert slope == pytest.approx(wanted, rel=1e-4), n
        assert 1.01 * slope != pytest.approx(wanted, rel=1e-4), n


def test_the_task_gives_the_router_a_gradient() -> None:
    _, _, layer = make("llama")
    layer(tokens()).square().sum().backward()
    assert (layer.router.weight.grad.abs().amax(1) > 0).all()


def test_balance_loss_is_the_formula_and_least_at_an_even_load() -> None:
    logits = tokens(30)[:, :4]
    chosen, p = maths.choose(logits, 2), logits.sigmoid()
    real = [t % 3 > 0 for t in range(30)]
    got = float(maths.balance_loss(p, chosen, torch.tensor(real)))
    wanted = oracle.balance(numbers(p), chosen.tolist(), real)
    assert got == pytest.approx(wanted, rel=1e-12)
    unmasked = oracle.balance(numbers(p), chosen.tolist(), [True] * 30)
    assert wanted != pytest.approx(unmasked, rel=1e-3)
    even = torch.eye(4).repeat(5, 1) + torch.eye(4).roll(1, 0).repeat(5, 1) + 1e-6
    everywhere = float(maths.balance_loss(even, maths.choose(even, 2), None))
    assert everywhere == pytest.approx(1.0, rel=1e-5)
    one_sided = torch.tensor([[1.0, 1.0, 1e-6, 1e-6]]).repeat(8, 1)
    assert float(maths.balance_loss(one_sided, maths.choose(one_sided, 2), None)) > 1.9
    no_token = torch.zeros(30, dtype=torch.bool)
    assert float(maths.balance_loss(p, chosen, no_token)) == 0.0


def test_balance_loss_spreads_tokens() -> None:
    logits = torch.tensor([1.0, 0.9, 0.0, -0.1]).repeat(64, 1) + 0.1 * tokens(64)[:, :4].float()
    logits.requires_grad_()
    loads = []
    for _ in range(2):
        for _ in range(200):
            loss = maths.balance_loss(logits.sigmoid(), maths.choose(logits, 2), None)
            (grad,) = torch.autograd.grad(loss, logits)
            logits.data -= 5.0 * grad
        loads.append(maths.choose(logits, 2).flatten().bincount(minlength=4).tolist())
    assert min(loads[-1]) >= 16, loads


def test_balance_loss_skips_padding_and_counts_once(monkeypatch) -> None:
    tiny = MODELS["bert"]
    seen = []
    real = maths.balance_loss
    spy = lambda p, chosen, mask: seen.append(mask) or real(p, chosen, mask)  # noqa: E731
    monkeypatch.setattr(maths, "balance_loss", spy)
    losses, grads = [], []
    for checkpoint in (False, True):
        model = tiny.build()
        methods = (lt.RoutedFFN(balance_weight=0.5),)
        session = lt.apply(model, *methods, *((lt.Checkpoint(),) if checkpoint else ()))
        loss = model(**tiny.batch()).loss
        extra = session.auxiliary_loss()
        (loss + extra).backward()
        losses.append(extra.item())
        assert session.auxiliary_loss().item() == extra.item(), "a recomputation counted again"
        router = layers_of(model)[0].router
        assert router.weight.grad is not None
        grads.append(router.weight.grad)
    assert losses[0] == losses[1] > 0.9  # two layers, 0.5 each, near balance
    torch.testing.assert_close(*grads)
    assert all(torch.equal(m, tiny.batch()["attention_mask"].bool().flatten()) for m in seen)
    assert len(seen) == 2 + 4


def test_reentrant_checkpointing_is_refused_with_a_balance_loss() -> None:
    tiny = MODELS["bert"]
    model = tiny.build()
    lt.apply(model, lt.RoutedFFN())
    model.activation_checkpointing_enable({"use_reentrant": True})
    model.enable_input_require_grads()
    with pytest.raises(UnsupportedError, match="auxiliary loss must have a gradient"):
        model(**tiny.batch())


def test_no_auxiliary_loss_where_none_is_due() -> None:
    tiny = MODELS["bert"]
    for options in ({"balance_weight": 0.0}, {"num_active": 4}):
        model = tiny.build()
        session = lt.apply(model, lt.RoutedFFN(**options))
        model(**tiny.batch())
        assert not session.auxiliary_loss().requires_grad
    session.remove()
    session = lt.apply(model.eval(), lt.RoutedFFN())
    model(**tiny.batch())
    assert session.auxiliary_loss().item() == 0.0


def calibrated(
    name: str = "llama", dtype: torch.dtype = torch.float64, **options: Any
) -> tuple[nn.Module, lt.Session, RoutedMLP]:
    model = MODELS[name].build().to(dtype)
    session = lt.apply(model, lt.RoutedFFN(balance_weight=0.0, **options))
    session.calibrate([MODELS[name].batch(seed) for seed in (1, 2)])
    return model, session, layers_of(model)[0]


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_guess_is_the_formula_for_skipped_groups_alone(name: str) -> None:
    """On top of the output without it, token by token: constants and maps of skipped groups."""
    _, _, layer = calibrated(name, compensate="lowrank")
    compensation, x = layer.compensation, tokens()
    assert compensation is not None
    got = layer.eval()(x)
    layer.config = lt.RoutedFFN(balance_weight=0.0)
    chosen = oracle.best_groups(numbers(layer.router(x)[0]), 2)
    wanted = oracle.compensated(
        numbers(layer(x)),
        numbers(x),
        numbers(compensation.read),
        numbers(compensation.write),
        chosen,
    )
    assert close(got, wanted)
    assert not close(layer(x), wanted, 1e-3)
    assert len(compensation.read) == 4


def test_guess_is_nothing_where_all_groups_are_active() -> None:
    model, _, layer = calibrated("bert", torch.float32, compensate="lowrank", num_active=4)
    assert layer.compensation is None
    batch = MODELS["bert"].batch()
    assert torch.equal(model(**batch).logits, MODELS["bert"].build()(**batch).logits)
    # Nothing is skipped: exact zeros, whatever was calibrated.
    _, _, layer = calibrated(compensate="lowrank")
    assert layer.compensation is not None
    x = tokens()
    assert not layer.compensation(x, x.new_zeros(len(x), 4)).any()
    assert layer.compensation(x, x.new_ones(len(x), 4)).any()


def test_guess_with_gradients_is_the_same_both_ways() -> None:
    results = []
    for is_whole in (False, True):
        model, _, _ = calibrated(compensate="lowrank")
        for layer in layers_of(model):
            layer._is_hooked = is_whole
        output = model(**MODELS["llama"].batch())
        output.loss.backward()
        results.append([output.logits, *(p.grad for p in model.parameters())])
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_fit_finds_a_low_rank_map_and_the_mean_of_what_is_skipped() -> None:
    x = tokens(300)
    true = tokens(2, seed=3).t() @ tokens(2, seed=4)  # rank 2
    outputs = torch.stack([x @ true + 5.0, tokens(300, seed=7)], 1)
    skipped = torch.arange(300)[:, None] % 2 == torch.tensor([0, 3])  # the second group never
    read, write = fit_compensation(x, outputs, skipped, 2)
    guess = Compensation(read, write)(x, torch.tensor([[1.0, 0.0]]).expand(300, 2))
    error = (guess - outputs[:, 0]).norm() / outputs[:, 0].norm()
    assert error < 0.1 < (outputs[:, 0] - outputs[:, 0].mean(0)).norm() / outputs[:, 0].norm()
    # What it says on average is what is skipped on average: the first group where it is skipped.
    for group, rows in enumerate((x[::2], x)):
        one_hot = torch.eye(2)[group].expand(len(rows), 2)
        mean = Compensation(read, write)(rows, one_hot).mean(0)
        torch.testing.assert_close(mean, outputs[:: 2 - group, group].double().mean(0))
    one, _ = fit_compensation(x, outputs, skipped, 1)
    assert len(one) == 2
    read, write = fit_compensation(x[:3], outputs[:3], skipped[:3], 5)  # more than tokens
    assert (len(read), len(write)) == (10, 12) and write.isfinite().all()


def test_guess_of_a_group_has_the_adapters_part_in_it() -> None:
    _, session, layer = make("llama", lora_for("llama"), compensate="lowrank")
    session.calibrate([MODELS["llama"].batch(1)])
    wanted = layer.ffn.weight("down").clone()
    a, b = layer.ffn.linears["down"].adapters[0][:2]
    torch.testing.assert_close(layer.ffn.merged("down"), wanted + 2.0 * b.weight @ a.weight)
    before = layer.compensation.write.clone()  # type: ignore[union-attr]
    nn.init.zeros_(b.weight)
    session.calibrate([MODELS["llama"].batch(1)])
    assert not torch.allclose(layer.compensation.write, before)  # type: ignore[union-attr]


def test_compensation_must_be_calibrated_and_is_saved(tmp_path: Path) -> None:
    tiny = MODELS["llama"]
    model = tiny.build()
    session = lt.apply(model, lora_for("llama"), lt.RoutedFFN(compensate="lowrank"))
    with pytest.raises(
        ConfigError, match=r"compensate must be calibrated .* at model.layers.0.mlp; call session"
    ):
        model(**tiny.batch())
    empty = {k: v.clone() for k, v in session.state_dict().items()}
    session.calibrate([tiny.batch(1)])
    wanted = model.eval()(**tiny.batch(5)).logits
    session.save(tmp_path / "saved")
    other = tiny.build()
    again = lt.load(other, tmp_path / "saved")
    assert torch.equal(other.eval()(**tiny.batch(5)).logits, wanted)
    state = {k: v.clone() for k, v in again.state_dict().items()}
    name = "1.routed_ffn/model.layers.1.mlp.write"
    for bad in (state[name][1:], state[name] * torch.nan):
        with pytest.raises(
            ConfigError, match=r"layers\.1\.mlp\.write must be finite numbers of shape"
        ):
            again.load_state_dict({**state, name: bad})
        assert torch.equal(other(**tiny.batch(5)).logits, wanted)
    again.load_state_dict(empty)
    with pytest.raises(ConfigError, match="compensate must be calibrated"):
        other(**tiny.batch())


def test_state_must_hold_the_routers_start() -> None:
    session = lt.apply(MODELS["llama"].build(), lt.RoutedFFN())
    state = session.state_dict()
    name = "0.routed_ffn/model.layers.0.mlp.start_bias"
    lacking = {k: v for k, v in state.items() if k != name}
    with pytest.raises(ConfigError, match=r"0.mlp.start_bias must be finite .* \(4,\), got none"):
        session.load_state_dict(lacking)
    with pytest.raises(ConfigError, match=r"an entry 'model.layers.0.mlp.write' that no method"):
        session.load_state_dict({**state, name.replace("start_bias", "write"): torch.zeros(4, 16)})


@pytest.mark.parametrize("how", ["as it is", "alike", "all but one alike"])
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_rounded_lists_compute_the_same(
    name: str, how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a GPU: rows that only fill lists change no output and no gradient."""
    results = []
    for multiple in (1, 8):
        monkeypatch.setattr(routed_module, "by_device", lambda x, cpu, gpu, m=multiple: m)
        _, _, layer = make(name)
        for x in (tokens(13), tokens(1)):
            force(layer, x, how)
            layer.zero_grad()
            leaf = x.requires_grad_()
            y = layer(leaf)
            y.square().sum().backward()
            results.append([y, leaf.grad, *(p.grad.clone() for p in layer.parameters())])
    for exact, rounded in zip(results[:2], results[2:], strict=True):
        for a, b in zip(exact, rounded, strict=True):
            torch.testing.assert_close(a, b)


LAUNCHES = {"llama": (57, 71), "opt": (47, 51)}


@pytest.mark.parametrize("name", LAUNCHES)
def test_launches_are_few(name: str) -> None:
    """Of a forward and of its backward, beside LoRA, with four groups and their gates."""
    _, _, layer = make(name, lora_for(name), balance_weight=0.0)
    x = tokens(40).requires_grad_()
    outputs: list[Tensor] = []
    forward = operations(lambda: outputs.append(layer(x)))
    backward = operations(lambda: outputs[0].sum().backward())
    assert (len(forward), len(backward)) == LAUNCHES[name], (Counter(forward), Counter(backward))


def plain_and_reordered(name: str, **options: Any) -> tuple[nn.Module, nn.Module, lt.Session]:
    plain, model = MODELS[name].build(), MODELS[name].build()
    session = lt.apply(model, lt.RoutedFFN(split="coactivation", **options))
    return plain, model, session


@pytest.mark.parametrize("name", MODELS)
def test_reordering_preserves_the_function_and_is_undone(name: str) -> None:
    plain, model, session = plain_and_reordered(name, num_active=4)
    batch = MODELS[name].batch()
    wanted = plain(**batch).logits
    for _ in range(2):
        orders = [layer.units.permutation for layer in layers_of(model) if layer.units]
        assert any((order.diff() != 1).any() for order in orders)
        torch.testing.assert_close(model(**batch).logits, wanted, rtol=1e-4, atol=1e-5)
        session.calibrate([MODELS[name].batch(3)])
    session.remove()
    pairs = zip(model.parameters(), plain.parameters(), strict=True)
    assert all(torch.equal(p, q) for p, q in pairs)


def test_reordering_one_weight_alone_changes_the_function() -> None:
    """The control of the test above."""
    plain, model, _ = plain_and_reordered("llama", num_active=4)
    layer = layers_of(model)[0]
    with torch.no_grad():
        up = layer.ffn.weight("up")
        up.copy_(up.flip(0))
    batch = MODELS["llama"].batch()
    assert not torch.allclose(model(**batch).logits, plain(**batch).logits, atol=1e-4)


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_reordering_takes_the_factors_along(name: str) -> None:
    outputs = []
    for split in ("contiguous", "coactivation"):
        model = MODELS[name].build().double()
        session = lt.apply(model, lora_for(name), lt.RoutedFFN(split=split, num_active=4))
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for n, p in model.named_parameters():
                if "lora_B" in n:
                    p.copy_(torch.randn(p.shape, generator=generator))
        outputs.append(model.eval()(**MODELS[name].batch()).logits)
        if split == "coactivation":
            # Now that the factors are no longer zero, their order matters.
            session.calibrate([MODELS[name].batch(3)])
            torch.testing.assert_close(model(**MODELS[name].batch()).logits, outputs[-1])
    assert not torch.allclose(*outputs), "the factors of up were drawn in another order"


def test_units_that_are_active_together_are_found() -> None:
    """Eight hidden units fire on either of two kinds of token; only their order is shuffled."""
    _, session, layer = make("llama", split="coactivation", num_groups=2, num_active=1)
    with torch.no_grad():
        kinds = torch.arange(32) % 2
        gate, up = layer.ffn.weight("gate"), layer.ffn.weight("up")
        gate.zero_()
        gate[:, 0] = 1.0 - 2.0 * kinds[layer.units.permutation]  # type: ignore[union-attr]
        up.zero_()
        up[:, 1] = 1.0
    x = tokens(64)
    x[:, 0] = 6.0 * x[:, 0].sign()
    x[:, 1] = 1.0

    class Direct(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = layer

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x)

    session.model = Direct()
    (conversion,) = session.conversions
    conversion._model, conversion._layers = session.model, {"layer": layer}
    session.calibrate([x])
    assert layer.units is not None
    found = kinds[layer.units.permutation].view(2, 16)
    assert (found == found[:, :1]).all() and found[0, 0] != found[1, 0]
    # And the router knows which tokens they fire on.
    layer.config = lt.RoutedFFN(num_groups=2, num_active=1)
    wanted = layer.ffn.output(layer.ffn.hidden(x))
    # SiLU is not quite zero where it does not fire.
    assert (layer(x) - wanted).norm() < 0.05 * wanted.norm()
    layer.router.start_weight.neg_()
    layer.router.start_bias.neg_()
    assert (layer(x) - wanted).norm() > 0.9 * wanted.norm()


def test_fitted_router_ranks_groups_better_than_chance() -> None:
    x = tokens(400)
    weight = tokens(4, seed=5)
    norms = 3.0 + x @ weight.t() + 0.1 * tokens(400, seed=6)[:, :4]
    fitted, bias = maths.fit_router(x[:300], norms[:300], 1e-2, 0.1)
    logits = x[300:] @ fitted.t() + bias
    assert logits.square().mean().sqrt() == pytest.approx(0.1, rel=0.2)
    best, chosen = maths.choose(norms[300:], 2), maths.choose(logits, 2)
    hits = (best[:, :, None] == chosen[:, None]).float().sum((1, 2)).mean() / 2
    assert hits > 0.9
    wrong = maths.choose(x[300:] @ fitted.flip(0).t() + bias, 2)
    assert (best[:, :, None] == wrong[:, None]).float().sum((1, 2)).mean() / 2 < 0.7


def test_calibration_leaves_modes_and_streams_alone_and_wants_a_token() -> None:
    tiny = MODELS["bert"]
    model = tiny.build()
    session = lt.apply(model, lt.RoutedFFN())
    model.bert.encoder.layer[0].eval()
    modes = [m.training for m in model.modules()]
    before = [layer.router.start_weight.clone() for layer in layers_of(model)]
    state = torch.get_rng_state()
    session.calibrate([tiny.batch(1), tiny.batch(2)])
    assert torch.equal(torch.get_rng_state(), state) and int(session.state_dict()["counter"]) == 0
    assert [m.training for m in model.modules()] == modes
    pairs = zip(before, layers_of(model), strict=True)
    assert all(not torch.equal(b, layer.router.start_weight) for b, layer in pairs)
    for batches in ([], [{**tiny.batch(), "attention_mask": torch.zeros(4, 8), "labels": None}]):
        with pytest.raises(ConfigError, match="must hold at least one real token"):
            session.calibrate(batches)
    assert all(layer.recorded is None for layer in layers_of(model))


def test_router_starts_from_the_seed_near_one_and_uses_every_group() -> None:
    starts = []
    for global_seed, seed in ((1, 0), (2, 0), (1, 3)):
        torch.manual_seed(global_seed)
        model = MODELS["llama"].build()
        state = torch.get_rng_state()
        lt.apply(model, lt.RoutedFFN(), seed=seed)
        assert torch.equal(torch.get_rng_state(), state)
        starts.append([layer.router.start_weight for layer in layers_of(model)])
    assert torch.equal(starts[0][0], starts[1][0])
    assert not torch.equal(starts[0][0], starts[2][0])
    assert not torch.equal(starts[0][0], starts[0][1])
    x = torch.randn(500, 16)
    logits = x @ starts[0][0].t()
    assert 0.01 < float(logits.square().mean().sqrt()) < 0.04
    assert maths.choose(logits, 2).flatten().bincount(minlength=4).min() > 100


def test_router_takes_dtype_and_device_of_the_ffn() -> None:
    model = MODELS["llama"].build().bfloat16()
    lt.apply(model, lt.RoutedFFN())
    assert layers_of(model)[0].router.weight.dtype == torch.bfloat16
    out = model(**MODELS["llama"].batch())
    assert out.logits.dtype == torch.bfloat16
    out.loss.backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)


def test_evenly_spaced_rows() -> None:
    x = torch.zeros(2, 5, 3)
    assert maths.evenly_spaced_rows(x, None, 20).tolist() == list(range(10))
    assert maths.evenly_spaced_rows(x, None, 5).tolist() == [0, 2, 4, 6, 8]
    mask = torch.tensor([False, True] * 5)
    assert maths.evenly_spaced_rows(x, mask, 20).tolist() == [1, 3, 5, 7, 9]
    assert maths.evenly_spaced_rows(x, mask, 2).tolist() == [1, 5]
    assert maths.evenly_spaced_rows(x, torch.zeros(10, dtype=torch.bool), 4).tolist() == []


def test_configs_of_other_sites_are_calibrated_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each router is fitted once, from the plain model, with the options of its own config."""
    tiny = MODELS["llama"]
    fits: list[int] = []
    real = maths.fit_router
    spy = lambda x, norms, *rest: fits.append(norms.shape[1]) or real(x, norms, *rest)  # noqa: E731
    monkeypatch.setattr(maths, "fit_router", spy)
    model, alone = tiny.build(), tiny.build()
    configs = [lt.RoutedFFN(sites=["layers.0.mlp"], num_groups=2, num_active=1)]
    configs.append(lt.RoutedFFN(sites=["layers.1.mlp"], num_groups=8, split="coactivation"))
    session = lt.apply(model, *configs)
    session.calibrate([tiny.batch(1), tiny.batch(2)])
    assert fits == [2, 8]
    assert [c.num_calibration_batches > 0 for c in session.conversions] == [True, True]
    assert [list(c.state_dict()) for c in session.conversions] == [
        [f"model.layers.0.mlp.{key}" for key in ("start_weight", "start_bias")],
        [f"model.layers.1.mlp.{key}" for key in ("start_weight", "start_bias", "permutation")],
    ]
    lt.apply(alone, configs[1]).calibrate([tiny.batch(1), tiny.batch(2)])
    routers = layers_of(model)[1].router, layers_of(alone)[0].router
    assert torch.equal(routers[0].start_weight, routers[1].start_weight)


@pytest.mark.parametrize("with_lora", [False, True])
@pytest.mark.parametrize("order", ["session first", "weights first"])
def test_order_of_units_survives_both_ways_of_resuming(with_lora: bool, order: str) -> None:
    """A trainer saves all tensors, or with an adapter those that train, before or after ours."""
    tiny = MODELS["llama"]
    methods = ((lora_for("llama"),) if with_lora else ()) + (lt.RoutedFFN(split="coactivation"),)
    model = tiny.build()
    session = lt.apply(model, *methods)
    session.calibrate([tiny.batch(3)])
    optimizer = session.optimizer(torch.optim.SGD, lr=0.3)
    model(**tiny.batch()).loss.backward()
    optimizer.step()
    state = {k: v.clone() for k, v in session.state_dict().items()}
    weights = trained_weights(model) if with_lora else model.state_dict()
    weights = {n: v.clone() for n, v in weights.items()}
    wanted = model.eval()(**tiny.batch(5)).logits
    other = tiny.build()
    again = lt.apply(other, *methods)
    steps = [
        lambda: again.load_state_dict(state),
        lambda: other.load_state_dict(weights, strict=False),
    ]
    for load in steps if order == "session first" else steps[::-1]:
        load()
    torch.testing.assert_close(other.eval()(**tiny.batch(5)).logits, wanted)
    name = f"{len(methods) - 1}.routed_ffn/model.layers.0.mlp.permutation"
    bad = {**state, name: torch.zeros(32, dtype=torch.int64)}
    assert name in state
    with pytest.raises(ConfigError, match="permutation must be an order of 32 hidden units"):
        again.load_state_dict(bad)


@pytest.mark.parametrize("name", MODELS)
def test_state_dict_keeps_the_original_order(name: str) -> None:
    plain, model, session = plain_and_reordered(name)
    session.calibrate([MODELS[name].batch(3)])
    names = {id(module): n for n, module in model.named_modules()}
    state, parameters = model.state_dict(), dict(model.named_parameters())
    moved = []
    for site, layer in zip(
        [s for s in lt.find_sites(plain) if s.role == "mlp"], layers_of(model), strict=True
    ):
        for part in layer.ffn.linears:
            for tail, wanted in site.children[part].module.named_parameters():
                key = f"{names[id(layer.ffn.modules[part])]}.{tail}"
                assert torch.equal(state[key], wanted)
                if not torch.equal(parameters[key], wanted):
                    moved.append(key)
    assert len(moved) >= 2 * len(layers_of(model))
    before = copy.deepcopy(model)
    model.load_state_dict(before.state_dict())
    pairs = zip(model.parameters(), before.parameters(), strict=True)
    assert all(torch.equal(p, q) for p, q in pairs)
    _, other, _ = plain_and_reordered(name)  # not calibrated: other groups
    other.load_state_dict(state)
    batch = MODELS[name].batch(5)
    assert torch.equal(other.eval()(**batch).logits, model.eval()(**batch).logits)
    with pytest.raises(RuntimeError, match="size mismatch"):
        model.load_state_dict({moved[0]: state[moved[0]].repeat(2, 2)}, strict=False)


def test_saved_folder_holds_the_router_and_comes_back(tmp_path: Path) -> None:
    tiny = MODELS["llama"]
    model = tiny.build()
    session = lt.apply(model, lora_for("llama"), lt.RoutedFFN(split="coactivation"))
    session.calibrate([tiny.batch(3)])
    optimizer = session.optimizer(torch.optim.SGD, lr=0.3)
    assert any(p is layers_of(model)[0].router.weight for p in optimizer.param_groups[0]["params"])
    for _ in range(2):
        model(**tiny.batch()).loss.backward()
        optimizer.step()
    session.save(tmp_path / "saved")
    other = tiny.build()
    lt.load(other, tmp_path / "saved")
    batch = tiny.batch(5)
    assert torch.equal(other.eval()(**batch).logits, model.eval()(**batch).logits)


@pytest.mark.parametrize("name", ["bert", "gpt2", "llama", "opt"])
def test_sampling_everything_inside_groups_is_exact(name: str) -> None:
    """WTA-CRS finds the linears inside, and at keep_ratio 1 changes nothing."""
    tiny = MODELS[name]
    results = []
    for extra in ((), (lt.WTACRS(keep_ratio=1.0),)):
        model = tiny.build()
        session = lt.apply(model, lt.RoutedFFN(), *extra)
        loss = model(**tiny.batch()).loss + session.auxiliary_loss()
        loss.backward()
        results.append({n: p.grad for n, p in model.named_parameters()})
        inside = [m for layer in layers_of(model) for m in layer.modules()]
    sampled = [m for m in inside if getattr(m, "rows", None) is not None]
    assert len(sampled) == (6 if name == "llama" else 4)
    assert not isinstance(layers_of(model)[0].router, ConvertedLinear)
    for n, grad in results[0].items():
        torch.testing.assert_close(results[1][n], grad)


def test_sampled_groups_keep_fewer_bytes_and_have_the_right_mean() -> None:
    tiny = MODELS["llama"]
    exact, sampled = tiny.build(), tiny.build()
    lt.apply(exact, lt.RoutedFFN(), lt.WTACRS(keep_ratio=1.0))
    # One linear: a tiny model spends its time on choosing rows.
    halved = lt.WTACRS(keep_ratio=0.5, min_rows=2, sites=["layers.1.mlp.down_proj"])
    lt.apply(sampled, lt.RoutedFFN(), halved)
    assert lt.ledger(sampled, tiny.batch()).activations < lt.ledger(exact, tiny.batch()).activations
    exact(**tiny.batch()).loss.backward()
    wanted = layers_of(exact)[1].ffn.weight("down").grad
    draws = []
    for _ in range(60):
        sampled.zero_grad()
        sampled(**tiny.batch()).loss.backward()
        draws.append(layers_of(sampled)[1].ffn.weight("down").grad.clone())
    stack = torch.stack(draws)
    z = (stack.mean(0) - wanted) / (stack.std(0) / math.sqrt(60) + 1e-9)
    assert z.square().mean() < 2.0
    biased = (1.5 * stack.mean(0) - wanted) / (stack.std(0) / math.sqrt(60) + 1e-9)
    assert biased.square().mean() > 2.0


@pytest.mark.parametrize("name", ["bert", "gpt2", "llama", "t5_gated", "opt"])
def test_lora_routed_and_sampled_together(name: str) -> None:
    tiny = MODELS[name]
    model = tiny.build()
    modules = dict(model.named_modules())
    session = lt.apply(model, lt.LoRA(rank=2), lt.RoutedFFN(), lt.WTACRS(min_rows=2))
    sampled = [n for n, m in model.named_modules() if isinstance(m, ConvertedLinear)]
    places = (".mlp.", ".intermediate.", ".fc1.", ".DenseReluDense.")
    in_ffn = [n for n in sampled if any(place in n for place in places)]
    assert in_ffn and all("lora_A" in n for n in sampled)
    optimizer = session.optimizer(torch.optim.SGD, lr=0.1)
    for seed in range(3):
        optimizer.zero_grad()
        (model(**tiny.batch(seed)).loss + session.auxiliary_loss()).backward()
        optimizer.step()
    lost = [n for n, p in model.named_parameters() if p.requires_grad and p.grad is None]
    assert not lost
    assert all(torch.isfinite(p).all() for p in model.parameters())
    session.remove()
    assert list(model.named_modules()) == list(modules.items())


def test_frozen_weights_have_no_gradient_and_keep_no_input() -> None:
    """With LoRA the base weights are views: backward keeps the gathered rows of no linear."""
    _, _, layer = make("opt", lora_for("opt"), balance_weight=0.0)
    kept: list[torch.Size] = []
    hooks = torch.autograd.graph.saved_tensors_hooks(
        lambda t: kept.append(t.shape) or t, lambda t: t
    )
    with hooks:
        layer(tokens(12).requires_grad_())
    # 24 routed rows: neither their gathered inputs nor anything else as wide is kept.
    assert torch.Size([24, 16]) not in kept
    assert not any(len(s) == 2 and s[1] == 16 and s[0] not in (3, 12, 32) for s in kept), kept


def test_linear_that_trains_a_subspace_is_not_cut() -> None:
    """Such a linear needs its whole input: the FFN runs dense, with the other groups at zero."""
    _, _, layer = make("llama")
    x = tokens()
    wanted = layer(x)
    wanted.square().sum().backward()
    old = layer.up_proj
    assert isinstance(old, nn.Linear)
    gradient = old.weight.grad
    old.weight.requires_grad_(False)
    subspace = Subspace(old.weight)
    swap(layer, "up_proj", converted(old, layer.runtime, subspace=subspace))
    got = layer(x)
    torch.testing.assert_close(got, wanted)
    got.square().sum().backward()
    torch.testing.assert_close(subspace.parameter.grad, gradient)


def test_units_are_not_reordered_under_a_subspace() -> None:
    """Its entries would stay where they are while the weight's rows move."""
    model = MODELS["llama"].build()
    mlp = model.model.layers[1].mlp
    weight = mlp.gate_proj.weight.requires_grad_(False)
    subspace = Subspace(weight)
    swap(mlp, "gate_proj", converted(mlp.gate_proj, Runtime(model, 0), subspace=subspace))
    with pytest.raises(
        SiteError, match=r"1 of 2 sites .*'contiguous' where gate trains a subspace"
    ):
        lt.apply(model, lt.RoutedFFN(split="coactivation"))
    lt.apply(model, lt.RoutedFFN())


def test_thin_gradients_stay_thin_inside_groups() -> None:
    """meProp hooks each linear's own forward, which the FFN must then call."""
    tiny = MODELS["llama"]
    model = tiny.build()
    lt.apply(model, lt.MeProp(keep_ratio=0.25), lt.RoutedFFN(balance_weight=0.0))
    model(**tiny.batch()).loss.backward()
    for layer in layers_of(model):
        for part, width in (("up", 32), ("gate", 32), ("down", 16)):
            grad = layer.ffn.weight(part).grad
            assert grad is not None and int((grad != 0).any(1).sum()) <= width // 4


@pytest.mark.parametrize("name", ["t5", "t5_gated", "gpt2", "distilbert"])
@pytest.mark.parametrize("num_active", [2, 4])
def test_dropout_inside_the_ffn_still_drops(name: str, num_active: int) -> None:
    model = MODELS[name].build()
    lt.apply(model, lt.RoutedFFN(num_active=num_active))
    layer = layers_of(model)[0]
    dropouts = [m for m in layer.modules() if isinstance(m, nn.Dropout)]
    assert len(dropouts) == 1
    x = torch.randn(3, 16)
    assert layer(x).abs().min() > 0
    dropouts[0].p = 1.0
    assert (layer(x) == 0).all()


@pytest.mark.parametrize("name", ["llama", "gpt2", "opt"])
def test_generation_with_a_cache_is_the_full_forward(name: str) -> None:
    tiny = MODELS[name]
    model = tiny.build()
    session = lt.apply(model, lora_for(name), lt.RoutedFFN())
    session.calibrate([tiny.batch(1)])
    model.eval()
    ids = tiny.batch()["input_ids"][:1]
    options = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False}
    out = model.generate(ids, attention_mask=torch.ones_like(ids), **options)
    for end in range(ids.shape[1], out.shape[1]):
        logits = model(out[:, :end], use_cache=False).logits[0, -1]
        logits[2] = -torch.inf  # generate holds the end token back
        assert int(logits.argmax()) == int(out[0, end])


def test_parameters_keep_their_names_where_the_ffn_is_a_module() -> None:
    for name in ("llama", "t5", "gpt2", "distilbert"):
        plain, model = MODELS[name].build(), MODELS[name].build()
        lt.apply(model, lt.RoutedFFN())
        extra = {n for n, _ in model.named_parameters()} - {n for n, _ in plain.named_parameters()}
        assert extra and all(".router." in n for n in extra)


@pytest.mark.parametrize("split", ["contiguous", "coactivation"])
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_adapter_inside_is_a_plain_peft_one(name: str, split: str, tmp_path: Path) -> None:
    tiny = MODELS[name]
    model = tiny.build()
    options: dict[str, Any] = {"num_active": 4, "split": split}
    session = lt.apply(model, lora_for(name), lt.RoutedFFN(**options))
    session.calibrate([tiny.batch(3)])
    optimizer = session.optimizer(torch.optim.SGD, lr=0.3)
    for _ in range(2):
        model(**tiny.batch()).loss.backward()
        optimizer.step()
    model.save_pretrained(tmp_path)
    wanted = model.eval()(**tiny.batch(5)).logits
    plain = tiny.build().eval()
    assert not torch.allclose(plain(**tiny.batch(5)).logits, wanted, atol=1e-4)
    plain.load_adapter(tmp_path)
    torch.testing.assert_close(plain.eval()(**tiny.batch(5)).logits, wanted)


def test_disabled_adapter_is_left_out() -> None:
    model, _, layer = make("llama", lora_for("llama"))
    x = tokens()
    adapted = layer.eval()(x)
    model.disable_adapters()
    assert layer.ffn.linears["up"].adapters == ()
    assert not torch.allclose(layer(x), adapted)
    model.enable_adapters()
    assert torch.equal(layer(x), adapted)


@pytest.mark.parametrize("how", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_a_model_that_has_trained_can_be_copied(how: Callable[[Any], Any]) -> None:
    """Its auxiliary loss had a graph, which belongs to no copy."""
    model = MODELS["llama"].build()
    session = lt.apply(model, lt.RoutedFFN())
    batch = MODELS["llama"].batch()
    loss = model(**batch).loss
    twin = how(model)
    assert twin(**batch).loss == loss
    assert session.auxiliary_loss().requires_grad


def test_copy_routes_by_its_own_session() -> None:
    model, session, layer = make("llama", lora_for("llama"))
    twin = copy.deepcopy(model)
    other = layers_of(twin)[0]
    assert other.runtime is twin._leantune_session._runtime is not layer.runtime
    x = tokens()
    assert torch.equal(other(x), layer(x))
    twin.disable_adapters()
    assert not torch.equal(other(x), layer(x))
    session.remove()
    assert layers_of(twin) and not layers_of(model)


@pytest.mark.parametrize(("name", "most"), [("llama", 105), ("opt", 82)])
def test_forward_makes_few_calls_of_ours(name: str, most: int) -> None:
    """Less than half of what it took while an FFN's view was built anew in every forward."""
    _, _, layer = make(name, lora_for(name))
    x = tokens()
    layer(x)
    calls: list[str] = []

    def count(frame: Any, event: str, arg: Any) -> None:
        if event == "call" and "/leantune/" in frame.f_code.co_filename:
            calls.append(frame.f_code.co_qualname)

    sys.setprofile(count)
    try:
        layer(x)
    finally:
        sys.setprofile(None)
    assert len(calls) <= most, Counter(calls).most_common()
    assert not any(name.startswith("FFN.__init__") for name in calls)


def test_bad_numbers_of_groups() -> None:
    with pytest.raises(ConfigError, match="num_active must be at most num_groups = 4, got 5"):
        lt.RoutedFFN(num_active=5)
    with pytest.raises(ConfigError, match="num_active must be integer >= 1, got 0"):
        lt.RoutedFFN(num_active=0)
    model = MODELS["bert"].build()
    modules = list(model.named_modules())
    with pytest.raises(SiteError, match=r"2 of 2 sites cannot be used: .*width 32, got 5") as error:
        lt.apply(model, lt.RoutedFFN(num_groups=5))
    assert "layer.0.intermediate: num_groups must divide" in str(error.value)
    assert "layer.1.intermediate: num_groups must divide" in str(error.value)
    assert "it could be 2, 4, 8, 16" in str(error.value)
    assert list(model.named_modules()) == modules


def test_mixture_of_experts_is_refused() -> None:
    from transformers import MixtralConfig, MixtralForCausalLM

    config = MixtralConfig(
        vocab_size=64,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        num_local_experts=2,
    )
    with pytest.raises(SiteError, match="got none by the method's own choice"):
        lt.apply(MixtralForCausalLM(config), lt.RoutedFFN())


def test_unknown_linears_and_adapters_are_refused() -> None:
    from peft import LoraConfig, get_peft_model

    model = MODELS["llama"].build()
    dora = LoraConfig(r=2, target_modules=["up_proj"], use_dora=True)
    with pytest.raises(SiteError, match="adapter must be plain LoRA, got 'default', a Dora"):
        lt.apply(get_peft_model(model, dora), lt.RoutedFFN())
    model = MODELS["llama"].build()

    class Special(nn.Linear):
        def forward(self, input: Tensor) -> Tensor:
            return 2 * super().forward(input)

    model.model.layers[0].mlp.up_proj = Special(16, 32)
    with pytest.raises(SiteError, match=r"1 of 2 sites cannot be used: .*must be nn.Linear"):
        lt.apply(model, lt.RoutedFFN())


def test_shared_weights_cannot_be_reordered() -> None:
    model = MODELS["llama"].build()
    layers = model.model.layers
    layers[1].mlp.up_proj.weight = layers[0].mlp.up_proj.weight
    lt.apply(model, lt.RoutedFFN()).remove()
    with pytest.raises(UnsupportedError, match=r"no weight is shared, got .* tied to .*up_proj"):
        lt.apply(model, lt.RoutedFFN(split="coactivation"))
    assert not layers_of(model)


def test_halves_of_one_linear_are_gated_and_not_reordered() -> None:
    model, batch = zoo.build("phi3")
    with pytest.raises(SiteError, match="split must be 'contiguous' where gate and up are one"):
        lt.apply(model, lt.RoutedFFN(split="coactivation"))
    session = lt.apply(model, lt.LoRA(rank=2), lt.RoutedFFN())
    session.calibrate([batch])
    layer = layers_of(model)[0]
    (model(**batch).loss + session.auxiliary_loss()).backward()
    assert layer.ffn.linears["up"].adapters[0].second.weight.grad.any()
    # All but the chosen groups at zero is what two of four groups are.
    x = torch.randn(9, zoo.D_MODEL)
    nn.init.normal_(layer.router.weight)
    logits, learnt = layer.router(x)
    chosen = torch.zeros_like(logits).scatter(1, maths.choose(logits, 2), 1.0)
    wanted = layer.ffn.output(layer.ffn.hidden(x), chosen * 2 * learnt.sigmoid())
    torch.testing.assert_close(layer(x), wanted)


def test_merge_names_the_way_out() -> None:
    model = MODELS["llama"].build()
    session = lt.apply(model, lt.RoutedFFN())
    with pytest.raises(UnsupportedError, match=r"got routed_ffn, .*session.save\(folder\).*remove"):
        session.merge()
    assert len(layers_of(model)) == 2
    session.remove()
    session = lt.apply(model, lt.RoutedFFN(num_active=4, split="coactivation"))
    wanted = MODELS["llama"].build()(**MODELS["llama"].batch()).logits
    assert session.can_merge
    session.merge()
    assert not layers_of(model)
    assert torch.equal(model(**MODELS["llama"].batch()).logits, wanted)
