"""The estimator against float64 oracles: exactness, bias, variance, the c rule and the edges."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import wta_crs as oracle
from scipy.stats import norm
from stats import aggregate_check, mean_check
from torch import Tensor

from leantune.methods.wta_crs.maths import (
    CRule,
    Estimator,
    Selection,
    budget,
    deterministic_size,
    num_uniforms,
    probabilities,
    select,
)
from leantune.ops.rows import uniform

Scheme = tuple[Estimator, CRule]
UNBIASED: list[Scheme] = [
    ("crs", "paper"),
    ("wta", "paper"),
    ("wta", "variance"),
    ("systematic", "paper"),
    ("systematic", "variance"),
]
EVERY: list[Scheme] = [*UNBIASED, ("topk", "paper")]
NUM_ROWS, BUDGET = 64, 20
# Float32 weights and probabilities: the expectation itself is off by about this much.
FLOAT32_NOISE = 1e-6


def make_rows(num_rows: int, log_std: float, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Inputs (num_rows, 8) and output gradients (num_rows, 6); the products have a common part."""
    rng = np.random.default_rng(seed)
    h = rng.normal(size=(num_rows, 8)) + 0.3
    g = rng.normal(size=(num_rows, 6)) + 0.3
    h /= np.linalg.norm(h, axis=1, keepdims=True)
    g /= np.linalg.norm(g, axis=1, keepdims=True)
    return h, g * np.exp(log_std * rng.normal(size=(num_rows, 1)))


def pair_weights(h: np.ndarray, g: np.ndarray) -> np.ndarray:
    return np.linalg.norm(h, axis=1) * np.linalg.norm(g, axis=1)


def distribution(scores: np.ndarray, floor: float = 0.0) -> Tensor:
    return probabilities(torch.from_numpy(scores), None, floor)


def draw(p: Tensor, k: int, scheme: Scheme, num_draws: int, seed: int = 0) -> Selection:
    """Selections stacked along a first axis of draws."""
    estimator, c_rule = scheme
    generator = torch.Generator().manual_seed(seed)
    length = max(num_uniforms(k, estimator), 1)
    u = torch.rand(num_draws, length, generator=generator)
    return torch.func.vmap(lambda one: select(p, k, estimator, c_rule, one))(u)


def row_totals(selection: Selection, num_rows: int) -> np.ndarray:
    """(num_draws, num_rows): the total weight of every row in every draw."""
    totals = torch.zeros(len(selection.indices), num_rows, dtype=torch.float64)
    totals.scatter_add_(1, selection.indices.long(), selection.weights.double())
    return totals.numpy()


def estimates(totals: np.ndarray, h: np.ndarray, g: np.ndarray) -> np.ndarray:
    """(num_draws, 6 * 8): the estimated weight gradients."""
    return totals @ oracle.outer_products(h, g).reshape(len(h), -1)


def squared_errors(totals: np.ndarray, h: np.ndarray, g: np.ndarray) -> np.ndarray:
    exact = oracle.grad_weight(h, g).reshape(-1)
    return ((estimates(totals, h, g) - exact) ** 2).sum(1)


def deterministic_rows(p: Tensor, k: int, scheme: Scheme) -> set[int]:
    if scheme[0] == "crs":
        return set()
    c, _ = deterministic_size(p.sort(descending=True, stable=True).values, k, scheme[1])
    return oracle.heaviest(p.double().numpy(), int(c))


# Bias.


def wrong_probabilities(name: str, h: np.ndarray, g: np.ndarray) -> np.ndarray:
    rng = np.random.default_rng(7)
    if name == "exact":
        return pair_weights(h, g)
    if name == "random":
        return rng.random(len(h)) + 0.05
    if name == "input_norm":
        return np.linalg.norm(h, axis=1)
    assert name == "stale"
    return pair_weights(h, g) * 10 ** rng.uniform(-1, 1, len(h))


@pytest.mark.parametrize("scheme", UNBIASED)
@pytest.mark.parametrize("source", ["exact", "random", "input_norm", "stale"])
def test_gradient_is_unbiased_for_any_probabilities(scheme: Scheme, source: str) -> None:
    h, g = make_rows(NUM_ROWS, 1.0)
    p = distribution(wrong_probabilities(source, h, g))
    selection = draw(p, BUDGET, scheme, 10_000)
    totals = row_totals(selection, NUM_ROWS)
    exact = oracle.grad_weight(h, g).reshape(-1)
    noise = FLOAT32_NOISE * float(np.abs(exact).max())
    assert mean_check(estimates(totals, h, g), exact, resolution=noise).ok
    # In expectation every row counts once.
    assert mean_check(totals, np.ones(NUM_ROWS), resolution=FLOAT32_NOISE).ok
    if scheme[0] != "systematic":
        x, chosen = oracle.outer_products(h, g), deterministic_rows(p, BUDGET, scheme)
        variance = oracle.variance(x, p.double().numpy(), BUDGET, chosen)
        assert aggregate_check(estimates(totals, h, g), exact, variance).ok

    # Without the factor 1 / ((k - c) p) the same rows give a biased estimate.
    unscaled = torch.where(selection.weights == 1, 1.0, 0.5)
    totals = row_totals(selection._replace(weights=unscaled), NUM_ROWS)
    assert not mean_check(estimates(totals, h, g), exact, resolution=noise).ok
    assert not aggregate_check(
        estimates(totals, h, g), exact, estimates(totals, h, g).var(0).sum()
    ).ok


def test_the_checks_agree_with_the_slow_samplers() -> None:
    h, g = make_rows(NUM_ROWS, 1.0)
    p, exact = pair_weights(h, g), oracle.grad_weight(h, g).reshape(-1)
    p /= p.sum()
    chosen = oracle.heaviest(p, oracle.brute_force_size(p, BUDGET, "paper"))
    rng = np.random.default_rng(0)
    slow = np.stack([oracle.draw_systematic(p, BUDGET, chosen, rng) for _ in range(2000)])
    replaced = np.stack([oracle.draw_with_replacement(p, BUDGET, chosen, rng) for _ in range(1000)])
    assert mean_check(estimates(slow, h, g), exact).ok
    assert mean_check(estimates(replaced, h, g), exact).ok
    unscaled = np.stack(
        [oracle.draw_with_replacement(p, BUDGET, chosen, rng, scaled=False) for _ in range(1000)]
    )
    assert not mean_check(estimates(unscaled, h, g), exact).ok

    # Same variance as the reference sampler, on independent draws.
    def differ(ours: Scheme, reference: np.ndarray) -> bool:
        fast = row_totals(draw(distribution(p), BUDGET, ours, 10_000), NUM_ROWS)
        a, b = squared_errors(fast, h, g), squared_errors(reference, h, g)
        error = math.sqrt(a.var() / len(a) + b.var() / len(b))
        return abs(a.mean() - b.mean()) / error > 4.9

    assert not differ(("systematic", "paper"), slow)
    assert not differ(("wta", "paper"), replaced)
    assert differ(("wta", "paper"), slow)


@pytest.mark.parametrize("scheme", UNBIASED)
def test_uniform_probabilities_need_no_deterministic_set(scheme: Scheme) -> None:
    h, g = make_rows(NUM_ROWS, 1.0)
    selection = draw(torch.full((NUM_ROWS,), 1 / NUM_ROWS), BUDGET, scheme, 10_000)
    assert (selection.num_deterministic == 0).all()
    torch.testing.assert_close(
        selection.weights, torch.full_like(selection.weights, NUM_ROWS / BUDGET)
    )
    exact = oracle.grad_weight(h, g).reshape(-1)
    totals = row_totals(selection, NUM_ROWS)
    assert mean_check(estimates(totals, h, g), exact).ok
    # Weight 1 instead of n / k: the shrinkage of sampling without rescaling.
    assert not mean_check(estimates(totals * BUDGET / NUM_ROWS, h, g), exact).ok


def test_topk_is_biased() -> None:
    h, g = make_rows(NUM_ROWS, 1.0)
    p = distribution(pair_weights(h, g))
    selection = draw(p, BUDGET, ("topk", "paper"), 2)
    totals = row_totals(selection, NUM_ROWS)
    assert set(totals[0].nonzero()[0]) == oracle.heaviest(p.double().numpy(), BUDGET)
    assert (selection.weights == 1).all()
    assert (selection.num_deterministic == BUDGET).all()
    assert not mean_check(estimates(totals, h, g), oracle.grad_weight(h, g).reshape(-1)).ok


@pytest.mark.parametrize("scheme", UNBIASED)
def test_unbiased_with_the_counter_based_numbers(scheme: Scheme) -> None:
    estimator, c_rule = scheme
    p = distribution(pair_weights(*make_rows(NUM_ROWS, 1.0)))
    length = num_uniforms(BUDGET, estimator)

    def one(number: Tensor) -> Selection:
        u = uniform(3, 11, number, length, device="cpu")
        return select(p, BUDGET, estimator, c_rule, u)

    totals = row_totals(torch.func.vmap(one)(torch.arange(10_000)), NUM_ROWS)
    assert mean_check(totals, np.ones(NUM_ROWS), resolution=FLOAT32_NOISE).ok


# Variance.


@pytest.mark.parametrize("scheme", [s for s in UNBIASED if s[0] != "systematic"])
@pytest.mark.parametrize("source", ["exact", "input_norm"])
def test_variance_equals_the_closed_form(scheme: Scheme, source: str) -> None:
    h, g = make_rows(NUM_ROWS, 1.0)
    p = distribution(wrong_probabilities(source, h, g))
    chosen = deterministic_rows(p, BUDGET, scheme)
    x, p64 = oracle.outer_products(h, g), p.double().numpy()
    errors = squared_errors(row_totals(draw(p, BUDGET, scheme, 40_000), NUM_ROWS), h, g)
    assert 0.97 < errors.mean() / oracle.variance(x, p64, BUDGET, chosen) < 1.03
    # One row more in the deterministic set is another variance.
    other = oracle.variance(x, p64, BUDGET + 2, chosen)
    assert not 0.97 < errors.mean() / other < 1.03


def test_variance_ordering_on_spread_norms() -> None:
    num_rows, k = 1024, 307
    h, g = make_rows(num_rows, 0.0)
    # The quantiles themselves: the ratio of 1024 random norms ranges from 0.04 to 0.09.
    quantiles = norm.ppf((np.arange(num_rows) + 0.5) / num_rows)
    g *= np.exp(2 * np.random.default_rng(1).permutation(quantiles))[:, None]
    p = distribution(pair_weights(h, g))
    x, p64 = oracle.outer_products(h, g), p.double().numpy()
    crs = oracle.variance(x, p64, k, set())
    wta = oracle.variance(x, p64, k, deterministic_rows(p, k, ("wta", "paper")))
    assert 0.055 < wta / crs < 0.065
    better = oracle.variance(x, p64, k, deterministic_rows(p, k, ("wta", "variance")))
    assert better < wta

    totals = row_totals(draw(p, k, ("systematic", "paper"), 600), num_rows)
    assert squared_errors(totals, h, g).mean() <= 0.65 * wta


def test_row_order_lowers_the_variance_of_alike_neighbours() -> None:
    num_rows, k = 256, 77
    h, g = make_rows(num_rows // 8, 0.3)
    h, g = np.repeat(h, 8, axis=0), np.repeat(g, 8, axis=0)

    def variance(order: np.ndarray) -> float:
        p = distribution(pair_weights(h[order], g[order]))
        totals = row_totals(draw(p, k, ("systematic", "paper"), 1000), num_rows)
        return squared_errors(totals, h[order], g[order]).mean()

    shuffled = np.random.default_rng(0).permutation(num_rows)
    assert variance(np.arange(num_rows)) < 0.5 * variance(shuffled)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(st.data())
def test_variance_bound_holds_for_any_probabilities(data: st.DataObject) -> None:
    num_rows = data.draw(st.integers(2, 30))
    k = data.draw(st.integers(1, num_rows - 1))
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1)))
    h, g = make_rows(num_rows, 1.0, seed=int(rng.integers(2**32)))
    p = distribution(np.exp(rng.normal(size=num_rows) * 2))
    p64, x = p.double().numpy(), oracle.outer_products(h, g)
    chosen = deterministic_rows(p, k, ("wta", "paper"))
    bound = (1 - p64[list(chosen)].sum()) * k / (k - len(chosen))
    crs = oracle.variance(x, p64, k, set())
    assert oracle.variance(x, p64, k, chosen) <= bound * crs * (1 + 1e-5)
    assert bound <= 1 + 1e-5


# The size of the deterministic set.


@settings(max_examples=300, deadline=None, derandomize=True)
@given(st.data())
def test_c_rule_equals_brute_force_and_greedy(data: st.DataObject) -> None:
    num_rows = data.draw(st.integers(2, 40))
    k = data.draw(st.integers(1, num_rows - 1))
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1)))
    spread = data.draw(st.sampled_from([0.0, 0.01, 0.5, 1.0, 2.0, 4.0]))
    p = np.sort(np.exp(spread * rng.normal(size=num_rows)))[::-1].copy()
    p /= p.sum()
    for rule in ("paper", "variance"):
        size, tail = deterministic_size(torch.from_numpy(p), k, rule)
        c, brute = int(size), oracle.brute_force_size(p, k, rule)
        least = oracle.objective(p, k, brute, rule)
        assert oracle.objective(p, k, c, rule) <= least * (1 + 1e-12)
        assert 0 <= c < k
        np.testing.assert_allclose(tail.numpy(), [p[j:].sum() for j in range(num_rows)], rtol=1e-12)
        if rule == "paper":
            greedy = oracle.greedy_size(p, k)
            assert oracle.objective(p, k, greedy, rule) <= least * (1 + 1e-12)
            if p[0] * k > 1 + 1e-9:
                assert c >= 1
        # Systematic sampling needs inclusion probabilities: no tail row is expected twice.
        assert (k - c) * p[c] <= p[c:].sum() * (1 + 1e-9)


def test_c_rules_differ_where_they_should() -> None:
    p = torch.tensor([0.3, 0.2, 0.1, 0.1, 0.1, 0.1, 0.1])
    assert int(deterministic_size(p, 3, "paper")[0]) == 0
    assert int(deterministic_size(p, 3, "variance")[0]) == 1


# Structure of a selection.


@pytest.mark.parametrize("scheme", EVERY)
@pytest.mark.parametrize("log_std", [0.0, 1.0, 3.0])
def test_structure(scheme: Scheme, log_std: float) -> None:
    p = distribution(pair_weights(*make_rows(NUM_ROWS, log_std, seed=5)))
    selection = draw(p, BUDGET, scheme, 2000)
    indices, weights, c = selection.indices, selection.weights, int(selection.num_deterministic[0])
    assert indices.dtype == torch.int32 and indices.shape == (2000, BUDGET)
    assert weights.dtype == torch.float32 and weights.shape == (2000, BUDGET)
    assert indices.min() >= 0 and indices.max() < NUM_ROWS
    order = torch.sort(p, descending=True, stable=True).indices
    assert (indices[:, :c] == order[:c]).all()
    assert (weights[:, :c] == 1).all()
    # A draw never repeats a deterministic row.
    if c < BUDGET:
        drawn = indices[:, c:]
        assert not torch.isin(drawn, order[:c].to(torch.int32)).any()
        p64 = p.double()
        rest = p64[order[c:]].sum()
        torch.testing.assert_close(
            weights[:, c:].double(), rest / ((BUDGET - c) * p64[drawn.long()]), rtol=1e-5, atol=0
        )
    distinct = [len(set(line.tolist())) for line in indices]
    if scheme[0] in ("systematic", "topk"):
        assert min(distinct) == BUDGET
    elif log_std < 3:
        assert min(distinct) < BUDGET


def test_select_reads_nothing_on_the_host() -> None:
    p = torch.empty(50, device="meta")
    for estimator, c_rule in EVERY:
        u = torch.empty(num_uniforms(12, estimator), device="meta")
        assert select(p, 12, estimator, c_rule, u).weights.shape == (12,)
    mask = torch.empty(50, dtype=torch.bool, device="meta")
    assert probabilities(p, mask, 0.1).shape == (50,)
    # Control: a plain index by c is a host read, which this device refuses.
    c, tail = deterministic_size(p, 12, "paper")
    with pytest.raises(RuntimeError):
        tail[c]


@pytest.mark.parametrize("scheme", EVERY)
def test_compiles_in_one_graph(scheme: Scheme) -> None:
    estimator, c_rule = scheme
    mask = torch.arange(50) % 5 > 0

    def step(scores: Tensor, number: Tensor) -> Selection:
        u = uniform(0, 1, number, num_uniforms(12, estimator), device="cpu")
        p = probabilities(scores, mask, 0.05)
        return select(p, 12, estimator, c_rule, u)

    torch._dynamo.reset()
    compiled = torch.compile(step, backend="eager", fullgraph=True)
    scores = torch.rand(50, generator=torch.Generator().manual_seed(0))
    for number in (torch.tensor(1), torch.tensor(2)):
        for ours, theirs in zip(compiled(scores, number), step(scores, number), strict=True):
            assert torch.equal(ours, theirs)


# Edges.


# Plain sampling may repeat a row at any budget, so it has no exact case.
@pytest.mark.parametrize("scheme", [s for s in EVERY if s[0] != "crs"])
def test_whole_budget_keeps_every_row_once(scheme: Scheme) -> None:
    p = distribution(pair_weights(*make_rows(NUM_ROWS, 1.0)))
    totals = row_totals(draw(p, NUM_ROWS, scheme, 3), NUM_ROWS)
    assert (totals == 1).all()


@pytest.mark.parametrize("scheme", [s for s in EVERY if s[0] != "crs"])
@pytest.mark.parametrize("num_positive", [0, 1, BUDGET - 1, BUDGET])
def test_no_more_rows_than_the_budget_are_exact(scheme: Scheme, num_positive: int) -> None:
    scores = np.zeros(NUM_ROWS)
    scores[np.random.default_rng(0).permutation(NUM_ROWS)[:num_positive]] = 1.0
    p = torch.from_numpy(scores).float() / max(num_positive, 1)
    selection = draw(p, BUDGET, scheme, 50)
    assert (row_totals(selection, NUM_ROWS) == scores).all()
    assert (selection.num_deterministic == num_positive).all()
    # Idle positions point at a row that is kept anyway.
    if num_positive and scheme[0] != "topk":
        assert torch.from_numpy(scores)[selection.indices.long()].all()


@pytest.mark.parametrize("scheme", EVERY)
def test_one_row_and_one_position(scheme: Scheme) -> None:
    selection = draw(torch.ones(1), 1, scheme, 5)
    assert (selection.indices == 0).all()
    assert (selection.weights == 1).all()
    p = distribution(np.array([1.0, 2.0, 3.0]))
    totals = row_totals(draw(p, 1, scheme, 20_000), 3)
    if scheme[0] == "topk":
        assert (totals == [0, 0, 1]).all()
    else:
        assert mean_check(totals, np.ones(3), resolution=FLOAT32_NOISE).ok


@pytest.mark.parametrize("scheme", EVERY)
def test_rows_without_probability_are_never_selected(scheme: Scheme) -> None:
    scores = torch.from_numpy(pair_weights(*make_rows(NUM_ROWS, 1.0)))
    mask = torch.arange(NUM_ROWS) % 3 > 0
    p = probabilities(scores, mask, 0.1)
    assert (p[~mask] == 0).all()
    totals = row_totals(draw(p, BUDGET, scheme, 5000), NUM_ROWS)
    assert (totals[:, ~mask.numpy()] == 0).all()
    if scheme[0] != "topk":
        expected = mask.double().numpy()
        assert mean_check(totals, expected, resolution=FLOAT32_NOISE).ok


@pytest.mark.parametrize("scheme", EVERY)
@pytest.mark.parametrize("number", [0.0, 0.5, 1 - 2**-24])
def test_extreme_random_numbers_stay_inside(scheme: Scheme, number: float) -> None:
    estimator, c_rule = scheme
    p = distribution(pair_weights(*make_rows(1000, 1.0)))
    p[:7] = 0
    p[-7:] = 0
    u = torch.full((num_uniforms(300, estimator),), number)
    selection = select(p, 300, estimator, c_rule, u)
    assert p[selection.indices.long()].min() > 0
    assert selection.weights.min() > 0
    c = int(selection.num_deterministic)
    heaviest = torch.sort(p, descending=True, stable=True).indices[:c]
    assert not torch.isin(selection.indices[c:], heaviest.to(torch.int32)).any()


@pytest.mark.parametrize("scheme", EVERY)
def test_every_row_masked(scheme: Scheme) -> None:
    p = probabilities(torch.rand(NUM_ROWS), torch.zeros(NUM_ROWS, dtype=torch.bool), 0.1)
    assert (p == 0).all()
    assert (draw(p, BUDGET, scheme, 3).weights == 0).all()


@pytest.mark.parametrize("scheme", EVERY)
def test_not_a_number_reaches_the_weights(scheme: Scheme) -> None:
    mask = torch.arange(NUM_ROWS) != 2
    for value in (math.nan, math.inf):
        scores = torch.rand(NUM_ROWS)
        scores[1] = value
        p = probabilities(scores, mask, 0.1)
        assert p[mask].isnan().all()
        assert p[2] == 0
        selection = draw(p, BUDGET, scheme, 3)
        assert selection.weights.isnan().all()
        assert selection.indices.min() >= 0 and selection.indices.max() < NUM_ROWS
    # A masked row may hold anything.
    scores = torch.rand(NUM_ROWS)
    scores[2] = math.nan
    assert probabilities(scores, mask, 0.1).isfinite().all()


@pytest.mark.parametrize("scheme", EVERY)
def test_ties_are_reproducible(scheme: Scheme) -> None:
    p = distribution(np.repeat([8.0, 1.0], [10, 54]))
    first, second = draw(p, BUDGET, scheme, 3), draw(p, BUDGET, scheme, 3)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    c = int(first.num_deterministic[0])
    if scheme[0] in ("topk", "wta"):
        assert c > 0
    assert (first.indices[:, :c] == torch.arange(c)).all()


@pytest.mark.parametrize("scheme", UNBIASED)
def test_one_dominating_row(scheme: Scheme) -> None:
    scores = np.ones(NUM_ROWS)
    scores[9] = 1e9
    p = distribution(scores)
    selection = draw(p, BUDGET, scheme, 2000)
    if scheme[0] == "crs":
        assert (selection.indices == 9).double().mean() > 0.999
        return
    assert (selection.num_deterministic == 1).all()
    assert (selection.indices[:, 0] == 9).all()
    # 1 - p[9] is 0 in float32; the mass of the tail, summed by itself, is not.
    torch.testing.assert_close(
        selection.weights[:, 1:], torch.full_like(selection.weights[:, 1:], 63 / 19)
    )


# Probabilities and the budget.


def test_probabilities_follow_the_formula() -> None:
    scores = np.array([1.0, 0.0, 3.0, 6.0])
    np.testing.assert_allclose(distribution(scores).numpy(), [0.1, 0, 0.3, 0.6], rtol=1e-6)
    np.testing.assert_allclose(
        distribution(scores, 0.2).numpy(), [0.13, 0.05, 0.29, 0.53], rtol=1e-6
    )
    mask = torch.tensor([True, True, True, False])
    p = probabilities(torch.from_numpy(scores), mask, 0.2)
    np.testing.assert_allclose(p.numpy(), [0.2 + 0.2 / 3, 0.2 / 3, 0.6 + 0.2 / 3, 0], rtol=1e-6)
    assert p.dtype == torch.float32


def test_scores_that_are_all_zero_give_uniform_probabilities() -> None:
    assert torch.equal(probabilities(torch.zeros(4), None, 0.0), torch.full((4,), 0.25))
    mask = torch.tensor([True, False, True, False])
    p = probabilities(torch.zeros(4, dtype=torch.bfloat16), mask, 0.0)
    assert torch.equal(p, torch.tensor([0.5, 0.0, 0.5, 0.0]))


@pytest.mark.parametrize("scale", [1e-38, 1e-30, 1.0, 1e30, 1e38])
def test_probabilities_do_not_depend_on_the_scale(scale: float) -> None:
    scores = torch.linspace(0.1, 3, 500, dtype=torch.float64)
    p = probabilities((scores * scale).float(), None, 0.0).double()
    tolerance = 1e-5 if scale > 1e-37 else 1e-6 / 0.1  # subnormal scores have fewer digits
    torch.testing.assert_close(p, scores / scores.sum(), rtol=tolerance, atol=0)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(
    st.lists(st.floats(0, 2.0**127, width=32), min_size=1, max_size=40),
    st.sampled_from([0.0, 0.01, 0.1, 0.9]),
    st.randoms(use_true_random=False),
)
def test_probabilities_sum_to_one(scores: list[float], floor: float, random) -> None:
    mask = torch.tensor([random.random() < 0.7 for _ in scores])
    p = probabilities(torch.tensor(scores), mask, floor)
    assert p.min() >= 0
    assert (p[~mask] == 0).all()
    assert float(p.double().sum()) == pytest.approx(float(mask.any()), abs=1e-5)
    if mask.any():
        assert float(p[mask].min()) >= floor / int(mask.sum()) * (1 - 1e-5)


@pytest.mark.parametrize(
    ("num_rows", "keep_ratio", "min_rows", "expected"),
    [
        (1000, 0.3, 10, 300),
        (10, 0.3, 1, 3),
        (100, 0.29, 10, 29),
        (100, 0.57, 10, 57),
        (99, 0.3, 10, 29),
        (20, 0.1, 10, 10),
        (5, 0.1, 10, 5),
        (5, 0.1, 0, 1),
        (7, 1.0, 10, 7),
        (0, 0.5, 10, 0),
    ],
)
def test_budget(num_rows: int, keep_ratio: float, min_rows: int, expected: int) -> None:
    assert budget(num_rows, keep_ratio, min_rows) == expected
