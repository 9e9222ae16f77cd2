"""The sampled linear: exact where it must be, unbiased elsewhere, and keeping what it says."""

import weakref
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from models import MODELS
from single import samples, saved_by
from stats import mean_check
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import leantune as lt
from leantune.core.linear import ConvertedLinear
from leantune.measure.ledger import ledger
from leantune.methods.wta_crs.policy import weighted
from leantune.ops.rows import KeptRows

D_IN, D_OUT, SHAPE = 12, 7, (4, 16, 12)
KEPT = int(0.3 * 64)
FLOAT32_NOISE = 1e-5
OPTIONS: dict[str, dict[str, Any]] = {
    "default": {},
    "backward": {"draw_at": "backward"},
    "activation": {"norms": "activation"},
    "wta": {"estimator": "wta"},
    "crs": {"estimator": "crs"},
}
each = pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)


class Single(nn.Module):
    """One linear; its input is made inside, by an operation that keeps nothing."""

    def __init__(self, bias: bool = True, d_in: int = D_IN) -> None:
        super().__init__()
        self.layer = nn.Linear(d_in, D_OUT, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x + 0.0)


def converted(
    seed: int = 0, bias: bool = True, d_in: int = D_IN, **options: Any
) -> tuple[Single, lt.Session]:
    torch.manual_seed(1)
    model = Single(bias, d_in)
    return model, lt.apply(model, lt.WTACRS(**{"min_rows": 2, **options}), seed=seed)


def data(shape: tuple[int, ...] = SHAPE) -> tuple[Tensor, Tensor]:
    """Inputs with a common part, and output gradients whose norms differ by much."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(shape, generator=generator) + 0.3
    spread = torch.randn(*shape[:-1], 1, generator=generator).exp()
    return x, torch.randn(*shape[:-1], D_OUT, generator=generator) * spread


def weight_grad(model: Single, x: Tensor, grad_output: Tensor) -> Tensor:
    model.zero_grad()
    model(x).backward(grad_output)
    assert model.layer.weight.grad is not None
    return model.layer.weight.grad


def exact_grad(x: Tensor, grad_output: Tensor) -> np.ndarray:
    g, h = (t.double().reshape(-1, t.shape[-1]) for t in (grad_output, x))
    return (g.t() @ h).numpy()


def draws(model: Single, x: Tensor, grad_output: Tensor, num: int = 250) -> np.ndarray:
    grads = [weight_grad(model, x, grad_output).clone() for _ in range(num)]
    return torch.stack(grads).double().numpy()


def saved_bytes(model: nn.Module, run: Callable[[], Any]) -> int:
    """Return the bytes that autograd saves, by storage, parameters left out."""
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage() for t in saved_by(run)}
    return sum(s.nbytes() for key, s in storages.items() if key not in own)


# Exact parts, shapes, and no sampling where there is nothing to gain.


@each
@pytest.mark.parametrize("bias", [True, False])
def test_forward_grad_input_and_grad_bias_are_the_plain_ones(options, bias) -> None:
    model, session = converted(bias=bias, **options)
    x, grad_output = data()
    results = []
    for _ in range(2):
        leaf = x.clone().requires_grad_()
        model.zero_grad()
        y = model(leaf)
        y.backward(grad_output)
        exact = [y.detach(), leaf.grad, *([model.layer.bias.grad.clone()] if bias else [])]
        assert model.layer.weight.grad is not None
        results.append((exact, model.layer.weight.grad.clone()))
        session.remove()
    (ours, sampled), (plain, exact_weight) = results
    assert all(torch.equal(a, b) for a, b in zip(ours, plain, strict=True))
    assert not torch.allclose(sampled, exact_weight)


@each
def test_shapes_may_change_between_steps(options) -> None:
    model, _ = converted(**options)
    for shape in ((4, 16), (4, 5), (3, 20), (4, 16), (64,), (2, 2, 9), (1, 40), (40, 1)):
        x, grad_output = data((*shape, D_IN))
        grad = weight_grad(model, x, grad_output)
        assert grad.shape == (D_OUT, D_IN) and grad.dtype == torch.float32
        assert torch.isfinite(grad).all()


def test_non_contiguous_input() -> None:
    x, grad_output = data()
    swapped = x.transpose(0, 1).contiguous().transpose(0, 1)
    first = weight_grad(converted()[0], x, grad_output)
    torch.testing.assert_close(weight_grad(converted()[0], swapped, grad_output), first)


@pytest.mark.parametrize("shape", [(0, D_IN), (0, 5, D_IN), (2, 0, D_IN)])
def test_empty_batch_is_refused(shape) -> None:
    model, _ = converted()
    with pytest.raises(lt.ConfigError, match="must hold at least one row, got an input of shape"):
        model(torch.zeros(shape))


@pytest.mark.parametrize("shape", [(1, D_IN), (1, 1, D_IN), (D_IN,)])
@each
def test_single_rows_are_exact(shape, options) -> None:
    model, _ = converted(**{"min_rows": 1, **options})
    x, grad_output = data(shape)
    grad = weight_grad(model, x, grad_output)
    np.testing.assert_allclose(grad.numpy(), exact_grad(x, grad_output), rtol=1e-5)


@each
def test_a_budget_of_every_row_is_the_plain_linear_to_the_bit(options) -> None:
    model, _ = converted(keep_ratio=0.9, **{**options, "min_rows": 64})
    x, grad_output = data()
    grad = weight_grad(model, x, grad_output)
    plain = Single()
    plain.load_state_dict(model.state_dict())
    assert torch.equal(grad, weight_grad(plain, x, grad_output))


def test_gradients_accumulate() -> None:
    x, grad_output = data()
    model, _ = converted(norms="activation")
    single = [weight_grad(model, x, grad_output).clone() for _ in range(2)]
    model, _ = converted(norms="activation")
    for _ in range(2):
        model(x).backward(grad_output)
    torch.testing.assert_close(model.layer.weight.grad, single[0] + single[1])
    assert not torch.allclose(single[0], single[1])


@pytest.mark.parametrize("mode", ["eval", "no_grad", "inference", "frozen", "exact"])
def test_no_sampling_and_nothing_extra_saved(mode: str) -> None:
    model, session = converted()
    x, _ = data()
    model.train(mode != "eval")
    model.layer.weight.requires_grad_(mode != "frozen")
    contexts = {
        "no_grad": torch.no_grad,
        "inference": torch.inference_mode,
        "exact": session.exact,
    }
    with contexts.get(mode, torch.enable_grad)():
        num_bytes = saved_bytes(model, lambda: model(x))
    # As the plain linear does.
    assert num_bytes == (x.nbytes if mode in ("eval", "exact") else 0)


# What is saved, and what is released.


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@each
def test_saved_bytes_equal_the_prediction(options, dtype: torch.dtype) -> None:
    model, _ = converted(**options)
    x, _ = data()
    wanted = x.numel() * dtype.itemsize
    if "draw_at" not in options:
        wanted = KEPT * (D_IN * dtype.itemsize + 4 + 4)  # rows, indices and weights
    assert model.layer.rows.nbytes(x.shape, dtype) == wanted
    for _ in range(2):
        with torch.autocast("cpu", dtype=dtype, enabled=dtype != torch.float32):
            assert saved_bytes(model, lambda: model(x)) == wanted


@pytest.mark.parametrize(
    ("name", "readers"),
    [
        ("bert", ["bert.encoder.layer.0.attention.self." + n for n in ("query", "key", "value")]),
        ("llama", ["model.layers.0.mlp." + n for n in ("gate_proj", "up_proj")]),
    ],
)
def test_linears_of_one_input_share_one_sample(name: str, readers: list[str]) -> None:
    tiny = MODELS[name]
    model = tiny.build()
    lt.apply(model, lt.WTACRS(min_rows=2))
    first = model.get_submodule(readers[0])
    inputs: list[Tensor] = []
    handle = first.register_forward_pre_hook(lambda module, args: inputs.append(args[0]))
    saved = saved_by(lambda: model(**tiny.batch()))
    # Released: nothing saved lies in the full input.
    full = inputs[0].untyped_storage().data_ptr()
    assert all(t.untyped_storage().data_ptr() != full for t in saved)
    handle.remove()
    entries = [
        [
            e
            for e in ledger(model, tiny.batch()).entries
            if e.ledger == "activations" and any(h.module == reader for h in e.holders)
        ]
        for reader in readers
    ]
    assert all(other == entries[0] for other in entries)
    predicted = first.rows.nbytes(inputs[0].shape, torch.float32)
    assert sum(e.num_bytes for e in entries[0]) == predicted


def test_an_input_written_to_between_its_readers_is_sampled_anew() -> None:
    tiny = MODELS["bert"]
    model = tiny.build()
    lt.apply(model, lt.WTACRS(min_rows=2))
    num_draws = len(samples(lambda: model(**tiny.batch())))
    query = model.bert.encoder.layer[0].attention.self.query

    def write(module: nn.Module, args: tuple[Tensor], output: Tensor) -> None:
        args[0].mul_(2.0)

    query.register_forward_hook(write)
    assert len(samples(lambda: model(**tiny.batch()))) == num_draws + 1


@pytest.mark.parametrize("is_converted", [True, False])
def test_full_input_is_released_when_its_producer_keeps_it_not(is_converted: bool) -> None:
    model = converted()[0] if is_converted else Single()
    references: list[weakref.ref] = []
    model.layer.register_forward_pre_hook(
        lambda module, args: references.append(weakref.ref(args[0]))
    )
    x, grad_output = data()
    y = model(x)
    assert (references[0]() is None) == is_converted
    y.backward(grad_output)


def test_input_is_released_where_readers_do_not_share_it_after_all() -> None:
    """LoRA's dropout gives every factor an input of its own: none may wait for the others."""
    tiny = MODELS["bert"]
    model = tiny.build()
    lt.apply(model, lt.LoRA(rank=2, dropout=0.1, train_head=False), lt.WTACRS(min_rows=2))
    alive: list[weakref.ref] = []
    for module in model.modules():
        if isinstance(module, ConvertedLinear):
            module.register_forward_pre_hook(lambda m, args: alive.append(weakref.ref(args[0])))
    during: list[int] = []
    model.classifier.register_forward_pre_hook(
        lambda m, args: during.append(sum(r() is not None for r in alive))
    )
    output = model(**tiny.batch())
    assert len(alive) == 12 and during == [0]
    output.loss.backward()


def full_inputs_held(name: str, **options: Any) -> tuple[int, int]:
    """Count the activations of (b, t, d_model) and (b, t, d_hidden) size that a step keeps."""
    tiny = MODELS[name]
    model = tiny.build()
    if options:
        lt.apply(model, lt.WTACRS(min_rows=2, **options))
    sizes = [e.num_bytes for e in ledger(model, tiny.batch()).entries if e.ledger == "activations"]
    return sizes.count(4 * 8 * 16 * 4), sizes.count(4 * 8 * 32 * 4)


@pytest.mark.parametrize(("name", "alone"), [("bert", ["query", "key"]), ("llama", ["gate_proj"])])
def test_what_sampling_frees_in_a_block(name: str, alone: list[str]) -> None:
    """A norm keeps its own input, attention its output, GELU and the gated product theirs."""
    narrow, wide = full_inputs_held(name)
    sampled_narrow, sampled_wide = full_inputs_held(name, keep_ratio=0.3)
    # In each of two blocks: the input of q/k/v and of the MLP; and that of its second linear.
    assert (narrow - sampled_narrow, wide - sampled_wide) == (4, 2)
    # One reader that stays exact keeps the input for all: nothing is freed.
    assert full_inputs_held(name, keep_ratio=0.3, sites=alone) == (narrow, wide)


# Determinism.


@each
def test_same_seed_same_gradients_and_next_step_another_draw(options) -> None:
    x, grad_output = data()
    runs = []
    for seed in (0, 0, 1):
        model, _ = converted(seed=seed, **options)
        runs.append([weight_grad(model, x, grad_output).clone() for _ in range(3)])
    assert all(torch.equal(a, b) for a, b in zip(runs[0], runs[1], strict=True))
    # Systematic draws in row order have few outcomes, so that one may repeat by chance.
    assert not all(torch.equal(a, b) for a, b in zip(runs[0], runs[2], strict=True))
    assert not all(torch.equal(runs[0][0], later) for later in runs[0][1:])


def test_two_linears_draw_different_rows() -> None:
    model = nn.ModuleList([nn.Linear(D_IN, D_OUT), nn.Linear(D_IN, D_OUT)])
    model.forward = lambda x: model[0](x + 0.0) + model[1](x + 0.0)
    lt.apply(model, lt.WTACRS(norms="activation", estimator="crs"))
    (first, _), (second, _) = samples(lambda: model(data()[0]))
    assert not torch.equal(first, second)


def test_dropout_sees_the_same_stream_for_every_keep_ratio() -> None:
    tiny = MODELS["bert"]
    config = type(tiny.build().config)(**{**tiny.options, "hidden_dropout_prob": 0.2})
    results = []
    for ratio in (1.0, 0.3, None):
        torch.manual_seed(5)
        model = type(tiny.build())(config).train()
        if ratio is not None:
            lt.apply(model, lt.WTACRS(keep_ratio=ratio, min_rows=2))
        torch.manual_seed(6)
        loss = model(**tiny.batch()).loss
        loss.backward()
        results.append((loss.detach(), torch.get_rng_state()))
    assert all(torch.equal(r[0], results[0][0]) for r in results)
    assert all(torch.equal(r[1], results[0][1]) for r in results)


# The estimate.


@pytest.mark.parametrize("name", ["default", "wta"])
def test_gradient_is_autograd_of_the_weighted_product(name: str) -> None:
    x, grad_output = data()
    ((index, weights),) = samples(lambda: converted(**OPTIONS[name])[0](x))
    model, _ = converted(**OPTIONS[name])
    grad = weight_grad(model, x, grad_output)
    w = model.layer.weight.detach().double().requires_grad_()
    rows = x.double().reshape(-1, D_IN)[index]
    product = (rows @ w.t()) * grad_output.double().reshape(-1, D_OUT)[index]
    (product * weights.double()[:, None]).sum().backward()
    assert w.grad is not None
    torch.testing.assert_close(grad, w.grad.float())
    with pytest.raises(AssertionError):
        torch.testing.assert_close(grad * 1.01, w.grad.float())


@each
def test_every_row_counts_by_one_weight(options) -> None:
    """With the unit vectors for rows, column i of the gradient is row i's gradient times weight."""
    n = 64
    model, _ = converted(d_in=n, **options)
    grad_output = data((n, D_IN))[1]
    for _ in range(3):
        totals = weight_grad(model, torch.eye(n), grad_output).t() / grad_output  # (n, D_OUT)
        torch.testing.assert_close(totals, totals[:, :1].expand_as(totals))
        kept = totals[:, 0][totals[:, 0] != 0]
        if "estimator" in options:
            assert len(kept) <= KEPT
        else:
            assert len(kept) == KEPT and kept.min() > 1 - 1e-5


@each
def test_gradient_is_unbiased(options) -> None:
    x, grad_output = data()
    exact = exact_grad(x, grad_output)
    grads = draws(converted(**options)[0], x, grad_output)
    assert mean_check(grads, exact, resolution=FLOAT32_NOISE).ok
    assert not mean_check(grads * 0.5, exact, resolution=FLOAT32_NOISE).ok


def test_topk_is_biased() -> None:
    x, grad_output = data()
    grads = draws(converted(estimator="topk")[0], x, grad_output, 20)
    assert not mean_check(grads, exact_grad(x, grad_output), resolution=FLOAT32_NOISE).ok


def test_exact_norms_in_backward_have_the_lower_variance() -> None:
    x, grad_output = data()
    forward, backward = (
        draws(converted(draw_at=when, norms="activation")[0], x, grad_output, 150).var(0).sum()
        for when in ("forward", "backward")
    )
    assert backward < 0.7 * forward


@each
def test_all_zero_input_and_all_zero_gradient(options) -> None:
    model, _ = converted(**options)
    x, grad_output = data()
    for a, b in ((x * 0, grad_output), (x, grad_output * 0), (x, grad_output)):
        grad = weight_grad(model, a, b)
        assert torch.isfinite(grad).all()
        assert bool(grad.any()) == bool((a.abs().sum() * b.abs().sum()) > 0)


@each
def test_one_overflowed_step_does_not_spoil_the_next(options) -> None:
    model, _ = converted(**options)
    x, grad_output = data()
    weight_grad(model, x, grad_output)
    bad_x, bad_g = x.clone(), grad_output.clone()
    bad_x[0, 0, 0] = float("inf")
    bad_g[0, 0, 0] = float("nan")
    # The step itself shows that it is spoilt, so that a loss scaler leaves it out.
    assert not torch.isfinite(weight_grad(model, bad_x, grad_output)).all()
    weight_grad(model, x, bad_g)
    assert torch.isfinite(weight_grad(model, x, grad_output)).all()


# Gradient checkpointing.


class Recomputed(nn.Module):
    def __init__(self, use_reentrant: bool | None) -> None:
        super().__init__()
        self.use_reentrant = use_reentrant
        self.block = nn.Sequential(nn.Linear(D_IN, 16), nn.Tanh(), nn.Linear(16, D_OUT))

    def forward(self, x: Tensor) -> Tensor:
        if self.use_reentrant is None:
            return self.block(x)
        return checkpoint(self.block, x, use_reentrant=self.use_reentrant)


@pytest.mark.parametrize("use_reentrant", [True, False])
@pytest.mark.parametrize("norms", ["activation", "running"])
def test_recomputation_draws_the_same_rows(use_reentrant: bool, norms: str) -> None:
    x, grad_output = data()
    results = []
    for mode in (None, use_reentrant):
        torch.manual_seed(0)
        model = Recomputed(mode)
        lt.apply(model, lt.WTACRS(min_rows=2, norms=norms, draw_at="forward"))
        for _ in range(3):
            model.zero_grad()
            model(x.clone().requires_grad_()).backward(grad_output)
            results.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    plain, recomputed = results[:3], results[3:]
    for a, b in zip(plain, recomputed, strict=True):
        assert all(torch.equal(p, q) for p, q in zip(a, b, strict=True))


def bert_gradients(way: str, **options: Any) -> list[Tensor]:
    """Return the gradients of one step under a way of checkpointing ("none": without)."""
    tiny = MODELS["bert"]
    model = tiny.build()
    wanted = lt.WTACRS(min_rows=2, **options)
    lt.apply(model, *([lt.Checkpoint(), wanted] if way == "method" else [wanted]))
    if way not in ("none", "method"):
        model.activation_checkpointing_enable({"use_reentrant": way == "reentrant"})
    model(**tiny.batch()).loss.backward()
    return [p.grad for p in model.bert.encoder.parameters()]


@pytest.mark.parametrize("way", ["none", "method", "transformers", "reentrant"])
def test_auto_draws_in_backward_inside_a_checkpointed_block(way: str) -> None:
    ours = bert_gradients(way)
    there, not_there = ("forward", "backward") if way == "none" else ("backward", "forward")
    same = bert_gradients(way, draw_at=there)
    assert all(torch.equal(a, b) for a, b in zip(ours, same, strict=True))
    other = bert_gradients(way, draw_at=not_there)
    assert not all(torch.equal(a, b) for a, b in zip(ours, other, strict=True))


# Mixed precision.


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@each
def test_autocast(dtype: torch.dtype, options) -> None:
    model, _ = converted(**options)
    x, grad_output = data()
    grad_output = grad_output.to(dtype)
    with torch.autocast("cpu", dtype=dtype):
        y = model(x)
    y.backward(grad_output)
    grad = model.layer.weight.grad
    assert y.dtype == dtype and grad is not None and grad.dtype == torch.float32
    # The same draw without autocast.
    wanted = weight_grad(converted(**options)[0], x, grad_output.float())
    assert (grad - wanted).norm() / wanted.norm() < 20 * torch.finfo(dtype).eps


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_model_in_another_precision(dtype: torch.dtype) -> None:
    model, _ = converted()
    model.to(dtype)
    x, grad_output = (t.to(dtype) for t in data())
    for _ in range(2):
        grad = weight_grad(model, x, grad_output)
        assert grad.dtype == dtype and torch.isfinite(grad).all()


@each
def test_scaling_the_loss_changes_no_probability(options) -> None:
    x, grad_output = data()
    model, _ = converted(**options)
    scaled, _ = converted(**options)
    for step, scale in enumerate((1024.0, 1024.0, 2.0**-12, 2.0**14)):
        plain = weight_grad(model, x, grad_output)
        wanted = weight_grad(scaled, x, grad_output * scale)
        assert torch.equal(plain * scale, wanted), step


def test_weights_of_rare_rows_do_not_overflow_float16() -> None:
    rows = torch.ones(2, 3, dtype=torch.float16)
    kept = KeptRows(rows, torch.tensor([0, 1], dtype=torch.int32), torch.tensor([3e5, 1.0]))
    grad = weighted(kept, torch.full((2, 2), 0.5, dtype=torch.float16)).dense()
    torch.testing.assert_close(grad.float(), torch.full((2, 3), 0.5 * 3e5 + 0.5), rtol=1e-3, atol=0)


# Padding.


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("bert", {}),
        ("bert", OPTIONS["activation"]),
        ("bert", OPTIONS["crs"]),
        ("llama", {}),
        ("opt", {}),
    ],
)
def test_padding_is_never_selected_once_it_had_no_gradient(name: str, options) -> None:
    tiny = MODELS[name]
    model = tiny.build()
    lt.apply(model, lt.WTACRS(**{"min_rows": 2, **options}))
    batch = tiny.batch()
    real = batch["attention_mask"].bool().flatten()

    def total_weights() -> Tensor:
        used = torch.zeros(len(real))
        for _ in range(3):
            for indices, weights in samples(lambda: model(**batch).loss.backward()):
                used.index_add_(0, indices, weights)
        return used

    model(**batch).loss.backward()  # shows that padding has no gradient
    used = total_weights()
    assert (used[real] > 0).float().mean() > 0.7 and not used[~real].any()
    # The control: without the mask, padding is selected.
    batch.pop("attention_mask")
    assert total_weights()[~real].any()


def test_padding_of_an_encoder_is_told_apart_from_its_decoder() -> None:
    tiny = MODELS["t5"]
    model = tiny.build()
    lt.apply(model, lt.WTACRS(min_rows=2, norms="activation"))
    batch = tiny.batch()
    real = batch["attention_mask"].bool().flatten()
    model(**batch).loss.backward()
    drawn = [indices[weights > 0] for indices, weights in samples(lambda: model(**batch))]
    encoder = [s for s in drawn if len(s) == int(0.3 * 32)]
    decoder = [s for s in drawn if len(s) == int(0.3 * 24)]
    # Two blocks of 4 draws, and one for the encoder's output, which both decoder blocks read.
    assert (len(encoder), len(decoder)) == (8 + 1, 2 * 6)
    assert all(real[s].all() for s in encoder)
    assert torch.cat(decoder).unique().numel() > 20


def test_padded_model_is_unbiased() -> None:
    tiny = MODELS["bert"]
    name = "bert.encoder.layer.1.output.dense.weight"
    plain = tiny.build()
    plain(**tiny.batch()).loss.backward()
    wanted = plain.get_parameter(name).grad
    model = tiny.build()
    lt.apply(model, lt.WTACRS(min_rows=2))
    grads: list[Tensor] = []
    for _ in range(50):
        model.zero_grad()
        model(**tiny.batch()).loss.backward()
        grads.append(model.get_parameter(name).grad.clone())
    drawn, noise = torch.stack(grads).double().numpy(), 1e-5 * float(wanted.norm())
    assert mean_check(drawn, wanted.numpy(), resolution=noise).ok
    assert not mean_check(drawn * 0.3, wanted.numpy(), resolution=noise).ok


def test_batch_of_padding_alone_has_no_gradient_and_no_nan() -> None:
    model = MODELS["llama"].build()
    lt.apply(model, lt.WTACRS(min_rows=2))
    batch = MODELS["llama"].batch()
    batch["labels"].fill_(-100)
    batch["labels"][0, 1] = 4
    batch["attention_mask"].zero_()
    batch["attention_mask"][0, :2] = 1
    model(**batch).loss.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and torch.isfinite(parameter.grad).all(), name
