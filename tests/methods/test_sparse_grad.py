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
from transformers.pytorch_utils import Conv1D

import leantune as lt
from leantune.errors import ConfigError, SiteError
from leantune.methods.sparse_grad.conversion import SparseGradConversion
from leantune.methods.sparse_grad.subspace import SubspaceRule

# torch's own warning about its own sparse tensors.
pytestmark = pytest.mark.filterwarnings("ignore:Sparse invariant checks:UserWarning")

D_OUT, D_IN, NUM_ROWS = 24, 16, 10
SELECTIONS = ["block", "step"]


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


def conversion_of(session: lt.Session) -> SparseGradConversion:
    (conversion,) = (c for c in session.conversions if isinstance(c, SparseGradConversion))
    return conversion


def rule_of(session: lt.Session, at: int = 0) -> SubspaceRule:
    return conversion_of(session).rules[at]


def dense_weight(model: One) -> Tensor:
    """The weight that the linear computes with, (d_out, d_in)."""
    weight = model.state_dict()["up.weight"].clone()
    weight = weight.t() if weight.shape[0] == D_IN else weight
    rule = getattr(model.up, "subspace", None)
    return weight if rule is None else rule.effective(weight, rule.parameter.detach())


def entries(rule: SubspaceRule) -> list[int]:
    """All positions of the block."""
    return list(range(rule.parameter.numel()))


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
    rule = rule_of(convert(model, selection=selection, density=1.0))
    loss = model(x)
    assert abs(float(loss.detach() - plain)) < 1e-11 * float(plain)
    loss.backward()
    wanted = dense_gradient(conv, x)
    q_out, q_in = rule.bases.q_out, rule.bases.q_in
    grad = rule.parameter.grad.to_dense().view(D_OUT, D_IN)
    torch.testing.assert_close(q_out @ grad @ q_in.t(), wanted["up.weight"], rtol=1e-9, atol=1e-11)
    assert not torch.allclose(q_out @ grad @ q_in, wanted["up.weight"]), "the transposed basis"
    for name in ("first.weight", "first.bias", "up.bias"):
        torch.testing.assert_close(model.get_parameter(name).grad, wanted[name])
    # The released code rotates the bias's gradient: that must not pass.
    assert not torch.allclose(q_out.t() @ model.up.bias.grad, wanted["up.bias"])


@pytest.mark.parametrize("selection", SELECTIONS)
@pytest.mark.parametrize("shape", [(), (3,), (2, 3), (2, 1, 3)])
def test_any_number_of_leading_dimensions(selection: str, shape: tuple[int, ...]) -> None:
    model = build(bias=False)
    rule = rule_of(convert(model, selection=selection))
    x = rows(1, *shape) if shape else rows(1, 1)[0]
    model(x).backward()
    one_by_one = build(bias=False)
    other = rule_of(convert(one_by_one, selection=selection, density=1.0 if not shape else 0.1))
    flat = x.reshape(-1, D_IN)
    one_by_one(flat).backward()
    if shape:
        got, wanted = (n.parameter.grad.to_dense() for n in (rule, other))
        torch.testing.assert_close(got, wanted)
    assert model.up.bias is None


def test_entries_of_the_block_are_the_oracles() -> None:
    model = build()
    session = convert(model)
    rule, x = rule_of(session), rows(1)
    model(x).backward()
    y = (x @ model.first.weight.t() + model.first.bias).detach()
    grad_output = 2 * WEIGHTS * (y @ model.up.weight.t() + model.up.bias).detach()
    q_out, q_in = rule.bases.q_out.numpy(), rule.bases.q_in.numpy()
    wanted = oracle.selected_gradient(y.numpy(), grad_output.numpy(), q_out, q_in, entries(rule))
    got = rule.parameter.grad.flatten().numpy()
    assert got.shape == (6 * 6,)
    assert np.linalg.norm(got - wanted) < 1e-12 * np.linalg.norm(wanted)
    assert np.linalg.norm(got * 1.01 - wanted) > 1e-12 * np.linalg.norm(wanted)


def test_each_step_sends_exactly_the_largest_entries() -> None:
    model = build()
    rule = rule_of(convert(model, selection="step", density=7 / 384))
    x = rows(1)
    model(x).backward()
    assert rule.parameter.grad.is_sparse and rule.parameter.grad._nnz() == 7
    grad = rule.parameter.grad.coalesce()
    dense = dense_gradient(False, x)["up.weight"]
    rotated = oracle.rotate(dense.numpy(), rule.bases.q_out.numpy(), rule.bases.q_in.numpy())
    kept = oracle.top_entries(rotated, 7)
    at = grad.indices()
    assert (at[0] * D_IN + at[1]).tolist() == kept
    np.testing.assert_allclose(grad.values().numpy(), rotated.reshape(-1)[kept], rtol=1e-9)


def test_micro_batches_add_up() -> None:
    model = build()
    rule = rule_of(convert(model))
    model(rows(1, 6)).backward()
    whole = rule.parameter.grad.clone()
    model.zero_grad()
    for half in rows(1, 6).split(3):
        model(half).backward()
    torch.testing.assert_close(rule.parameter.grad, whole)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_errs_no_more_than_the_plain_linear(dtype: torch.dtype) -> None:
    model = build()
    rule = rule_of(convert(model))
    model.float()
    x = rows(1).float()
    exact = build()
    q_out, q_in = (q.double() for q in (rule.bases.q_out, rule.bases.q_in))
    plain = build().float()
    with torch.autocast("cpu", dtype=dtype):
        losses = [m(x) for m in (model, plain)]
    for loss in losses:
        loss.backward()
    exact(x.double()).backward()

    def picked(dense: Tensor) -> Tensor:
        return (q_out.t() @ dense.double() @ q_in).flatten()

    wanted = picked(exact.up.weight.grad)
    got = rule.parameter.grad.flatten()
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


def test_a_step_moves_the_weight_along_the_blocks_entries_alone() -> None:
    model = build()
    rule = rule_of(session := convert(model))
    before = dense_weight(model)
    optimizer = session.optimizer(torch.optim.SGD, lr=0.1)
    model(rows(1)).backward()
    values = rule.parameter.grad.flatten().numpy().copy()
    optimizer.step()
    q_out, q_in = rule.bases.q_out.numpy(), rule.bases.q_in.numpy()
    change = oracle.rotate_back(entries(rule), -0.1 * values, q_out, q_in)
    torch.testing.assert_close(dense_weight(model) - before, torch.from_numpy(change))
    wrong = oracle.rotate_back(entries(rule), -0.1 * values, q_out, q_in[::-1])
    assert not np.allclose((dense_weight(model) - before).numpy(), wrong)


@pytest.mark.parametrize("fused", [False, True])
def test_the_next_forward_sees_every_optimizers_step(fused: bool) -> None:
    model = build()
    session = convert(model)
    model.float()
    optimizer = session.optimizer(torch.optim.AdamW, lr=0.1, fused=fused)
    x = rows(1).float()
    losses = []
    for _ in range(3):
        optimizer.zero_grad()
        loss = model(x)
        loss.backward()
        losses.append(loss.item())
        optimizer.step()
    assert losses[2] < losses[1] < losses[0]
    merged = dense_weight(model)
    session.merge()
    assert type(model.up) is nn.Linear and torch.equal(model.up.weight, merged)


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


@pytest.mark.parametrize("conv", [False, True])
def test_steps_too_small_for_a_half_precision_weight_add_up(conv: bool) -> None:
    """The weight is that before training plus all of the kept change, rounded once."""
    model = build(conv=conv).bfloat16()
    before = dense_weight(model).clone()
    session = lt.apply(model, lt.SparseGrad(sites="up", density=0.5))
    session.calibrate([rows(s).bfloat16() for s in (100, 101)])
    rule = rule_of(session)
    step = torch.linspace(-1e-5, 1e-5, rule.parameter.numel()).view_as(rule.parameter)
    for _ in range(2000):
        with torch.no_grad():
            rule.parameter.add_(step)
    model(rows(1).bfloat16()).backward()
    q_out, q_in = rule.bases.q_out.double(), rule.bases.q_in.double()
    assert rule.parameter.grad.dtype == torch.float32
    exact = before.double() + q_out @ rule.parameter.detach().double() @ q_in.t()
    half_a_unit = torch.exp2(exact.abs().log2().floor()) * 2**-8
    # The change itself is formed in the weight's dtype: a few 256ths of it.
    bound = half_a_unit + 2**-6 * (exact - before.double()).abs().amax()
    got = dense_weight(model)
    assert ((got.double() - exact).abs() <= bound).all()
    summed = before.clone()
    for _ in range(2000):
        summed += ((exact - before.double()) / 2000).bfloat16()
    assert ((summed.double() - exact).abs() > bound).any(), "the control: a sum of roundings"
    session.merge()
    assert torch.equal(dense_weight(model), got)


# Bytes and launches


class Launches(TorchDispatchMode):
    """Counts operations, but for views and what only allocates."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        is_view = any(r.alias_info is not None for r in func._schema.returns)
        is_write = any(a.alias_info and a.alias_info.is_write for a in func._schema.arguments)
        if (is_write or not is_view) and not name.startswith(("empty", "new_empty", "detach")):
            self.names.append(name)
        return result


@pytest.mark.parametrize(("dtype", "most"), [(torch.float32, 10), (torch.bfloat16, 13)])
def test_a_step_of_one_linear_launches_few_operations(dtype: torch.dtype, most: int) -> None:
    """Three products and a sum of the plain linear, three of the block, two of each weight.

    In half precision the entries are cast for each weight, and their gradient is cast back.
    """
    model = nn.Sequential(nn.Linear(64, 256)).to(dtype)
    session = lt.apply(model, lt.SparseGrad(sites="0", density=0.1))
    x = torch.randn(32, 64, generator=torch.Generator().manual_seed(0)).to(dtype)
    session.calibrate([(x,)])
    x.requires_grad_()
    model(x).sum().backward()  # the bases are cast here, for good
    with Launches() as step:
        y = model(x)
    grad = torch.ones_like(y)
    with step:
        y.backward(grad)
    counted = [n for n in step.names if n not in ("add_", "add")]  # gradients add up in place
    assert len(counted) == most, counted
    (rule,) = conversion_of(session).rules
    assert rule.bases.q_out.dtype == rule.bases.q_in.dtype == dtype


class Sizes(TorchDispatchMode):
    """Records how many elements the results of plain matrix products have."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[int] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if func is torch.ops.aten.mm.default:
            self.seen.add(result.numel())
        return result


def test_gradients_of_each_step_have_the_size_of_the_entries_and_its_state_has_not() -> None:
    k = 38
    model = build()
    session = convert(model, selection="step", density=k / 384)
    optimizer = session.optimizer(torch.optim.AdamW, lr=0.1)
    model(rows(1)).backward()
    optimizer.step()
    book = lt.ledger(model, (rows(2),), optimizer=optimizer)
    of_weight = [e for e in book.entries if e.module == "up" and e.shape != (D_OUT,)]

    def total(name: str) -> int:
        return sum(e.num_bytes for e in of_weight if e.ledger == name)

    assert total("gradients") == (16 + 8) * k
    state = 2 * 8 * D_OUT * D_IN
    assert total("optimizer") in (state, state + 4)  # the bias's step counter has its shape


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_block_costs_its_entries_and_thin_bases(dtype: torch.dtype) -> None:
    model = nn.Sequential(nn.Linear(64, 256)).to(dtype)
    names = {n for n, _ in model.named_parameters()}
    session = lt.apply(model, lt.SparseGrad(sites="0", density=0.1))
    x = torch.randn(32, 64, generator=torch.Generator().manual_seed(0)).to(dtype)
    session.calibrate([(x,)])
    optimizer = session.optimizer(torch.optim.AdamW, lr=0.1)
    model(x).sum().backward()
    optimizer.step()
    (rule,) = conversion_of(session).rules
    assert rule.num_vectors == (32, 48)
    new = [p for n, p in model.named_parameters() if n not in names]
    assert [p.nbytes for p in new] == [p.grad.nbytes for p in new] == [4 * 32 * 48]
    state = optimizer.state[rule.parameter]
    assert sum(t.nbytes for t in state.values()) == 4 + 2 * 4 * 32 * 48
    bases = [v for k, v in session.state_dict().items() if k.endswith((":q_out", ":q_in"))]
    assert sorted(t.nbytes for t in bases) == [2 * 64 * 48, 2 * 256 * 32]
    held = rule.bases.q_out.nbytes + rule.bases.q_in.nbytes
    assert held == dtype.itemsize * (64 * 48 + 256 * 32)


def test_a_share_that_leaves_nothing_of_a_layer_is_refused() -> None:
    with pytest.raises(
        SiteError,
        match=r"up: density must leave at least one entry of a 24 x 16 .*got 0\.001; ",
    ):
        lt.apply(build(), lt.SparseGrad(sites="up", density=0.001))
    lt.apply(build(), lt.SparseGrad(sites="up", density=0.002))


def test_the_block_keeps_only_its_own_features_and_never_forms_the_gradient() -> None:
    model = build()
    rule = rule_of(convert(model, selection="block", density=1 / 16))
    r_out, r_in = rule.num_vectors
    assert (r_out, r_in) == (4, 6)
    book = lt.ledger(model, (rows(1),))
    kept = [e for e in book.entries if e.ledger == "activations" and e.module == "up"]
    assert sorted(e.num_bytes for e in kept) == [NUM_ROWS * r_in * 8]
    for options, forms in (
        ({"density": 1 / 16}, False),
        ({"selection": "step"}, True),
    ):
        other = build()
        convert(other, **options)
        loss = other(rows(1, 400))
        with Sizes() as sizes:
            loss.backward()
        # The weight itself comes from an ``addmm``.
        assert (D_OUT * D_IN in sizes.seen) == forms


def test_rows_are_projected_then_sampled_and_nothing_else_is_kept(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = build().float()
    methods = (
        lt.SparseGrad(sites="up", selection="block", density=1 / 16),
        lt.WTACRS(sites="up", keep_ratio=0.5, min_rows=1),
    )
    session = lt.apply(model, *methods)
    session.calibrate([rows(s).float() for s in (100, 101)])
    rule = rule_of(session)
    x = rows(1, 64).float()
    book = lt.ledger(model, (x,))
    kept = [e for e in book.entries if e.ledger == "activations" and e.module == "up"]
    assert sum(e.num_bytes for e in kept) == 32 * (rule.num_vectors[1] * 4 + 4 + 4)
    widths: list[int] = []
    policy = type(model.up.rows)
    keep = policy.keep
    monkeypatch.setattr(
        policy, "keep", lambda self, x, *rest: widths.append(x.shape[-1]) or keep(self, x, *rest)
    )
    model(x)
    assert widths == [rule.num_vectors[1]]
    with session.exact():
        model(x).backward()
    wanted = rule.parameter.grad.clone()
    draws = []
    for _ in range(200):
        model.zero_grad()
        model(x).backward()
        draws.append(rule.parameter.grad.flatten().numpy().copy())
    samples = np.stack(draws)
    assert samples.std(0).max() > 0
    assert mean_check(samples, wanted.flatten().numpy(), resolution=1e-5).ok
    assert not mean_check(samples * 1.1, wanted.flatten().numpy(), resolution=1e-5).ok


# Calibration


def test_calibration_leaves_no_trace_and_sees_only_what_it_was_told() -> None:
    model = build()
    model.first = nn.Sequential(model.first, nn.Dropout(0.3))
    session = lt.apply(model, lt.SparseGrad(sites="up", num_calibration_batches=2))
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
    assert torch.equal(torch.get_rng_state(), stream) and not model.training
    assert int(session.state_dict()["counter"]) == 0
    assert model.first[0].weight.grad is marked and bool((marked == 1).all())
    assert rule_of(session).parameter.grad is None
    assert all(torch.equal(v, values[n]) for n, v in model.state_dict().items())


def test_bases_come_from_the_sum_over_batches_and_layers() -> None:
    """Shared by type: the grams of both layers are one sum."""
    model = MODELS["bert"].build()
    batches = [MODELS["bert"].batch(seed) for seed in (90, 91)]
    names = [f"bert.encoder.layer.{i}.intermediate.dense" for i in (0, 1)]
    grads = []
    for batch in batches:
        model.zero_grad()
        model(**batch).loss.backward()
        for n in names:
            grads.append(model.get_submodule(n).weight.grad.double().numpy().copy())
    model.zero_grad()
    session = lt.apply(model, lt.SparseGrad(selection="step", density=0.1))
    session.calibrate(batches)
    rules = {n.name: n for n in (rule_of(session, i) for i in range(4))}
    got = rules[names[0]].bases
    assert got is rules[names[1]].bases
    q_out, q_in = oracle.unfolding_bases(np.stack(grads))
    for q, u in ((got.q_out, q_out), (got.q_in, q_in)):
        lead = q[:, :1].double().numpy()
        np.testing.assert_allclose(lead @ lead.T, u[:, :1] @ u[:, :1].T, atol=1e-4)


def test_calibrating_again_keeps_the_bases() -> None:
    model = build()
    session = convert(model)
    before = rule_of(session).bases
    session.calibrate([rows(7)])
    assert rule_of(session).bases is before


def test_two_configs_are_two_conversions(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each calibrates on its own linears once, while the other stands by, and each steps once."""
    methods = [lt.SparseGrad(sites=s, density=0.1, selection=k) for s, k in CONFIGS.items()]
    batches = [(torch.randn(4, D_IN),) for _ in range(2)]
    model = Two(weight=1.0)
    session = lt.apply(model, *methods)
    first, second = (c for c in session.conversions if isinstance(c, SparseGradConversion))
    shown: list[str] = []
    steps: list[tuple[str, int]] = []
    find, step = SparseGradConversion._find_bases, SparseGradConversion.on_step

    def counted_find(self: SparseGradConversion, batches: list) -> dict:
        shown.append(self.rules[0].name)
        (other,) = (c for c in (first, second) if c is not self)
        was_calibrated = other.is_calibrated
        found = find(self, batches)
        assert other.is_calibrated == was_calibrated
        return found

    def counted_step(self: SparseGradConversion, number: int) -> None:
        steps.append((self.rules[0].name, number))
        step(self, number)

    monkeypatch.setattr(SparseGradConversion, "_find_bases", counted_find)
    monkeypatch.setattr(SparseGradConversion, "on_step", counted_step)
    session.calibrate(batches)
    assert shown == ["up", "down"]
    assert all(c.rules[0].collect is None for c in (first, second))
    session.optimizer(torch.optim.SGD, lr=0.1)
    model(*batches[0]).backward()
    session.on_step()
    assert steps == [("up", 1), ("down", 1)]


@pytest.mark.parametrize("name", ["up", "down"])
def test_a_second_config_does_not_change_what_the_first_one_finds(name: str) -> None:
    batches = [(torch.randn(4, D_IN),) for _ in range(2)]
    plain = Two(weight=1.0)
    found = []
    for sites in ([name], ["up", "down"]):
        methods = [lt.SparseGrad(sites=s, density=0.1, selection=CONFIGS[s]) for s in sites]
        session = lt.apply(copy.deepcopy(plain), *methods)
        session.calibrate(batches)
        rules = [rule for c in session.conversions for rule in c.rules]
        found.append(next(rule.bases.q_out for rule in rules if rule.name == name))
    assert torch.equal(*found)


CONFIGS = {"up": "block", "down": "step"}


def test_training_without_calibration_says_what_to_do() -> None:
    for selection in SELECTIONS:
        model = build()
        lt.apply(model, lt.SparseGrad(sites="up", selection=selection))
        with pytest.raises(ConfigError, match=r"bases must be calibrated.*session\.calibrate\("):
            model(rows(1))
        model.eval()
        assert torch.isfinite(model(rows(1)))


class Two(nn.Module):
    """Two linears, of which the second counts by ``weight``."""

    def __init__(self, weight: float = 0.0) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(D_IN, D_OUT), nn.Linear(D_OUT, D_IN)
        self.weight = weight

    def forward(self, x: Tensor) -> Tensor:
        return self.up(x).sum() + self.weight * self.down(self.up(x)).square().sum()


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
def trained(selection: str) -> Iterator[tuple[One, lt.Session, torch.optim.Optimizer]]:
    model = build()
    session = convert(model, selection=selection)
    optimizer = session.optimizer(torch.optim.AdamW, lr=0.05)
    for seed in range(5):
        optimizer.zero_grad()
        model(rows(seed)).backward()
        optimizer.step()
        session.on_step()
    optimizer.zero_grad()
    yield model, session, optimizer


@pytest.mark.parametrize("selection", SELECTIONS)
def test_loading_onto_the_base_model_restores_the_weights(selection: str, tmp_path) -> None:
    with trained(selection) as (model, session, _):
        session.save(tmp_path / "saved")
        other = build()
        again = lt.load(other, tmp_path / "saved")
        torch.testing.assert_close(dense_weight(other), dense_weight(model))
        assert not torch.allclose(dense_weight(build()), dense_weight(model))
        for m in (model, other):
            m(rows(9)).backward()
        got, wanted = (rule_of(s).parameter.grad.to_dense() for s in (again, session))
        torch.testing.assert_close(got, wanted)


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
        with trained("block") as (model, _, optimizer):
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
    with pytest.raises(ConfigError, match="state must belong to this model and recipe"):
        session.load_state_dict(state)
    key = "0.sparse_grad/linear (24, 16):q_in"
    for options, damage, message in (
        ({"density": 0.05}, {}, r"shape \(24, 6\) for the \(24, 3\) of linear.*; load it onto"),
        ({"selection": "step"}, {}, r"shape \(24, 6\) for the \(24, 24\) of linear"),
        ({}, {"0.sparse_grad/other:q_in": torch.eye(3)}, "other:q_in' on one side only"),
        ({}, {key: torch.eye(3)}, r"shape \(3, 3\) for the \(16, 6\) of linear"),
        ({}, {key: torch.full((D_IN, 6), torch.nan)}, "NaN or infinite entries"),
        ({}, {key: torch.zeros(D_IN, 6, dtype=torch.int32)}, "torch.int32 or NaN"),
    ):
        fresh = lt.apply(build(), lt.SparseGrad(**{"sites": "up", "density": 0.1, **options}))
        with pytest.raises(ConfigError, match=message):
            fresh.load_state_dict(state | damage)


# Beside others


@pytest.mark.parametrize("first", ["lora", "sparse"])
def test_lora_on_attention_beside_it_in_either_order(first: str) -> None:
    model = MODELS["bert"].build()
    methods = [
        lt.LoRA(rank=2, sites=["attention.query", "attention.value"]),
        lt.SparseGrad(density=0.1),
    ]
    session = lt.apply(model, *(methods if first == "lora" else methods[::-1]))
    session.calibrate([MODELS["bert"].batch(0)])
    model(**MODELS["bert"].batch(1)).loss.backward()
    named = [n for n, p in model.named_parameters() if p.grad is not None]
    assert sum(n.endswith(".delta") for n in named) == 4
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
        wanted = "pooler" not in name and not (is_mlp and name.endswith(".weight"))
        assert (parameter.grad is not None) == wanted, name
    assert model.bert.encoder.layer[0].output.LayerNorm.weight.grad.abs().sum() > 0


def test_tied_weights_are_refused() -> None:
    model = Two()
    model.other = nn.Linear(D_IN, D_OUT)
    model.other.weight = model.up.weight
    with pytest.raises(SiteError, match="up: weight must not be shared, got one that other has"):
        lt.apply(model, lt.SparseGrad(sites="up"))
    assert type(model.up) is nn.Linear and model.up.weight.requires_grad


def test_a_dense_optimizer_refuses_sparse_gradients_and_the_sessions_takes_them() -> None:
    model = build()
    session = convert(model, selection="step")
    by_hand = torch.optim.Adam([p for p in model.parameters() if p.requires_grad])
    model(rows(1)).backward()
    with pytest.raises(RuntimeError, match="does not support sparse gradients"):
        by_hand.step()
    before = rule_of(session).parameter.detach().clone()
    session.optimizer(torch.optim.AdamW, lr=0.1).step()
    assert int((rule_of(session).parameter != before).sum()) == 38


def test_moving_and_casting_carries_the_bases_along() -> None:
    model = build()
    session = convert(model)
    model.float()
    model(rows(1).float()).backward()
    assert rule_of(session).parameter.grad.dtype == torch.float32
    session.remove()
    assert model.up.weight.dtype == torch.float32
