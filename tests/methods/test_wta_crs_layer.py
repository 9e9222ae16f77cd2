"""The sampled linear: exact where it must be, unbiased elsewhere, and keeping what it says."""

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
from models import MODELS
from stats import mean_check
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import leantune as lt
from leantune.core.swap import StoredLinear
from leantune.measure import ledger
from leantune.methods.wta_crs import store as store_module
from leantune.methods.wta_crs.store import Sample, factors_of
from leantune.ops.stores import grad_weight

D_IN, D_OUT, SHAPE = 12, 7, (4, 16, 12)
FLOAT32_NOISE = 1e-5
VARIANTS: list[dict[str, Any]] = [
    {},
    {"residual_rank": 4},
    {"residual_rank": "mean"},
    {"draw_at": "backward"},
    {"draw_at": "backward", "residual_rank": 4},
    {"norms": "activation"},
    {"estimator": "wta"},
    {"estimator": "crs"},
    {"estimator": "wta", "c_rule": "variance"},
]


class Single(nn.Module):
    """One linear; its input is made inside, by an operation that keeps nothing."""

    def __init__(self, bias: bool = True) -> None:
        super().__init__()
        self.layer = nn.Linear(D_IN, D_OUT, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x + 0.0)


def name_of(options: dict[str, Any]) -> str:
    return "-".join(map(str, options.values())) or "default"


def converted(seed: int = 0, bias: bool = True, **options: Any) -> tuple[Single, lt.Session]:
    torch.manual_seed(1)
    model = Single(bias)
    session = lt.apply(model, lt.WTACRS(**{"min_rows": 2, **options}), seed=seed)
    return model, session


def data(shape: tuple[int, ...] = SHAPE, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Inputs with a common part, and output gradients whose norms differ by much."""
    generator = torch.Generator().manual_seed(seed)
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


@contextmanager
def recorded_selections(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Any]]:
    seen: list[Any] = []
    select = store_module.maths.select

    def record(*args: Any, **options: Any) -> Any:
        seen.append(select(*args, **options))
        return seen[-1]

    with monkeypatch.context() as patch:
        patch.setattr(store_module.maths, "select", record)
        yield seen


def saved_storages(run: Callable[[], Any], parameters: list[Tensor]) -> tuple[list[Tensor], int]:
    """Return what is saved, and its bytes by storage, parameters left out."""
    saved: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        saved.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        run()
    own = {p.untyped_storage().data_ptr() for p in parameters}
    sizes = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in saved}
    return saved, sum(size for key, size in sizes.items() if key not in own)


# -- 10, 11, 12: exact parts, shapes, no sampling where there is nothing to gain ---------------


@pytest.mark.parametrize("options", VARIANTS, ids=name_of)
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


@pytest.mark.parametrize("options", VARIANTS, ids=name_of)
@pytest.mark.parametrize(
    "shape", [(40, D_IN), (5, 8, D_IN), (2, 4, 5, D_IN), (1, 40, D_IN), (40, 1, D_IN)]
)
def test_weight_gradient_has_the_plain_shape_for_every_rank(shape, options) -> None:
    model, _ = converted(**options)
    x, grad_output = data(shape)
    for _ in range(3):
        grad = weight_grad(model, x, grad_output)
        assert grad.shape == (D_OUT, D_IN) and grad.dtype == torch.float32
        assert torch.isfinite(grad).all()


@pytest.mark.parametrize("options", VARIANTS, ids=name_of)
def test_lengths_may_change_between_steps(options) -> None:
    model, _ = converted(**options)
    for shape in ((4, 16), (4, 5), (3, 20), (4, 16), (64,), (2, 2, 9)):
        x, grad_output = data((*shape, D_IN))
        assert torch.isfinite(weight_grad(model, x, grad_output)).all()


def test_non_contiguous_input() -> None:
    model, session = converted(norms="activation")
    x, grad_output = data()
    swapped = x.transpose(0, 1).contiguous().transpose(0, 1)
    state = session.state_dict()
    first = weight_grad(model, x, grad_output).clone()
    session.load_state_dict(state)
    torch.testing.assert_close(weight_grad(model, swapped, grad_output), first)


@pytest.mark.parametrize("shape", [(0, D_IN), (0, 5, D_IN), (2, 0, D_IN)])
def test_empty_batch_is_refused(shape) -> None:
    model, _ = converted()
    with pytest.raises(lt.ConfigError, match="must hold at least one row, got an input of shape"):
        model(torch.zeros(shape))


@pytest.mark.parametrize("shape", [(1, D_IN), (1, 1, D_IN)])
@pytest.mark.parametrize("options", VARIANTS, ids=name_of)
def test_single_rows_are_exact(shape, options) -> None:
    model, _ = converted(**{"min_rows": 1, **options})
    x, grad_output = data(shape)
    grad = weight_grad(model, x, grad_output)
    np.testing.assert_allclose(grad.numpy(), exact_grad(x, grad_output), rtol=1e-5)


def test_input_of_one_dimension() -> None:
    model, _ = converted(min_rows=1)
    x, grad_output = data((D_IN,))
    grad = weight_grad(model, x, grad_output)
    np.testing.assert_allclose(grad.numpy(), torch.outer(grad_output, x).numpy(), rtol=1e-5)


def test_gradients_accumulate() -> None:
    model, session = converted(norms="activation")
    x, grad_output = data()
    single = []
    for _ in range(2):
        single.append(weight_grad(model, x, grad_output).clone())
    session.load_state_dict({**session.state_dict(), "draw": torch.tensor(0)})
    model.zero_grad()
    for _ in range(2):
        model(x).backward(grad_output)
    torch.testing.assert_close(model.layer.weight.grad, single[0] + single[1])
    assert not torch.allclose(single[0], single[1])


@pytest.mark.parametrize("mode", ["eval", "no_grad", "inference", "frozen", "exact"])
def test_no_sampling_and_nothing_extra_saved(mode: str, monkeypatch) -> None:
    model, session = converted()
    x, _ = data()
    if mode == "eval":
        model.eval()
    if mode == "frozen":
        model.layer.weight.requires_grad_(False)
    contexts = {
        "no_grad": torch.no_grad,
        "inference": torch.inference_mode,
        "exact": session.exact,
    }
    parameters = list(model.parameters())
    with recorded_selections(monkeypatch) as seen:
        with contexts.get(mode, torch.enable_grad)():
            _, num_bytes = saved_storages(lambda: model(x), parameters)
        assert not seen
        keeps_input = mode in ("eval", "exact")  # as the plain linear does
        assert num_bytes == (x.numel() * 4 if keeps_input else 0)
        if mode == "frozen":
            return
        model.train()(x)
        assert seen


# -- 13: saved bytes ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "extra"),
    [
        ({}, 0),
        ({"residual_rank": "mean"}, 4 * D_IN),
        ({"residual_rank": 4}, 4 * 4 * (64 + D_IN)),
        ({"residual_rank": 99}, 4 * D_IN * (64 + D_IN)),
        ({"estimator": "crs", "norms": "activation"}, 0),
    ],
    ids=["plain", "mean", "rank", "full rank", "crs"],
)
def test_saved_bytes_equal_the_formula(options, extra) -> None:
    model, _ = converted(**options)
    x, _ = data()
    parameters = list(model.parameters())
    for _ in range(2):
        _, num_bytes = saved_storages(lambda: model(x), parameters)
        k = int(0.3 * 64)
        assert num_bytes == k * D_IN * 4 + k * 4 + k * 4 + extra
        assert num_bytes == model.layer.store.saved_bytes(torch.Size(SHAPE), torch.float32)


def test_saved_bytes_under_autocast() -> None:
    model, _ = converted()
    x, _ = data()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        _, num_bytes = saved_storages(lambda: model(x), list(model.parameters()))
    k = int(0.3 * 64)
    assert num_bytes == k * D_IN * 2 + k * 8
    assert num_bytes == model.layer.store.saved_bytes(torch.Size(SHAPE), torch.bfloat16)


def test_members_of_a_group_share_one_sample() -> None:
    tiny = MODELS["bert"]
    model = tiny.build()
    lt.apply(model, lt.WTACRS(min_rows=2))
    attention = model.bert.encoder.layer[0].attention.self
    readers = [attention.query, attention.key, attention.value]
    inputs: list[Tensor] = []
    attention.query.register_forward_pre_hook(lambda module, args: inputs.append(args[0]))
    saved, _ = saved_storages(lambda: model(**tiny.batch()), list(model.parameters()))
    book = ledger(model, tiny.batch())
    prefix = "bert.encoder.layer.0.attention.self"
    entries = [
        [e for e in book.entries if any(h.module == f"{prefix}.{n}" for h in e.holders)]
        for n in ("query", "key", "value")
    ]
    activations = [[e for e in es if e.ledger == "activations"] for es in entries]
    assert activations[0] == activations[1] == activations[2]
    predicted = attention.query.store.saved_bytes(inputs[0].shape, torch.float32)
    assert sum(e.num_bytes for e in activations[0]) == predicted
    # Released: nothing saved lies in the full input.
    full = inputs[0].untyped_storage().data_ptr()
    assert all(t.untyped_storage().data_ptr() != full for t in saved)
    assert len({id(r.store.group) for r in readers}) == 1


def test_shared_sample_is_dropped_when_its_last_reader_has_it() -> None:
    tiny = MODELS["bert"]
    model = tiny.build()
    lt.apply(model, lt.WTACRS(min_rows=2))
    group = model.bert.encoder.layer[0].attention.self.query.store.group
    held: list[bool] = []
    model.bert.encoder.layer[0].attention.output.dense.register_forward_pre_hook(
        lambda module, args: held.append(group._shared is not None)
    )
    model(**tiny.batch())
    assert held == [False]


@pytest.mark.parametrize("is_converted", [True, False])
def test_full_input_is_released_when_its_producer_keeps_it_not(is_converted: bool) -> None:
    torch.manual_seed(0)
    model = Single()
    if is_converted:
        lt.apply(model, lt.WTACRS(min_rows=2))
    x, grad_output = data()
    references: list[weakref.ref] = []
    model.layer.register_forward_pre_hook(
        lambda module, args: references.append(weakref.ref(args[0]))
    )
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
        if isinstance(module, StoredLinear):
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


def test_what_sampling_frees_in_a_post_norm_block() -> None:
    """BERT: a norm keeps its input and not its output, so all four inputs of a block go."""
    narrow, wide = full_inputs_held("bert")
    sampled_narrow, sampled_wide = full_inputs_held("bert", keep_ratio=0.3)
    # Per block: q/k/v's input and the MLP's input; the attention's output is kept by attention.
    assert narrow - sampled_narrow == 4
    # The input of the MLP's second linear; GELU keeps its own input.
    assert wide - sampled_wide == 2
    # One reader that stays exact keeps the input for all: nothing is freed.
    two = full_inputs_held("bert", keep_ratio=0.3, sites=["query", "key"])
    assert two == (narrow, wide)


def test_what_sampling_frees_in_a_pre_norm_block() -> None:
    """LLaMA: a norm keeps the normalised input, which is another tensor than its output."""
    narrow, wide = full_inputs_held("llama")
    sampled_narrow, sampled_wide = full_inputs_held("llama", keep_ratio=0.3)
    # Per block: the inputs of q/k/v and of gate/up.
    assert narrow - sampled_narrow == 4
    # The input of down_proj; the product keeps both of its factors.
    assert wide - sampled_wide == 2
    assert full_inputs_held("llama", keep_ratio=0.3, sites="gate_proj") == (narrow, wide)


# -- 14: determinism ---------------------------------------------------------------------------


@pytest.mark.parametrize("options", VARIANTS, ids=name_of)
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


def test_two_linears_draw_different_rows(monkeypatch) -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(D_IN, D_OUT), nn.Linear(D_IN, D_OUT)

        def forward(self, x: Tensor) -> Tensor:
            return self.a(x) + self.b(x)

    model = Two()
    lt.apply(model, lt.WTACRS(norms="activation", estimator="crs"))
    with recorded_selections(monkeypatch) as seen:
        model(data()[0])
    assert len(seen) == 2 and not torch.equal(seen[0].indices, seen[1].indices)


def test_dropout_sees_the_same_stream_for_every_keep_ratio() -> None:
    tiny = MODELS["bert"]
    config = type(tiny.build().config)(**{**tiny.options, "hidden_dropout_prob": 0.2})
    results = []
    for ratio in (1.0, 0.3, None):
        torch.manual_seed(5)
        model = type(tiny.build())(config).train()
        if ratio is not None:
            lt.apply(model, lt.WTACRS(keep_ratio=ratio, min_rows=2, residual_rank=2))
        torch.manual_seed(6)
        loss = model(**tiny.batch()).loss
        loss.backward()
        results.append((loss.detach(), torch.get_rng_state()))
    assert all(torch.equal(r[0], results[0][0]) for r in results)
    assert all(torch.equal(r[1], results[0][1]) for r in results)


# -- 15: a frozen selection --------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"estimator": "wta"}, {"draw_at": "backward"}])
def test_backward_is_autograd_of_the_weighted_product(options, monkeypatch) -> None:
    model, _ = converted(**options)
    x, grad_output = data()
    with recorded_selections(monkeypatch) as seen:
        grad = weight_grad(model, x, grad_output)
    index, weights = seen[0].indices.long(), seen[0].weights
    w = model.layer.weight.detach().double().requires_grad_()
    rows = x.double().reshape(-1, D_IN)[index]
    product = (rows @ w.t()) * grad_output.double().reshape(-1, D_OUT)[index]
    (product * weights.double()[:, None]).sum().backward()
    assert w.grad is not None
    torch.testing.assert_close(grad, w.grad.float())
    with pytest.raises(AssertionError):
        torch.testing.assert_close(grad * 1.01, w.grad.float())


# -- unbiasedness, with its broken control -----------------------------------------------------


@pytest.mark.parametrize("options", VARIANTS, ids=name_of)
def test_gradient_is_unbiased(options, monkeypatch) -> None:
    x, grad_output = data()
    exact = exact_grad(x, grad_output)
    model, _ = converted(**options)
    check = mean_check(draws(model, x, grad_output), exact, resolution=FLOAT32_NOISE)
    assert check.ok, check

    select = store_module.maths.select

    def unscaled(*args: Any, **kwargs: Any) -> Any:
        selection = select(*args, **kwargs)
        return selection._replace(weights=torch.ones_like(selection.weights))

    monkeypatch.setattr(store_module.maths, "select", unscaled)
    model, _ = converted(**options)
    assert not mean_check(draws(model, x, grad_output), exact, resolution=FLOAT32_NOISE).ok


def test_topk_is_biased() -> None:
    x, grad_output = data()
    model, _ = converted(estimator="topk")
    grads = draws(model, x, grad_output, 20)
    assert not mean_check(grads, exact_grad(x, grad_output), resolution=FLOAT32_NOISE).ok


def variance(x: Tensor, grad_output: Tensor, **options: Any) -> float:
    model, _ = converted(**options)
    return float(draws(model, x, grad_output, 150).var(0, ddof=1).sum())


def test_exact_norms_in_backward_have_the_lower_variance() -> None:
    x, grad_output = data()
    forward = variance(x, grad_output, norms="activation", draw_at="forward")
    backward = variance(x, grad_output, draw_at="backward")
    assert backward < 0.7 * forward


def test_control_variates_lower_the_variance_of_inputs_with_a_common_part() -> None:
    x, grad_output = data()
    x = x + 2.0
    plain = variance(x, grad_output, draw_at="backward")
    assert variance(x, grad_output, draw_at="backward", residual_rank="mean") < 0.5 * plain
    assert variance(x, grad_output, draw_at="backward", residual_rank=2) < 0.5 * plain


def test_part_of_full_rank_leaves_nothing_to_sample() -> None:
    model, _ = converted(residual_rank=D_IN)
    x, grad_output = data()
    grad = weight_grad(model, x, grad_output)
    np.testing.assert_allclose(grad.numpy(), exact_grad(x, grad_output), rtol=2e-4, atol=2e-4)


def test_input_of_rank_below_the_kept_part() -> None:
    model, _ = converted(residual_rank=4)
    x, grad_output = data()
    x = x[..., :1] * torch.ones(D_IN)
    for _ in range(3):
        grad = weight_grad(model, x, grad_output)
        np.testing.assert_allclose(grad.numpy(), exact_grad(x, grad_output), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("options", VARIANTS, ids=name_of)
def test_all_zero_input_and_all_zero_gradient(options) -> None:
    model, _ = converted(**options)
    x, grad_output = data()
    for a, b in ((x * 0, grad_output), (x, grad_output * 0), (x, grad_output)):
        grad = weight_grad(model, a, b)
        assert torch.isfinite(grad).all()
        assert bool(grad.any()) == bool((a.abs().sum() * b.abs().sum()) > 0)


@pytest.mark.parametrize("residual_rank", [0, "mean", 4])
@pytest.mark.parametrize("norms", ["running", "activation"])
def test_one_overflowed_step_does_not_spoil_the_next(residual_rank, norms) -> None:
    model, _ = converted(residual_rank=residual_rank, norms=norms)
    x, grad_output = data()
    weight_grad(model, x, grad_output)
    bad_x, bad_g = x.clone(), grad_output.clone()
    bad_x[0, 0, 0] = float("inf")
    bad_g[0, 0, 0] = float("nan")
    weight_grad(model, x, bad_g)
    weight_grad(model, bad_x, grad_output)
    assert torch.isfinite(weight_grad(model, x, grad_output)).all()


# -- 16: gradient checkpointing ----------------------------------------------------------------


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


@pytest.mark.parametrize("way", ["method", "transformers", "reentrant"])
def test_auto_draws_in_backward_inside_a_checkpointed_block(way: str, monkeypatch) -> None:
    tiny = MODELS["bert"]
    model = tiny.build()
    wanted = lt.WTACRS(min_rows=2)
    lt.apply(model, *([lt.Checkpoint(), wanted] if way == "method" else [wanted]))
    if way != "method":
        options = {"use_reentrant": way == "reentrant"}
        model.activation_checkpointing_enable(options)
    batch = tiny.batch()
    with recorded_selections(monkeypatch) as seen:
        loss = model(**batch).loss
        num_forward = len(seen)
        loss.backward()
    # Twelve linears; in backward each has its own exact norms.
    assert num_forward == 0 and len(seen) == 12
    assert all(p.grad is not None for p in model.bert.encoder.parameters())
    model.activation_checkpointing_disable()
    with recorded_selections(monkeypatch) as seen:
        model(**batch)
        assert len(seen) == 8


# -- 17: mixed precision -----------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("options", VARIANTS, ids=name_of)
def test_autocast(dtype: torch.dtype, options) -> None:
    model, session = converted(**options)
    x, grad_output = data()
    grad_output = grad_output.to(dtype)
    with torch.autocast("cpu", dtype=dtype):
        y = model(x)
    y.backward(grad_output)
    grad = model.layer.weight.grad
    assert y.dtype == dtype and grad is not None and grad.dtype == torch.float32
    # The same draw without autocast.
    session.load_state_dict(converted(**options)[1].state_dict())
    wanted = weight_grad(model, x, grad_output.float())
    error = (grad - wanted).norm() / wanted.norm()
    assert error < 20 * torch.finfo(dtype).eps


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("options", [{}, {"residual_rank": 2}, {"residual_rank": "mean"}])
def test_model_in_another_precision(dtype: torch.dtype, options) -> None:
    model, _ = converted(**options)
    model.to(dtype)
    x, grad_output = (t.to(dtype) for t in data())
    for _ in range(2):
        grad = weight_grad(model, x, grad_output)
        assert grad.dtype == dtype and torch.isfinite(grad).all()


@pytest.mark.parametrize("options", VARIANTS, ids=name_of)
def test_scaling_the_loss_changes_no_probability(options) -> None:
    x, grad_output = data()
    model, _ = converted(**options)
    scaled, _ = converted(**options)
    for step, scale in enumerate((1024.0, 1024.0, 2.0**-12, 2.0**14)):
        plain = weight_grad(model, x, grad_output)
        wanted = weight_grad(scaled, x, grad_output * scale)
        assert torch.equal(plain * scale, wanted), step


def test_rare_rows_do_not_overflow_float16() -> None:
    rows = torch.ones(2, 3, dtype=torch.float16)
    sample = Sample(rows, torch.tensor([0, 1], dtype=torch.int32), torch.tensor([3e5, 1.0]), ())
    grad = grad_weight(factors_of(sample, torch.full((2, 2), 0.5, dtype=torch.float16)))
    torch.testing.assert_close(grad.float(), torch.full((2, 3), 0.5 * 3e5 + 0.5), rtol=1e-3, atol=0)


# -- 20: padding -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "options"),
    [("bert", o) for o in VARIANTS[:4]]
    + [("llama", {}), ("opt", {}), ("bert", {"estimator": "crs"})],
    ids=str,
)
def test_padding_is_never_selected(name: str, options, monkeypatch) -> None:
    tiny = MODELS[name]
    model = tiny.build()
    lt.apply(model, lt.WTACRS(**{"min_rows": 2, **options}))
    batch = tiny.batch()
    real = batch["attention_mask"].bool().flatten()

    def total_weights() -> Tensor:
        used = torch.zeros(len(real))
        with recorded_selections(monkeypatch) as seen:
            for _ in range(3):
                model(**batch).loss.backward()
        for selection in seen:
            used.index_add_(0, selection.indices.long(), selection.weights)
        return used

    used = total_weights()
    assert (used[real] > 0).float().mean() > 0.7 and not used[~real].any()
    if options.get("draw_at") == "backward" and name != "bert":
        return  # without labels, padding has no gradient there: nothing to select
    # The control: without the mask, padding is selected.
    batch.pop("attention_mask")
    assert total_weights()[~real].any()


def test_padding_of_an_encoder_is_told_apart_from_its_decoder(monkeypatch) -> None:
    tiny = MODELS["t5"]
    model = tiny.build()
    lt.apply(model, lt.WTACRS(min_rows=2, norms="activation"))
    batch = tiny.batch()
    real = batch["attention_mask"].bool().flatten()
    with recorded_selections(monkeypatch) as seen:
        model(**batch)
    encoder = [s for s in seen if len(s.indices) == int(0.3 * 32)]
    decoder = [s for s in seen if len(s.indices) == int(0.3 * 24)]
    # Two blocks of 4 draws, and in each decoder block one more for the encoder's output.
    assert (len(encoder), len(decoder)) == (8 + 2, 2 * 6)
    assert all(real[s.indices[s.weights > 0].long()].all() for s in encoder)
    used = torch.cat([s.indices[s.weights > 0] for s in decoder])
    assert used.unique().numel() > 20


def test_padded_model_is_unbiased() -> None:
    tiny = MODELS["bert"]
    plain = tiny.build()
    plain(**tiny.batch()).loss.backward()
    model = tiny.build()
    lt.apply(model, lt.WTACRS(min_rows=2))
    names = [n for n, m in model.named_modules() if n.endswith("1.output.dense")]
    grads: dict[str, list[Tensor]] = {n: [] for n in names}
    for _ in range(50):
        model.zero_grad()
        model(**tiny.batch()).loss.backward()
        for n in names:
            grads[n].append(model.get_submodule(n).weight.grad.clone())
    for n in names:
        wanted = plain.get_submodule(n).weight.grad
        scale = float(wanted.norm())
        samples = torch.stack(grads[n]).double().numpy()
        assert mean_check(samples, wanted.numpy(), resolution=1e-5 * scale).ok, n
        assert not mean_check(samples * 0.3, wanted.numpy(), resolution=1e-5 * scale).ok, n


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


def test_neighbours_of_the_neutral_setting() -> None:
    """A ratio below 1 that keeps every row of a small batch is exact and draws nothing."""
    model, _ = converted(keep_ratio=0.9, min_rows=64)
    x, grad_output = data()
    grad = weight_grad(model, x, grad_output)
    plain = Single()
    plain.load_state_dict(model.state_dict())
    assert torch.equal(grad, weight_grad(plain, x, grad_output))


@pytest.mark.parametrize("norms", ["running", "activation"])
def test_loss_that_counts_padding_is_refused(norms: str) -> None:
    model = MODELS["bert"].build()
    lt.apply(model, lt.WTACRS(min_rows=2, norms=norms))
    batch = MODELS["bert"].batch()
    batch.pop("labels")
    hidden = model(**batch, output_hidden_states=True).hidden_states[-1]
    with pytest.raises(lt.UnsupportedError, match="attention_mask must be 0 only on rows without"):
        hidden.square().sum().backward()


def test_loss_that_counts_padding_is_welcome_in_backward_draws() -> None:
    model = MODELS["bert"].build()
    lt.apply(model, lt.WTACRS(min_rows=2, draw_at="backward"))
    batch = MODELS["bert"].batch()
    batch.pop("labels")
    model(**batch, output_hidden_states=True).hidden_states[-1].square().sum().backward()
