"""The paper's estimators against oracles: bias, variance, structure and the edges."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import rows as whole_numbers
from oracles import wta_crs as oracle
from stats import aggregate_check, mean_check
from torch import Tensor

from leantune.ops.random import RandomKey, words
from leantune.ops.rows import Estimator, sample_rows

REPLACED: list[Estimator] = ["crs", "wta"]
EVERY: list[Estimator] = [*REPLACED, "topk"]
NUM_ROWS, BUDGET = 64, 20
# Float32 weights and scores: the expectation itself is off by about this much.
FLOAT32_NOISE = 1e-6

each = pytest.mark.parametrize("estimator", EVERY)
# Plain column-row sampling may repeat a row at any budget, so it has no exact case.
each_with_exact_case = pytest.mark.parametrize("estimator", [e for e in EVERY if e != "crs"])


def example(log_std: float = 1.0, seed: int = 0) -> Tensor:
    h, g = oracle.example_rows(NUM_ROWS, log_std, seed)
    return torch.from_numpy(oracle.norm_products(h, g)).float()


def draws(
    scores: Tensor,
    k: int,
    estimator: Estimator,
    num_draws: int,
    real: Tensor | None = None,
    floor: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """Return indices and weights (num_draws, k) of consecutive draws."""

    def one(number: Tensor) -> tuple[Tensor, Tensor]:
        key = RandomKey(5, number, 7)
        return sample_rows(scores, k, key, real=real, floor=floor, estimator=estimator)

    return torch.func.vmap(one)(torch.arange(num_draws))


def totals(sampled: tuple[Tensor, Tensor], n: int = NUM_ROWS) -> np.ndarray:
    """Return the total weight of every row in every draw, (num_draws, n)."""
    indices, weights = sampled
    out = torch.zeros(len(indices), n, dtype=torch.float64)
    return out.scatter_add_(1, indices.long(), weights.double()).numpy()


def size(p: np.ndarray, k: int, estimator: Estimator) -> int:
    return {"crs": 0, "topk": k}.get(estimator, oracle.brute_force_size(p, k))


# Bias and variance; those of the systematic estimator are tested beside it.


@pytest.mark.parametrize("estimator", REPLACED)
@pytest.mark.parametrize("source", ["exact", "random", "input_norm", "stale"])
def test_estimate_is_unbiased_for_any_scores(estimator: Estimator, source: str) -> None:
    h, g = oracle.example_rows(NUM_ROWS, 1.0)
    p = oracle.wrong_scores(source, h, g)
    indices, weights = draws(torch.from_numpy(p).float(), BUDGET, estimator, 10_000)
    counted = totals((indices, weights))
    exact = oracle.grad_weight(h, g).reshape(-1)
    noise = FLOAT32_NOISE * float(np.abs(exact).max())
    got = oracle.estimates(counted, h, g)
    assert mean_check(got, exact, resolution=noise).ok
    # In expectation every row counts once.
    assert mean_check(counted, np.ones(NUM_ROWS), resolution=FLOAT32_NOISE).ok
    chosen = oracle.heaviest(p, size(p, BUDGET, estimator))
    variance = oracle.variance(oracle.outer_products(h, g), p, BUDGET, chosen)
    assert aggregate_check(got, exact, variance).ok

    # Without the factor 1 / ((k - c) p) the same rows give a biased estimate.
    got = oracle.estimates(totals((indices, torch.where(weights == 1, 1.0, 0.5))), h, g)
    assert not mean_check(got, exact, resolution=noise).ok
    assert not aggregate_check(got, exact, got.var(0).sum()).ok


@pytest.mark.parametrize("estimator", REPLACED)
@pytest.mark.parametrize("source", ["exact", "input_norm"])
def test_variance_equals_the_closed_form(estimator: Estimator, source: str) -> None:
    h, g = oracle.example_rows(NUM_ROWS, 1.0)
    p, x = oracle.wrong_scores(source, h, g), oracle.outer_products(h, g)
    chosen = oracle.heaviest(p, size(p, BUDGET, estimator))
    counted = totals(draws(torch.from_numpy(p).float(), BUDGET, estimator, 40_000))
    error = oracle.squared_errors(counted, h, g).mean()
    assert 0.97 < error / oracle.variance(x, p, BUDGET, chosen) < 1.03
    # The control: two rows more to draw is another variance.
    assert not 0.97 < error / oracle.variance(x, p, BUDGET + 2, chosen) < 1.03


def test_the_slow_sampler_agrees_with_the_oracle() -> None:
    h, g = oracle.example_rows(NUM_ROWS, 1.0)
    p, exact = oracle.norm_products(h, g), oracle.grad_weight(h, g).reshape(-1)
    p /= p.sum()
    chosen = oracle.heaviest(p, oracle.brute_force_size(p, BUDGET))
    for scaled in (True, False):
        rng = np.random.default_rng(0)
        slow = [
            oracle.draw_with_replacement(p, BUDGET, chosen, rng, scaled=scaled) for _ in range(1000)
        ]
        assert mean_check(oracle.estimates(np.stack(slow), h, g), exact).ok == scaled


@settings(max_examples=100, deadline=None, derandomize=True)
@given(st.data())
def test_variance_bound_holds_for_any_scores(data: st.DataObject) -> None:
    n = data.draw(st.integers(2, 30))
    k = data.draw(st.integers(1, n - 1))
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1)))
    h, g = oracle.example_rows(n, 1.0, seed=int(rng.integers(2**32)))
    scores = np.exp(rng.normal(size=n) * 2)
    p, x = scores / scores.sum(), oracle.outer_products(h, g)
    sampled = draws(torch.from_numpy(scores).float(), k, "wta", 1)
    chosen = set(sampled[0][0, : size(p, k, "wta")].tolist())
    bound = (1 - p[list(chosen)].sum()) * k / (k - len(chosen))
    assert oracle.variance(x, p, k, chosen) <= bound * oracle.variance(x, p, k, set()) * (1 + 1e-5)
    assert bound <= 1 + 1e-5


def test_topk_is_biased_and_has_no_luck_in_it() -> None:
    h, g = oracle.example_rows(NUM_ROWS, 1.0)
    indices, weights = draws(example(), BUDGET, "topk", 2)
    counted = totals((indices, weights))
    assert set(counted[0].nonzero()[0]) == oracle.heaviest(oracle.norm_products(h, g), BUDGET)
    assert (weights == 1).all() and torch.equal(indices[0], indices[1])
    got = oracle.estimates(counted, h, g)
    assert not mean_check(got, oracle.grad_weight(h, g).reshape(-1)).ok


# Structure.


@pytest.mark.parametrize("estimator", REPLACED)
@pytest.mark.parametrize("log_std", [0.0, 1.0, 3.0])
def test_structure(estimator: Estimator, log_std: float) -> None:
    scores = example(log_std, seed=5)
    indices, weights = draws(scores, BUDGET, estimator, 2000)
    p = scores.double()
    c = size(p.numpy(), BUDGET, estimator)
    assert indices.dtype == torch.int32 and weights.dtype == torch.float32
    assert indices.shape == weights.shape == (2000, BUDGET)
    order = torch.sort(scores, descending=True, stable=True).indices
    sure = order[:c].sort().values
    assert (indices[:, :c] == sure).all() and (weights[:, :c] == 1).all()
    # A draw never repeats a row that is kept for sure; it may repeat another.
    drawn = indices[:, c:]
    assert not torch.isin(drawn, sure.to(torch.int32)).any()
    wanted = p[order[c:]].sum() / ((BUDGET - c) * p[drawn.long()])
    # A light score counts in few units.
    torch.testing.assert_close(weights[:, c:].double(), wanted, rtol=1e-4, atol=0)
    if log_std < 3:
        assert min(len(set(line.tolist())) for line in indices) < BUDGET


@settings(max_examples=200, deadline=None, derandomize=True)
@given(st.data())
def test_a_sample_is_the_oracles_to_the_bit(data: st.DataObject) -> None:
    n = data.draw(st.integers(1, 40))
    k = data.draw(st.integers(1, n))
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1)))
    spread = data.draw(st.sampled_from([0.0, 0.01, 0.5, 1.0, 2.0, 9.0]))
    scale = data.draw(st.sampled_from([1.0, 1e-20, 1e20]))
    scores = (np.exp(spread * rng.normal(size=n)) * scale).astype(np.float32)
    scores[rng.random(n) < data.draw(st.sampled_from([0.0, 0.5]))] = 0
    key = RandomKey(n, torch.tensor(k), 1)
    for estimator in EVERY:
        found = sample_rows(torch.from_numpy(scores), k, key, estimator=estimator)
        given_words = words(key, k).tolist()
        indices, weights = whole_numbers.sample_replaced(scores, k, given_words, estimator)
        assert found[0].tolist() == indices
        assert found[1].tolist() == weights.tolist()


@each
def test_nothing_is_read_on_the_host(estimator: Estimator) -> None:
    key = RandomKey(0, torch.empty((), dtype=torch.int64, device="meta"))
    scores, real = torch.empty(50, device="meta"), torch.empty(50, dtype=torch.bool, device="meta")
    drawn = sample_rows(scores, 12, key, real=real, floor=0.1, estimator=estimator)
    assert drawn[1].shape == (12,)


@each
# Dynamo warns of any cached function; the ones that are called here are pure.
@pytest.mark.filterwarnings("ignore:Dynamo detected a call to a .functools.lru_cache")
def test_compiles_in_one_graph(estimator: Estimator) -> None:
    real = torch.arange(50) % 5 > 0

    def step(scores: Tensor, counter: Tensor) -> tuple[Tensor, Tensor]:
        key = RandomKey(0, counter, 1)
        return sample_rows(scores, 12, key, real=real, floor=0.05, estimator=estimator)

    torch._dynamo.reset()
    compiled = torch.compile(step, backend="eager", fullgraph=True)
    scores = torch.rand(50)
    for counter in (torch.tensor(1), torch.tensor(2)):
        for a, b in zip(compiled(scores, counter), step(scores, counter), strict=True):
            assert torch.equal(a, b)


@each
@pytest.mark.parametrize("word", [0, 2**31, 2**32 - 1])
def test_extreme_points_hit_rows_that_have_a_score(
    estimator: Estimator, word: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("leantune.ops.rows.words", lambda key, n: torch.full((n,), word))
    scores = torch.from_numpy(oracle.norm_products(*oracle.example_rows(1000, 1.0))).float()
    scores[:7] = scores[-7:] = 0
    key = RandomKey(0, torch.tensor(0))
    indices, weights = sample_rows(scores, 300, key, estimator=estimator)
    assert (scores[indices.long()] > 0).all() and (weights > 0).all()


# Edges.


@each_with_exact_case
def test_whole_budget_keeps_every_row_once(estimator: Estimator) -> None:
    assert (totals(draws(example(), NUM_ROWS, estimator, 3)) == 1).all()


@each_with_exact_case
@pytest.mark.parametrize("num_positive", [0, 1, BUDGET - 1, BUDGET])
def test_no_more_rows_than_the_budget_are_exact(estimator: Estimator, num_positive: int) -> None:
    scores = torch.zeros(NUM_ROWS)
    scores[torch.randperm(NUM_ROWS)[:num_positive]] = 1.0
    counted = totals(draws(scores / max(num_positive, 1), BUDGET, estimator, 20))
    assert (counted == (scores > 0).double().numpy()).all()


@each
def test_one_row_and_one_position(estimator: Estimator) -> None:
    indices, weights = draws(torch.ones(1), 1, estimator, 5)
    assert (indices == 0).all() and (weights == 1).all()
    counted = totals(draws(torch.tensor([1.0, 2.0, 3.0]), 1, estimator, 20_000), 3)
    if estimator == "topk":
        assert (counted == [0, 0, 1]).all()
    else:
        assert mean_check(counted, np.ones(3), resolution=FLOAT32_NOISE).ok


@each
def test_masked_rows_are_never_drawn_whatever_their_score(estimator: Estimator) -> None:
    scores, real = example(), torch.arange(NUM_ROWS) % 3 > 0
    scores[::3] = math.nan
    counted = totals(draws(scores, BUDGET, estimator, 5000, real, 0.1))
    assert (counted[:, ~real.numpy()] == 0).all()
    if estimator != "topk":
        assert mean_check(counted, real.double().numpy(), resolution=FLOAT32_NOISE).ok
    assert (draws(scores, BUDGET, estimator, 3, torch.zeros_like(real), 0.1)[1] == 0).all()


@each
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_scores_that_are_not_finite_are_seen(estimator: Estimator, bad: float) -> None:
    scores = example()
    scores[1] = bad
    indices, weights = draws(scores, BUDGET, estimator, 3)
    assert weights.isnan().all()
    assert indices.min() >= 0 and indices.max() < NUM_ROWS


@each
def test_ties_go_to_the_lower_row(estimator: Estimator) -> None:
    scores = torch.tensor([8.0] * 10 + [1.0] * 54)
    c = size(scores.double().numpy(), BUDGET, estimator)
    assert c > 0 or estimator == "crs"
    assert (draws(scores, BUDGET, estimator, 3)[0][:, :c] == torch.arange(c)).all()
