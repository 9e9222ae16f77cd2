"""Converted layers: outputs, gradients, weights, bytes, state, and what is refused."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from models import MODELS
from oracles import sparse_grad as oracle
from stats import mean_check
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import BertConfig, BertForSequenceClassification
from transformers.pytorch_utils import Conv1D

import leantune as lt
from leantune.errors import ConfigError, SiteError
from leantune.methods.sparse_grad import layer as layer_module
from leantune.methods.sparse_grad.conversion import Conversion
from leantune.methods.sparse_grad.layer import Layer
from leantune.ops.stores import Factors

# torch's own warning about its own sparse tensors.
pytestmark = pytest.mark.filterwarnings("ignore:Sparse invariant checks:UserWarning")

D_OUT, D_IN, NUM_ROWS = 24, 16, 10
SELECTIONS = ["fixed", "refreshed", "block", "step"]
DENSE = ["fixed", "refreshed", "block"]
SMALL_BERT = BertConfig(
    vocab_size=99,
    hidden_size=16,
    num_hidden_layers=2,
    num_attention_heads=2,
    intermediate_size=32,
    max_position_embeddings=32,
)


class One(nn.Module):
    """A linear behind another one, so that its input has a gradient, in float64."""

    def __init__(self, conv: bool = False, bias: bool = True) -> None:
        super().__init__()
        self.first = nn.Linear(D_IN, D_IN)
        self.up = Conv1D(D_OUT, D_IN) if conv else nn.Linear(D_IN, D_OUT, bias=bias)
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        return self.up(self.first(x)).square().mul(WEIGHTS).sum()


WEIGHTS = torch.linspace(0.1, 2.0, D_OUT, dtype=torch.float64)


def rows(seed: int, *shape: int) -> Tensor:
    rng = torch.Generator().manual_seed(seed)
    scale = torch.logspace(0, -2, D_IN, dtype=torch.float64)
    return torch.randn(*(shape or (NUM_ROWS,)), D_IN, generator=rng, dtype=torch.float64) * scale


def build(seed: int = 0, **options) -> One:
    torch.manual_seed(seed)
    return One(**options)


def convert(model: nn.Module, **options) -> lt.Session:
    session = lt.apply(model, lt.SparseGrad(**{"sites": "up", "density": 0.1, **options}))
    session.calibrate([rows(s) for s in (100, 101, 102)])
    return session


def layer_of(session: lt.Session, at: int = 0) -> Layer:
    (change,) = (c for c in session.changes if isinstance(c, Conversion))
    return change.layers[at]


def dense_weight(model: One) -> Tensor:
    """The weight as the state dict has it, (d_out, d_in)."""
    weight = model.state_dict()["up.weight"].clone()
    return weight.t() if isinstance(model.up, Conv1D) or weight.shape[0] == D_IN else weight


def dense_gradient(conv: bool, x: Tensor, seed: int = 0) -> dict[str, Tensor]:
    model = build(seed, conv=conv)
    model(x).backward()
    grads = {n: p.grad for n, p in model.named_parameters()}
    if conv:
        grads["up.weight"] = grads["up.weight"].t()
    return grads


# Outputs and gradients


@pytest.mark.parametrize("conv", [False, True])
@pytest.mark.parametrize("selection", SELECTIONS)
def test_at_full_density_everything_is_the_plain_linears(selection: str, conv: bool) -> None:
    model = build(conv=conv)
    x = rows(1)
    plain = build(conv=conv)(x).detach()
    layer = layer_of(convert(model, selection=selection, density=1.0))
    loss = model(x)
    assert abs(float(loss.detach() - plain)) < 1e-11 * float(plain)
    loss.backward()
    wanted = dense_gradient(conv, x)
    q_out, q_in = layer.bases.q_out, layer.bases.q_in
    grad = layer.module.trained.grad.to_dense().view(D_OUT, D_IN)
    torch.testing.assert_close(q_out @ grad @ q_in.t(), wanted["up.weight"], rtol=1e-9, atol=1e-11)
    assert not torch.allclose(q_out @ grad @ q_in, wanted["up.weight"]), "the transposed basis"
    for name in ("first.weight", "first.bias", "up.bias"):
        torch.testing.assert_close(model.get_parameter(name).grad, wanted[name])
    # The released code rotates the bias's gradient: that must not pass.
    assert not torch.allclose(q_out.t() @ model.up.bias.grad, wanted["up.bias"])


@pytest.mark.parametrize("selection", SELECTIONS)
def test_rows_without_a_gradient_can_be_skipped(
    selection: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Padding has none; in the last block of a classifier only the first token has one."""
    left: list[int] = []
    skipping = layer_module._without_zero_rows

    def counted(factors: Factors) -> Factors:
        kept = skipping(factors)
        left.append(len(kept.left))
        return kept

    monkeypatch.setattr(layer_module, "_without_zero_rows", counted)
    mask = torch.arange(12) < torch.tensor([[5], [9]])
    ids = torch.arange(24).view(2, 12)
    batch = {"input_ids": ids, "attention_mask": mask.long(), "labels": torch.tensor([0, 1])}
    grads: list[list[Tensor]] = []
    for skip in (False, True):
        torch.manual_seed(0)
        model = BertForSequenceClassification(SMALL_BERT).double()
        config = lt.SparseGrad(selection=selection, density=0.1, skip_zero_rows=skip)
        session = lt.apply(model, config)
        session.calibrate([batch])
        torch.manual_seed(1)  # dropout
        model(**batch).loss.backward()
        (change,) = (c for c in session.changes if isinstance(c, Conversion))
        grads.append([n.module.trained.grad.to_dense() for n in change.layers])
    assert left == [2, 2, 14, 14]  # down and up of the last block, then of the first
    for ours, wanted in zip(*grads, strict=True):
        torch.testing.assert_close(ours, wanted, rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("selection", SELECTIONS)
@pytest.mark.parametrize("shape", [(), (3,), (2, 3), (2, 1, 3)])
def test_any_number_of_leading_dimensions(selection: str, shape: tuple[int, ...]) -> None:
    model = build(bias=False)
    layer = layer_of(convert(model, selection=selection))
    x = rows(1, *shape) if shape else rows(1, 1)[0]
    model(x).backward()
    one_by_one = build(bias=False)
    other = layer_of(convert(one_by_one, selection=selection, density=1.0 if not shape else 0.1))
    flat = x.reshape(-1, D_IN)
    one_by_one(flat).backward()
    if shape:
        got, wanted = (n.module.trained.grad.to_dense() for n in (layer, other))
        torch.testing.assert_close(got, wanted)
    assert model.up.bias is None


@pytest.mark.parametrize("selection", DENSE)
def test_selected_entries_are_the_oracles(selection: str) -> None:
    model = build()
    session = convert(model, selection=selection, num_outliers=5 if selection == "block" else 0)
    layer, x = layer_of(session), rows(1)
    model(x).backward()
    y = (x @ model.first.weight.t() + model.first.bias).detach()
    grad_output = 2 * WEIGHTS * (y @ model.up.weight.t() + model.up.bias).detach()
    chosen = layer.indices.tolist()
    q_out, q_in = layer.bases.q_out.numpy(), layer.bases.q_in.numpy()
    wanted = oracle.selected_gradient(y.numpy(), grad_output.numpy(), q_out, q_in, chosen)
    got = layer.module.trained.grad.numpy()
    assert got.shape == (layer.num_entries,) == (len(chosen),)
    assert np.linalg.norm(got - wanted) < 1e-12 * np.linalg.norm(wanted)
    assert np.linalg.norm(got * 1.01 - wanted) > 1e-12 * np.linalg.norm(wanted)


def test_each_step_sends_exactly_the_largest_entries() -> None:
    model = build()
    layer = layer_of(convert(model, selection="step", num_entries=7))
    x = rows(1)
    model(x).backward()
    assert layer.module.trained.grad.is_sparse and layer.module.trained.grad._nnz() == 7
    grad = layer.module.trained.grad.coalesce()
    dense = dense_gradient(False, x)["up.weight"]
    rotated = oracle.rotate(dense.numpy(), layer.bases.q_out.numpy(), layer.bases.q_in.numpy())
    kept = oracle.top_entries(rotated, 7)
    at = grad.indices()
    assert (at[0] * D_IN + at[1]).tolist() == kept
    np.testing.assert_allclose(grad.values().numpy(), rotated.reshape(-1)[kept], rtol=1e-9)


@pytest.mark.parametrize("selection", DENSE)
def test_micro_batches_add_up(selection: str) -> None:
    model = build()
    layer = layer_of(convert(model, selection=selection))
    model(rows(1, 6)).backward()
    whole = layer.module.trained.grad.clone()
    model.zero_grad()
    for half in rows(1, 6).split(3):
        model(half).backward()
    torch.testing.assert_close(layer.module.trained.grad, whole)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("selection", DENSE)
def test_autocast_errs_no_more_than_the_plain_linear(selection: str, dtype: torch.dtype) -> None:
    model = build()
    layer = layer_of(convert(model, selection=selection))
    model.float()
    x = rows(1).float()
    exact = build()
    q_out, q_in = (q.double() for q in (layer.bases.q_out, layer.bases.q_in))
    plain = build().float()
    with torch.autocast("cpu", dtype=dtype):
        losses = [m(x) for m in (model, plain)]
    for loss in losses:
        loss.backward()
    exact(x.double()).backward()

    def picked(dense: Tensor) -> Tensor:
        flat = (q_out.t() @ dense.double() @ q_in).flatten()
        return flat if layer.indices is None else flat[layer.indices]

    wanted = picked(exact.up.weight.grad)
    got = layer.module.trained.grad.flatten()
    bound = 2 * (picked(plain.up.weight.grad) - wanted).norm()
    assert (got - wanted).norm() <= bound and (got * 1.1 - wanted).norm() > bound


# Weights


@pytest.mark.parametrize("conv", [False, True])
@pytest.mark.parametrize("selection", SELECTIONS)
def test_sgd_at_full_density_is_plain_sgd(selection: str, conv: bool) -> None:
    """Steps of SGD do not depend on the basis; Adam's would."""
    model, plain = build(conv=conv), build(conv=conv)
    session = convert(model, selection=selection, density=1.0)
    mine = session.optimizer(torch.optim.SGD, lr=0.01)
    if selection == "step":
        mine = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.01)
    theirs = torch.optim.SGD(plain.parameters(), lr=0.01)
    for seed in range(4):
        for m, optimizer in ((model, mine), (plain, theirs)):
            optimizer.zero_grad()
            m(rows(seed)).backward()
            optimizer.step()
    session.merge()
    for name, value in plain.state_dict().items():
        torch.testing.assert_close(model.state_dict()[name], value, rtol=1e-9, atol=1e-11)


def test_a_step_moves_the_weight_along_the_selected_entries_alone() -> None:
    model = build()
    layer = layer_of(session := convert(model))
    before = dense_weight(model)
    optimizer = session.optimizer(torch.optim.SGD, lr=0.1)
    model(rows(1)).backward()
    values = layer.module.trained.grad.numpy().copy()
    optimizer.step()
    q_out, q_in = layer.bases.q_out.numpy(), layer.bases.q_in.numpy()
    change = oracle.rotate_back(layer.indices.tolist(), -0.1 * values, q_out, q_in)
    torch.testing.assert_close(dense_weight(model) - before, torch.from_numpy(change))
    wrong = oracle.rotate_back(layer.indices.tolist(), -0.1 * values, q_out, q_in.T)
    assert not np.allclose((dense_weight(model) - before).numpy(), wrong)


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("selection", DENSE)
def test_the_next_forward_sees_every_optimizers_step(selection: str, fused: bool) -> None:
    """A fused optimiser does not move the version counter of what it writes."""
    model = build()
    session = convert(model, selection=selection)
    model.float()
    optimizer = session.optimizer(torch.optim.AdamW, lr=0.1, fused=fused)
    x = rows(1).float()
    losses = []
    for _ in range(3):
        optimizer.zero_grad()
        loss = model(x)
        loss.backward()
        losses.append(loss.item())
        trained = model.up.trained
        version = trained._version
        optimizer.step()
        assert (trained._version == version) == fused
        assert not torch.equal(trained, model.up.applied)
    assert losses[2] < losses[1] < losses[0]
    merged = dense_weight(model)
    assert torch.equal(trained, model.up.applied)
    session.merge()
    assert type(model.up) is nn.Linear and torch.equal(model.up.weight, merged)


def test_versions_are_trusted_only_once_they_have_moved_after_a_backward() -> None:
    """The rule for devices where a comparison would wait."""

    class Elsewhere(torch.Tensor):
        device = torch.device("meta")

    model = build()
    layer = layer_of(convert(model))
    trained = torch.zeros(3).as_subclass(Elsewhere)
    layer._seen, layer._had_backward = None, False
    assert not layer._is_current(trained, trained)
    assert layer._is_current(trained, trained)
    layer._had_backward = True
    assert not layer._is_current(trained, trained), "a fused optimiser may have written"
    layer._had_backward = True
    trained.add_(1)
    assert not layer._is_current(trained, trained)
    layer._had_backward = True
    assert layer._is_current(trained, trained), "this optimiser counts its writes"
    assert not layer._is_current(trained.clone(), trained), "another tensor"


@pytest.mark.parametrize("selection", SELECTIONS)
def test_removing_without_training_gives_the_very_weights_back(selection: str) -> None:
    model = build()
    weight, values = model.up.weight, model.up.weight.detach().clone()
    session = convert(model, selection=selection)
    assert not weight.requires_grad
    model(rows(1)).backward()
    model.state_dict()
    session.remove()
    assert model.up.weight is weight and weight.requires_grad and torch.equal(weight, values)
    assert list(model.state_dict()) == list(build().state_dict())


@pytest.mark.parametrize("selection", SELECTIONS)
def test_after_training_remove_and_merge_keep_the_trained_weights(selection: str) -> None:
    for end in ("remove", "merge"):
        model = build()
        session = convert(model, selection=selection)
        optimizer = session.optimizer(torch.optim.AdamW, lr=0.1)
        model(rows(1)).backward()
        optimizer.step()
        with torch.no_grad():
            wanted = model(rows(2))
        getattr(session, end)()
        torch.testing.assert_close(model(rows(2)).detach(), wanted)
        assert not torch.allclose(build()(rows(2)), wanted)


# Bytes


class Sizes(TorchDispatchMode):
    """Records how many elements the results of operations have."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[int] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        self.seen |= {t.numel() for t in tree_leaves(result) if isinstance(t, Tensor)}
        return result


def test_gradients_and_optimizer_state_have_the_size_of_the_entries() -> None:
    k = 38
    for selection, grads, state in (
        ("fixed", 8 * k, 2 * 8 * k + 4),
        ("step", (16 + 8) * k, 2 * 8 * D_OUT * D_IN),
    ):
        model = build()
        session = convert(model, selection=selection, num_entries=k)
        optimizer = session.optimizer(torch.optim.AdamW, lr=0.1)
        model(rows(1)).backward()
        optimizer.step()
        book = lt.ledger(model, (rows(2),), optimizer=optimizer)
        of_weight = [e for e in book.entries if e.module == "up" and e.shape != (D_OUT,)]

        def total(name: str, entries=of_weight) -> int:
            return sum(e.num_bytes for e in entries if e.ledger == name)

        assert total("gradients") == grads
        assert total("optimizer") in (state, state + 4)  # the bias's step counter has its shape


def test_the_block_keeps_only_its_own_features_and_never_forms_the_gradient() -> None:
    model = build()
    layer = layer_of(convert(model, selection="block", num_entries=24))
    r_out, r_in = layer.block
    assert (r_out, r_in) == (4, 6)
    book = lt.ledger(model, (rows(1),))
    kept = [e for e in book.entries if e.ledger == "activations" and e.module == "up"]
    assert sorted(e.num_bytes for e in kept) == [NUM_ROWS * r_in * 8]
    for options, forms in (
        ({"selection": "block", "num_entries": 24}, False),
        ({"density": 1.0}, True),
    ):
        other = build()
        convert(other, **options)
        loss = other(rows(1, 400))
        with Sizes() as sizes:
            loss.backward()
        assert (D_OUT * D_IN in sizes.seen) == forms


def test_sampled_rows_are_all_that_the_block_rotates_and_keeps() -> None:
    model = build().float()
    methods = (
        lt.SparseGrad(sites="up", selection="block", num_entries=24),
        lt.WTACRS(sites="up", keep_ratio=0.5, min_rows=1),
    )
    session = lt.apply(model, *methods)
    session.calibrate([rows(s).float() for s in (100, 101)])
    layer = layer_of(session)
    x = rows(1, 64).float()
    book = lt.ledger(model, (x,))
    kept = [e for e in book.entries if e.ledger == "activations" and e.module == "up"]
    assert sum(e.num_bytes for e in kept) == 32 * (layer.block[1] * 4 + 4 + 4)
    with session.exact():
        model(x).backward()
    wanted = layer.module.trained.grad.clone()
    draws = []
    for _ in range(200):
        model.zero_grad()
        model(x).backward()
        draws.append(layer.module.trained.grad.flatten().numpy().copy())
    samples = np.stack(draws)
    assert samples.std(0).max() > 0
    assert mean_check(samples, wanted.flatten().numpy(), resolution=1e-5).ok
    assert not mean_check(samples * 1.1, wanted.flatten().numpy(), resolution=1e-5).ok


# Calibration


def test_calibration_leaves_no_trace_and_sees_only_what_it_was_told() -> None:
    model = build()
    model.first = nn.Sequential(model.first, nn.Dropout(0.3))
    session = lt.apply(model, lt.SparseGrad(sites="up", num_calibration_steps=2))
    model.eval()
    marked = torch.ones_like(model.first[0].weight)
    model.first[0].weight.grad = marked
    values = {n: v.clone() for n, v in model.state_dict().items()}
    stream = torch.get_rng_state()
    served: list[int] = []

    def batches() -> Iterator[Tensor]:
        for seed in range(5):
            served.append(seed)
            yield rows(seed)

    session.calibrate(batches())
    assert served == [0, 1]
    assert torch.equal(torch.get_rng_state(), stream) and session.draw == 0 and not model.training
    assert model.first[0].weight.grad is marked and bool((marked == 1).all())
    assert model.up.trained.grad is None
    assert all(torch.equal(v, values[n]) for n, v in model.state_dict().items())


@pytest.mark.parametrize("conv", [False, True])
@pytest.mark.parametrize("selection", SELECTIONS)
def test_training_during_calibration_is_plain_training(
    selection: str, conv: bool, tmp_path
) -> None:
    """The released habit: whole-model AdamW on the batches shown, which a saved session keeps."""
    plain = build(conv=conv)
    optimizer = torch.optim.AdamW(plain.parameters(), lr=0.05, weight_decay=0.0)
    for seed in (100, 101, 102):
        optimizer.zero_grad()
        plain(rows(seed)).backward()
        optimizer.step()
    model = build(conv=conv)
    session = convert(model, selection=selection, calibration_learning_rate=0.05)
    torch.testing.assert_close(dense_weight(model), dense_weight(plain))
    torch.testing.assert_close(model.first.weight, plain.first.weight)
    torch.testing.assert_close(model(rows(1)), plain(rows(1)))
    assert not torch.allclose(model.first.weight, build(conv=conv).first.weight)
    assert all(p.grad is None for p in model.parameters())

    optimizer = session.optimizer(torch.optim.AdamW, lr=0.05)
    model(rows(2)).backward()
    optimizer.step()
    session.save(tmp_path / "saved")
    other = build(conv=conv)
    lt.load(other, tmp_path / "saved")
    torch.testing.assert_close(dense_weight(other), dense_weight(model))
    # As a trainer resumes, the model's own file first: what it holds is not taken back.
    again = lt.apply(build(seed=1, conv=conv), *session.methods)
    again.model.load_state_dict(model.state_dict())
    again.load_state_dict(session.state_dict())
    assert torch.equal(dense_weight(again.model), dense_weight(model))


def test_bases_and_mask_come_from_the_mean_over_batches_and_layers() -> None:
    """Shared by type: the grams of both layers are one sum; the masks are each one's own."""
    for basis in ("layer_type", "layer"):
        model = MODELS["bert"].build()
        batches = [MODELS["bert"].batch(seed) for seed in (90, 91)]
        names = [f"bert.encoder.layer.{i}.intermediate.dense" for i in (0, 1)]
        grads = {n: [] for n in names}
        for batch in batches:
            model.zero_grad()
            model(**batch).loss.backward()
            for n in names:
                grads[n].append(model.get_submodule(n).weight.grad.double().numpy().copy())
        model.zero_grad()
        session = lt.apply(model, lt.SparseGrad(density=0.1, basis=basis))
        session.calibrate(batches)
        layers = {n.name: n for n in (layer_of(session, i) for i in range(4))}
        assert (layers[names[0]].bases is layers[names[1]].bases) == (basis == "layer_type")
        for name in names:
            stack = grads[name] if basis == "layer" else grads[names[0]] + grads[names[1]]
            q_out, q_in = oracle.unfolding_bases(np.stack(stack))
            got = layers[name].bases
            for q, u in ((got.q_out, q_out), (got.q_in, q_in)):
                lead = q[:, :1].double().numpy()
                np.testing.assert_allclose(lead @ lead.T, u[:, :1] @ u[:, :1].T, atol=1e-4)
            both = got.q_out.double().numpy(), got.q_in.double().numpy()
            moment = sum(oracle.rotate(g, *both) ** 2 for g in grads[name])
            assert layers[name].indices.tolist() == oracle.top_entries(moment, 51)


def test_calibrating_again_keeps_the_bases() -> None:
    model = build()
    session = convert(model)
    before = layer_of(session).bases
    session.calibrate([rows(7)])
    assert layer_of(session).bases is before


def test_training_without_calibration_says_what_to_do() -> None:
    for selection in SELECTIONS:
        model = build()
        lt.apply(model, lt.SparseGrad(sites="up", selection=selection))
        with pytest.raises(ConfigError, match=r"bases must be calibrated.*session\.calibrate\("):
            model(rows(1))
        model.eval()
        assert torch.isfinite(model(rows(1)))


class Two(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(D_IN, D_OUT), nn.Linear(D_OUT, D_IN)

    def forward(self, x: Tensor, scale: float = 1.0) -> Tensor:
        return self.up(x).sum() * scale + 0 * self.down(self.up(x)).sum()


@pytest.mark.parametrize(
    ("batches", "message"),
    [
        ([], "calibration must see at least one batch, got none"),
        ([(torch.randn(2, D_IN),)], "gradient of down must be finite and not zero.*got zero in ev"),
        ([(torch.full((2, D_IN), float("nan")),)], "gradient of up must be finite.*entry of nan"),
    ],
)
def test_bad_calibration_is_named(batches, message: str) -> None:
    model = Two()
    session = lt.apply(model, lt.SparseGrad(sites=["up", "down"], density=0.1))
    with pytest.raises(ConfigError, match=message):
        session.calibrate(iter(batches))
    assert all(p.grad is None for p in model.parameters())


# State


@contextmanager
def trained(selection: str, **options) -> Iterator[tuple[One, lt.Session, torch.optim.Optimizer]]:
    model = build()
    session = convert(model, selection=selection, refresh_steps=2, **options)
    optimizer = session.optimizer(torch.optim.AdamW, lr=0.05)
    for seed in range(5):
        optimizer.zero_grad()
        model(rows(seed)).backward()
        optimizer.step()
        session.on_step()
    optimizer.zero_grad()
    yield model, session, optimizer


@pytest.mark.parametrize("outliers", [0, 5])
@pytest.mark.parametrize("selection", SELECTIONS)
def test_loading_onto_the_base_model_restores_the_weights(
    selection: str, outliers: int, tmp_path
) -> None:
    options = {"num_outliers": outliers} if selection == "block" else {}
    with trained(selection, **options) as (model, session, _):
        session.save(tmp_path / "saved")
        other = build()
        back = lt.load(other, tmp_path / "saved")
        torch.testing.assert_close(dense_weight(other), dense_weight(model))
        assert not torch.allclose(dense_weight(build()), dense_weight(model))
        for m in (model, other):
            m(rows(9)).backward()
        got, wanted = (m.up.trained.grad.to_dense() for m in (other, model))
        torch.testing.assert_close(got, wanted)
        assert layer_of(back).num_refreshes == (2 if selection == "refreshed" else 0)


@pytest.mark.parametrize("selection", SELECTIONS)
def test_a_resumed_run_goes_on_to_the_bit(selection: str) -> None:
    """As a trainer resumes: model state, optimiser state, session state, in that order."""
    with trained(selection) as (model, session, optimizer):
        files = copy.deepcopy((model.state_dict(), optimizer.state_dict(), session.state_dict()))
        other = build(seed=1)
        again = lt.apply(other, *session.methods)
        resumed = again.optimizer(torch.optim.AdamW, lr=0.05)
        other.load_state_dict(files[0])
        resumed.load_state_dict(files[1])
        again.load_state_dict(files[2])
        for seed in range(5, 9):
            for m, o, s in ((model, optimizer, session), (other, resumed, again)):
                o.zero_grad()
                m(rows(seed)).backward()
                o.step()
                s.on_step()
        for (name, a), b in zip(
            model.state_dict().items(), other.state_dict().values(), strict=True
        ):
            assert torch.equal(a, b), name


def test_a_shared_basis_is_saved_once(tmp_path) -> None:
    model = MODELS["bert"].build()
    session = lt.apply(model, lt.SparseGrad(density=0.1))
    session.calibrate([MODELS["bert"].batch(0)])
    bases = [k for k in session.state_dict() if k.endswith((":q_out", ":q_in"))]
    assert len(bases) == 4  # of two types


def test_a_measurement_between_step_and_forward_changes_nothing() -> None:
    """What is put back after a measurement must not undo what the dense weight has taken."""
    runs = []
    for measures in (False, True):
        with trained("fixed") as (model, _, optimizer):
            for seed in range(3):
                optimizer.zero_grad()
                model(rows(seed)).backward()
                optimizer.step()
                if measures:
                    lt.ledger(model, (rows(seed),))
            runs.append(dense_weight(model))
    assert torch.equal(*runs)


def test_state_of_another_model_is_refused() -> None:
    state = convert(build()).state_dict()
    model = MODELS["bert"].build()
    session = lt.apply(model, lt.SparseGrad(density=0.1))
    with pytest.raises(ConfigError, match="state must belong to this recipe"):
        session.load_state_dict(state)
    other = lt.apply(build(), lt.SparseGrad(sites="up", num_entries=5))
    with pytest.raises(ConfigError, match=r"got 38 entries for the 5 of up; load it onto"):
        other.load_state_dict(state)
    for key, value, message in (
        ("sparse_grad.up/up:q_in", torch.eye(3), r"shape \(3, 3\) for 16 features of up"),
        ("sparse_grad.up/up:q_in", torch.full((D_IN, D_IN), torch.nan), "NaN or infinite"),
    ):
        fresh = lt.apply(build(), lt.SparseGrad(sites="up", density=0.1))
        with pytest.raises(ConfigError, match=message):
            fresh.load_state_dict(state | {key: value})


def test_an_optimizer_saved_with_another_mask_is_refused() -> None:
    with trained("fixed") as (_, _, optimizer):
        saved = copy.deepcopy(optimizer.state_dict())
    model = build()
    session = lt.apply(model, lt.SparseGrad(sites="up", density=0.1))
    session.calibrate([rows(5) * torch.linspace(3, 0.1, D_IN)])
    resumed = session.optimizer(torch.optim.AdamW, lr=0.05)
    resumed.load_state_dict(saved)
    with pytest.raises(ConfigError, match=r"mask must be the one that the optimiser's state"):
        model(rows(1))
    same = build()
    session = convert(same, refresh_steps=2)
    resumed = session.optimizer(torch.optim.AdamW, lr=0.05)
    resumed.load_state_dict(saved)
    same(rows(1))


# Refreshing


def test_a_refresh_keeps_survivors_with_their_moments_and_the_weight() -> None:
    model = build()
    session = convert(model, selection="refreshed", refresh_steps=2, refresh_ratio=0.5)
    optimizer = session.optimizer(torch.optim.AdamW, lr=0.05)
    layer = layer_of(session)
    for seed in range(2):
        optimizer.zero_grad()
        model(rows(seed)).backward()
        optimizer.step()
        if seed == 0:
            session.on_step()
    old = layer.indices.tolist()
    moments = {n: dict(zip(old, t.tolist(), strict=True)) for n, t in snapshot(layer, optimizer)}
    weight = dense_weight(model)
    scores = layer.scores.clone()
    session.on_step()
    new = layer.indices.tolist()
    assert torch.equal(dense_weight(model), weight)
    expected = oracle.refresh(
        old, np.array([moments["exp_avg"][p] for p in old]), scores.numpy(), len(old) // 2
    )
    assert new == list(expected) and new != old
    for name, tensor in snapshot(layer, optimizer):
        assert tensor.tolist() == [moments[name].get(p, 0.0) if p in old else 0.0 for p in new]
    dropped = sorted(set(old) - set(new))
    assert layer.history[0].tolist() == dropped
    assert layer.history[1].tolist() == [moments["trained"][p] for p in dropped]


def snapshot(layer: Layer, optimizer: torch.optim.Optimizer) -> list[tuple[str, Tensor]]:
    state = optimizer.state[layer.module.trained]
    named = {"trained": layer.module.trained.detach(), **state}
    return [(n, named[n].clone()) for n in ("trained", "exp_avg", "exp_avg_sq")]


def test_scores_are_collected_in_the_step_before_a_refresh_alone() -> None:
    model = build()
    session = convert(model, selection="refreshed", refresh_steps=3)
    layer = layer_of(session)
    seen = []
    for seed in range(6):
        model(rows(seed)).backward()
        seen.append(layer.scores is not None)
        session.on_step()
    assert seen == [False, False, True, False, False, True] and layer.num_refreshes == 2
    # Without an optimiser that is known, what was trained itself says what matters least.
    assert layer.scores is None


# Beside others


@pytest.mark.parametrize("first", ["lora", "sparse"])
def test_lora_on_attention_beside_it_in_either_order(first: str) -> None:
    model = MODELS["bert"].build()
    methods = [lt.LoRA(rank=2, sites=["query", "value"]), lt.SparseGrad(density=0.1)]
    session = lt.apply(model, *(methods if first == "lora" else methods[::-1]))
    session.calibrate([MODELS["bert"].batch(0)])
    model(**MODELS["bert"].batch(1)).loss.backward()
    named = [n for n, p in model.named_parameters() if p.grad is not None]
    assert sum(n.endswith(".trained") for n in named) == 4
    assert sum("lora_" in n for n in named) == 8
    session.remove()
    assert all(p.requires_grad for p in model.parameters())
    assert list(dict(model.named_modules())) == list(dict(MODELS["bert"].build().named_modules()))


@pytest.mark.parametrize("selection", SELECTIONS)
def test_everything_else_trains_as_before(selection: str) -> None:
    model = MODELS["bert"].build()
    model.bert.pooler.requires_grad_(False)
    session = lt.apply(model, lt.SparseGrad(density=0.1, selection=selection))
    session.calibrate([MODELS["bert"].batch(0)])
    model(**MODELS["bert"].batch(1)).loss.backward()
    for name, parameter in model.named_parameters():
        is_mlp = ".dense." in name and "attention" not in name and "pooler" not in name
        is_frozen = "pooler" in name or name.endswith((".applied", ".refreshes"))
        wanted = not is_frozen and not (is_mlp and name.endswith("weight"))
        assert (parameter.grad is not None) == wanted, name
    assert model.bert.encoder.layer[0].output.LayerNorm.weight.grad.abs().sum() > 0


def test_tied_weights_are_refused() -> None:
    model = Two()
    model.other = nn.Linear(D_IN, D_OUT)
    model.other.weight = model.up.weight
    with pytest.raises(SiteError, match=r"must not be tied, got up\.weight = other\.weight"):
        lt.apply(model, lt.SparseGrad(sites="up"))
    assert type(model.up) is nn.Linear and model.up.weight.requires_grad


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_entries": 500}, r"up: num_entries must be at most 384, got 500"),
        (
            {"num_entries": 5, "num_outliers": 5, "selection": "block"},
            "num_outliers must be below the 5 entries that train, got 5",
        ),
    ],
)
def test_more_entries_than_there_are_is_refused(options, message: str) -> None:
    with pytest.raises(SiteError, match=message):
        lt.apply(build(), lt.SparseGrad(sites="up", **options))
    with pytest.raises(ConfigError, match="num_outliers must be 0 unless selection is 'block'"):
        lt.SparseGrad(num_outliers=3)


def test_a_dense_optimizer_for_sparse_gradients_is_told_what_to_use() -> None:
    model = build()
    session = convert(model, selection="step")
    by_hand = torch.optim.Adam([p for p in model.parameters() if p.requires_grad])
    with pytest.raises(ConfigError, match=r"session\.optimizer\(torch\.optim\.Adam, lr="):
        session.watch_optimizer(by_hand)
    model(rows(1)).backward()
    with pytest.raises(RuntimeError, match="does not support sparse gradients"):
        by_hand.step()
    for correction in ("global", "per_entry"):
        other = build()
        session = convert(other, selection="step", bias_correction=correction)
        optimizer = session.optimizer(torch.optim.AdamW, lr=0.1)
        other(rows(1)).backward()
        before = other.up.trained.detach().clone()
        optimizer.step()
        assert int((other.up.trained != before).sum()) == 38


def test_moving_and_casting_carries_the_bases_along() -> None:
    for selection in DENSE:
        model = build()
        session = convert(model, selection=selection)
        model.float()
        model(rows(1).float()).backward()
        assert model.up.trained.grad.dtype == torch.float32
        session.remove()
        assert model.up.weight.dtype == torch.float32
