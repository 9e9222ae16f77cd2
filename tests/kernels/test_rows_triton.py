"""Row kernels against their reference and their oracle.

They need a GPU. Elsewhere ``test_in_interpreter.py`` runs this file in Triton's interpreter, on the
CPU, in a process of its own.
"""

import os
from typing import Literal

import numpy as np
import pytest
import torch
from oracles import rows as oracle
from stats import mean_check
from torch import Tensor, nn

import leantune as lt
from leantune.errors import UnsupportedError
from leantune.ops import backend
from leantune.ops import rows as reference
from leantune.ops.backend import num_launches
from leantune.ops.random import RandomKey, uniform, words
from leantune.ops.rows import Estimator

kernels = pytest.importorskip("leantune.ops.rows_triton")

IS_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if IS_INTERPRETED else "cuda"
# The interpreter is numpy, which warns where a kernel makes infinities and NaN on purpose.
pytestmark = [
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),
    pytest.mark.filterwarnings("ignore:Conversion of an array:DeprecationWarning"),
]
if not IS_INTERPRETED:
    pytestmark.append(pytest.mark.gpu)

DTYPES = [torch.float16, torch.bfloat16, torch.float32]
SIZES = [1, 2, 3, 17, 1000]


def key(counter: int = 3, seed: int = -5, stream: int = 2**63 + 1) -> RandomKey:
    return RandomKey(seed, torch.tensor(counter, device=DEVICE), stream)


def word_of(a_key: RandomKey) -> int:
    return int(uniform(a_key, 1).item() * 2**24)


def scores_of(name: str, n: int) -> Tensor:
    """Return (n,) float32 scores: alike, without any mass, very skewed, or with few positive."""
    rng = np.random.default_rng(n)
    values = {
        "random": rng.random(n) + 0.05,
        "equal": np.full(n, 0.3),
        "zero": np.zeros(n),
        "skewed": np.exp(6 * rng.normal(size=n)),
        "powers": 2.0 ** -np.arange(n).clip(max=60),
        "few": np.where(np.arange(n) % 5 == 1, rng.random(n), 0.0),
        "tiny": rng.random(n) * 1e-30,
        "huge": rng.random(n) * 1e30,
        "denormal": rng.random(n) * 1e-40,
    }[name]
    return torch.from_numpy(values).float().to(DEVICE)


REPLACED: tuple[Estimator, ...] = ("wta", "crs", "topk")
EVERY: tuple[Estimator, ...] = ("systematic", *REPLACED)
NAMES = ["random", "equal", "zero", "skewed", "powers", "few", "tiny", "huge", "denormal"]


@pytest.mark.parametrize("n", SIZES)
@pytest.mark.parametrize("name", NAMES)
def test_a_sample_is_the_oracles_to_the_bit(name: str, n: int) -> None:
    for k in {1, (n + 2) // 3, n}:
        scores = scores_of(name, n)
        indices, weights = kernels.sample_rows(scores, k, key(n))
        expected = oracle.sample_rows(scores.cpu().numpy(), k, word_of(key(n)))
        assert indices.dtype == torch.int32
        assert indices.tolist() == expected[0]
        assert weights.tolist() == expected[1].tolist()


@pytest.mark.parametrize("n", SIZES)
@pytest.mark.parametrize("name", NAMES)
def test_the_papers_samples_are_the_oracles_to_the_bit(name: str, n: int) -> None:
    for estimator in REPLACED:
        for k in {1, (n + 2) // 3, n}:
            scores = scores_of(name, n)
            indices, weights = kernels.sample_rows(scores, k, key(n), estimator=estimator)
            known = scores.cpu().numpy(), k, words(key(n), k).tolist(), estimator
            expected = oracle.sample_replaced(*known)
            assert indices.dtype == torch.int32
            assert indices.tolist() == expected[0]
            assert weights.tolist() == expected[1].tolist()


def test_the_random_number_is_that_of_ops_random() -> None:
    scores = scores_of("random", 50)
    for seed, stream in [(0, 0), (-1, 2**64 - 1), (2**200, -(2**70)), (5, 2**31)]:
        for counter in (0, 1, 2**31, 2**32 - 1):
            a_key = key(counter, seed, stream)
            found = kernels.sample_rows(scores, 7, a_key)
            expected = oracle.sample_rows(scores.cpu().numpy(), 7, word_of(a_key))
            assert found[1].tolist() == expected[1].tolist()


@pytest.mark.parametrize("n", [4096 * 3 + 5, 16384 + 4096 + 5])
def test_blocks_of_scores_join(n: int) -> None:
    scores = scores_of("skewed", n)
    for estimator in EVERY:
        for k in (1, n // 10, n):
            expected = reference.sample_rows(scores, k, key(), estimator=estimator)
            found = kernels.sample_rows(scores, k, key(), estimator=estimator)
            torch.testing.assert_close(found, expected, rtol=0, atol=0)


def test_rows_count_once_in_expectation() -> None:
    scores, k, num_draws = scores_of("skewed", 17), 5, 120 if IS_INTERPRETED else 4000
    totals = np.zeros((num_draws, 17))
    unweighted = np.zeros((num_draws, 17))
    for draw in range(num_draws):
        indices, weights = kernels.sample_rows(scores, k, key(draw))
        np.add.at(totals[draw], indices.cpu().numpy(), weights.cpu().numpy())
        np.add.at(unweighted[draw], indices.cpu().numpy(), 1.0)
    # A row that is nearly never drawn has no spread that could be measured.
    mass = oracle.masses(scores.cpu().numpy())
    seen = np.array(oracle.chances(mass, oracle.threshold(mass, k))) > oracle.ONE // 20
    assert seen.sum() > k
    assert mean_check(totals[:, seen], np.ones(seen.sum()), resolution=1e-6).ok
    assert not mean_check(unweighted[:, seen], np.ones(seen.sum()), resolution=1e-6).ok


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("n", [1, 17, 5000])
def test_scores_that_are_not_finite_give_nan_weights(bad: float, n: int) -> None:
    scores = scores_of("random", n)
    scores[n // 2] = bad
    k = (n + 1) // 2
    for floor in (0.0, 0.1):
        for estimator in EVERY:
            found = kernels.sample_rows(scores, k, key(), floor=floor, estimator=estimator)
            assert found[1].isnan().all()
            assert ((found[0] >= 0) & (found[0] < n)).all()


@pytest.mark.parametrize("floor", [0.0, 0.25])
@pytest.mark.parametrize("n", SIZES)
def test_masks_and_floors_are_the_references(n: int, floor: float) -> None:
    scores = scores_of("few", n)
    real = torch.arange(n, device=DEVICE) % 3 != 2
    scores[~real] = float("nan")  # whatever stands there
    for mask in (real, torch.zeros_like(real)):
        for k in {1, (n + 1) // 2, n}:
            found = kernels.sample_rows(scores, k, key(), real=mask, floor=floor)
            expected = reference.sample_rows(scores, k, key(), real=mask, floor=floor)
            torch.testing.assert_close(found[0], expected[0], rtol=0, atol=0)
            torch.testing.assert_close(found[1], expected[1], rtol=1e-6, atol=0)
            assert mask[found[0][found[1] > 0].long()].all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("d", [1, 7, 33, 130])
@pytest.mark.parametrize("n", [1, 3, 17, 1030])
def test_norms_and_scores(n: int, d: int, dtype: torch.dtype) -> None:
    x = torch.randn(n, d, device=DEVICE).to(dtype)
    grad = torch.randn(n, 40, device=DEVICE).to(dtype)
    guess = torch.rand(1 if n == 1030 else n, device=DEVICE)
    norms = x.double().square().sum(1).sqrt()
    for found, expected in [
        (kernels.row_norms(x), norms),
        (kernels.score_rows(x, grad), norms * grad.double().square().sum(1).sqrt()),
        (kernels.score_rows(x, guess), norms * guess.double().repeat(n // len(guess))),
    ]:
        torch.testing.assert_close(found, expected.float(), rtol=1e-6, atol=0)
        wrong = expected.float() * (1 + 1e-5)
        assert not torch.allclose(found, wrong, rtol=1e-6, atol=0)


def test_rows_may_lie_apart_or_across() -> None:
    wide = torch.randn(60, 40, device=DEVICE)
    for x in (wide[::2, 3:20], wide.t(), wide[:1].expand(30, 40), wide[:, :1]):
        torch.testing.assert_close(kernels.row_norms(x), reference.row_norms(x))
        indices = torch.tensor([0, 2, len(x) - 1], device=DEVICE, dtype=torch.int32)
        weights = torch.tensor([1.0, 0.5, 3.0], device=DEVICE)
        picked = kernels.pick_rows(x, indices, weights, torch.float32)
        assert torch.equal(picked, x[indices.long()] * weights[:, None])


@pytest.mark.parametrize("n", [1, 100, 1100])
def test_a_draw_samples_by_its_scores(n: int) -> None:
    x = torch.randn(n, 33, device=DEVICE, dtype=torch.bfloat16)
    grad = torch.randn(n, 70, device=DEVICE)
    real = torch.arange(n, device=DEVICE) % 4 != 1
    k = max(n // 10, 1)
    for given in (None, grad, torch.rand(n // 2 or 1, device=DEVICE)):
        before = num_launches()
        found = kernels.draw_rows(x, k, key(), grad=given, real=real)
        assert num_launches() == before + 1
        expected = kernels.sample_rows(kernels.score_rows(x, given), k, key(), real=real)
        torch.testing.assert_close(found, expected, rtol=0, atol=0)
    control = kernels.sample_rows(kernels.score_rows(x, grad).flip(0), k, key(), real=real)
    assert n == 1 or not torch.equal(found[1], control[1])


def test_a_ticket_is_given_back() -> None:
    x = torch.randn(40, 1025, device=DEVICE)
    for draw in range(3):
        kernels.draw_rows(x, 5, key(draw))
    tickets = kernels._tickets(x.device)
    assert not tickets.any()
    # The control: a ticket that was taken lets no program be the last one.
    tickets += 1
    indices, _ = kernels.draw_rows(x, 5, key())
    tickets.zero_()
    expected, _ = kernels.draw_rows(x, 5, key())
    assert not torch.equal(indices, expected)


@pytest.mark.parametrize("given", DTYPES)
@pytest.mark.parametrize("wanted", DTYPES)
@pytest.mark.parametrize("d", [1, 33, 300, 1025])
def test_picked_rows_are_the_references_to_the_bit(
    given: torch.dtype, wanted: torch.dtype, d: int
) -> None:
    grad = torch.randn(50, d, device=DEVICE).to(given)
    indices = torch.arange(0, 50, 7, device=DEVICE, dtype=torch.int32)
    weights = torch.rand(len(indices), device=DEVICE) * 9
    found = kernels.pick_rows(grad, indices, weights, wanted)
    assert found.dtype == wanted
    # The interpreter cuts bfloat16 off where a GPU rounds it.
    cut = 2**-7 if IS_INTERPRETED and wanted == torch.bfloat16 else 0
    expected = reference.pick_rows(grad, indices, weights, wanted)
    torch.testing.assert_close(found, expected, rtol=cut, atol=0)
    weights[2] = float("nan")
    assert kernels.pick_rows(grad, indices, weights, wanted)[2].isnan().all()


@pytest.mark.parametrize("t", [1, 7, 130, 300])
@pytest.mark.parametrize("b", [1, 3, 40])
def test_norms_are_brought_up_to_date(b: int, t: int) -> None:
    rng = np.random.default_rng(b * t)
    norms = rng.random((b, t)) + 0.1
    real = rng.random((b, t)) < 0.7
    real[0, 0] = True
    room = torch.rand(t + 5, device=DEVICE)
    for mask in (None, real):
        counted = np.ones_like(real) if mask is None else mask
        expected = oracle.update_norms(room[:t].tolist(), norms, 0.9, counted)
        after = room.clone()
        on_device = torch.from_numpy(norms).float().flatten().to(DEVICE)
        seen = None if mask is None else torch.from_numpy(mask).flatten().to(DEVICE)
        kernels.update_norms(after[:t], on_device, 0.9, seen)
        wanted = torch.tensor(expected, dtype=torch.float32, device=DEVICE)
        torch.testing.assert_close(after[:t], wanted, rtol=1e-6, atol=0)
        assert torch.equal(after[t:], room[t:])
        assert not torch.equal(after[:t], room[:t])


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 1e30, 0.0])
def test_a_guess_stays_where_norms_say_nothing(bad: float) -> None:
    guess = torch.rand(6, device=DEVICE)
    norms = torch.rand(18, device=DEVICE) * (bad != 0)
    norms[3] = bad
    after = guess.clone()
    kernels.update_norms(after, norms, 0.9)
    assert torch.equal(after, guess)
    kernels.update_norms(after, norms + 1, 0.9, torch.zeros(18, dtype=torch.bool, device=DEVICE))
    assert torch.equal(after, guess)


def test_more_rows_than_a_kernel_counts_are_refused() -> None:
    scores = torch.empty(1, device="meta").expand(2**31)
    with pytest.raises(UnsupportedError, match=r"n must be below 2\*\*31, got 2147483648"):
        kernels.sample_rows(scores, 1, key()._replace(counter=torch.empty((), device="meta")))


def test_a_compiler_takes_operations() -> None:
    x, guess = torch.randn(40, 33, device=DEVICE), torch.rand(8, device=DEVICE)

    def step(x: Tensor, guess: Tensor, counter: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        indices, weights = kernels.draw_rows(x, 6, RandomKey(2**65, counter, -1), grad=guess)
        picked = kernels.pick_rows(x, indices, weights, torch.bfloat16)
        kernels.update_norms(guess, kernels.row_norms(x), 0.5)
        return indices, picked, kernels.score_rows(x, x)

    counter, indices = torch.tensor(0, device=DEVICE), torch.arange(9, device=DEVICE)
    for name, args in {
        "score_rows": (x, guess),
        "draw_rows": (x, guess, x[:, 0] > 0, counter, -1, 1, 9, 0.1, "wta"),
        "pick_rows": (x, indices, torch.rand(9, device=DEVICE), torch.bfloat16),
        "update_norms": (guess, x[:, 0], 0.5),
    }.items():
        checks = ("test_schema", "test_faketensor")
        torch.library.opcheck(getattr(torch.ops.leantune, name), args, test_utils=checks)
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    for counter in range(2):
        number = torch.tensor(counter, device=DEVICE)
        one, other = guess.clone(), guess.clone()
        torch.testing.assert_close(compiled(x, one, number), step(x, other, number), rtol=0, atol=0)
        assert torch.equal(one, other) and not torch.equal(one, guess)


@pytest.mark.parametrize("draw_at", ["forward", "backward"])
def test_a_model_trains_as_with_the_reference(
    draw_at: Literal["forward", "backward"], monkeypatch: pytest.MonkeyPatch
) -> None:
    grads, launches = [], []
    for forced in ("reference", "triton"):
        monkeypatch.setattr(backend, "_FORCED", forced)
        before = num_launches()
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(24, 20), nn.GELU(), nn.Linear(20, 4)).to(DEVICE)
        lt.apply(model, lt.WTACRS(keep_ratio=0.3, min_rows=2, draw_at=draw_at))
        x = torch.randn(4, 16, 24, device=DEVICE)
        for _ in range(2):
            model(x).square().mean().backward()
        grads.append([p.grad for p in model.parameters()])
        launches.append(num_launches() - before)
    torch.testing.assert_close(grads[1], grads[0], rtol=1e-4, atol=1e-6)
    # Of each linear and step: a draw, a pick, and in forward a look at the gradient's norms.
    assert launches == [0, 2 * 2 * (4 if draw_at == "forward" else 2)]


# A warning of torch's own compiler about itself.
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
def test_a_compiled_model_meets_no_graph_break(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backend, "_FORCED", "triton")
    grads = []
    for compiles in (False, True):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(24, 20), nn.GELU(), nn.Linear(20, 4)).to(DEVICE)
        lt.apply(model, lt.WTACRS(keep_ratio=0.3, min_rows=2))
        run = torch.compile(model, fullgraph=True, backend="aot_eager") if compiles else model
        x = torch.randn(4, 16, 24, device=DEVICE)
        before = num_launches()
        run(x).square().mean().backward()
        assert num_launches() == before + 2 * 4
        grads.append([p.grad for p in model.parameters()])
    torch.testing.assert_close(grads[1], grads[0], rtol=1e-4, atol=1e-6)


@pytest.mark.skipif(IS_INTERPRETED, reason="a graph is a GPU's")
def test_a_graph_draws_anew_each_time() -> None:
    x, counter = torch.randn(4000, 512, device=DEVICE), torch.zeros((), dtype=torch.int64)
    a_key = RandomKey(1, counter.to(DEVICE), 2)
    kernels.draw_rows(x, 40, a_key)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        indices, weights = kernels.draw_rows(x, 40, a_key)
        a_key.counter.add_(1)
    found = []
    for _ in range(3):
        graph.replay()
        expected = kernels.draw_rows(x, 40, a_key._replace(counter=a_key.counter - 1))
        torch.testing.assert_close((indices, weights), expected, rtol=0, atol=0)
        found.append(weights.clone())
    assert not torch.equal(found[0], found[1]) and not torch.equal(found[1], found[2])
