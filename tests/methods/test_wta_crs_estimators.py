"""The paper's estimators against float64 oracles: bias, variance, structure and the edges."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import wta_crs as oracle
from stats import aggregate_check, mean_check
from torch import Tensor

from leantune.methods.wta_crs.estimators import (
    Estimator,
    budget,
    deterministic_size,
    draw_at,
    probabilities,
    sample,
    tail_mass,
    with_deterministic_set,
)
from leantune.ops.random import RandomKey

REPLACED: list[Estimator] = ["crs", "wta"]
EVERY: list[Estimator] = [*REPLACED, "topk"]
NUM_ROWS, BUDGET = 64, 20
# Float32 weights and probabilities: the expectation itself is off by about this much.
FLOAT32_NOISE = 1e-6

each = pytest.mark.parametrize("estimator", EVERY)
# Plain column-row sampling may repeat a row at any budget, so it has no exact case.
each_with_exact_case = pytest.mark.parametrize("estimator", [e for e in EVERY if e != "crs"])


def distribution(scores: np.ndarray, floor: float = 0.0) -> Tensor:
    return probabilities(torch.from_numpy(scores), None, floor)


def example(log_std: float = 1.0, seed: int = 0) -> Tensor:
    return distribution(oracle.norm_products(*oracle.example_rows(NUM_ROWS, log_std, seed)))


def draws(p: Tensor, k: int, estimator: Estimator, num_draws: int) -> tuple[Tensor, Tensor]:
    """Return indices and weights (num_draws, k) of consecutive draws."""

    def one(number: Tensor) -> tuple[Tensor, Tensor]:
        return sample(p, k, estimator, RandomKey(5, number, 7))

    return torch.func.vmap(one)(torch.arange(num_draws))


def totals(sampled: tuple[Tensor, Tensor], n: int = NUM_ROWS) -> np.ndarray:
    """Return the total weight of every row in every draw, (num_draws, n)."""
    indices, weights = sampled
    out = torch.zeros(len(indices), n, dtype=torch.float64)
    return out.scatter_add_(1, indices.long(), weights.double()).numpy()


def size(p: Tensor, k: int, estimator: Estimator) -> int:
    if estimator in ("crs", "topk"):
        return 0 if estimator == "crs" else k
    return int(deterministic_size(p.sort(descending=True).values, k))


# Bias and variance; those of the systematic estimator are tested with ``sample_rows``.


@pytest.mark.parametrize("estimator", REPLACED)
@pytest.mark.parametrize("source", ["exact", "random", "input_norm", "stale"])
def test_estimate_is_unbiased_for_any_probabilities(estimator: Estimator, source: str) -> None:
    h, g = oracle.example_rows(NUM_ROWS, 1.0)
    p = distribution(oracle.wrong_scores(source, h, g))
    indices, weights = draws(p, BUDGET, estimator, 10_000)
    counted = totals((indices, weights))
    exact = oracle.grad_weight(h, g).reshape(-1)
    noise = FLOAT32_NOISE * float(np.abs(exact).max())
    got = oracle.estimates(counted, h, g)
    assert mean_check(got, exact, resolution=noise).ok
    # In expectation every row counts once.
    assert mean_check(counted, np.ones(NUM_ROWS), resolution=FLOAT32_NOISE).ok
    x, p64 = oracle.outer_products(h, g), p.double().numpy()
    chosen = oracle.heaviest(p64, size(p, BUDGET, estimator))
    assert aggregate_check(got, exact, oracle.variance(x, p64, BUDGET, chosen)).ok

    # Without the factor 1 / ((k - c) p) the same rows give a biased estimate.
    got = oracle.estimates(totals((indices, torch.where(weights == 1, 1.0, 0.5))), h, g)
    assert not mean_check(got, exact, resolution=noise).ok
    assert not aggregate_check(got, exact, got.var(0).sum()).ok


@pytest.mark.parametrize("estimator", REPLACED)
@pytest.mark.parametrize("source", ["exact", "input_norm"])
def test_variance_equals_the_closed_form(estimator: Estimator, source: str) -> None:
    h, g = oracle.example_rows(NUM_ROWS, 1.0)
    p = distribution(oracle.wrong_scores(source, h, g))
    x, p64 = oracle.outer_products(h, g), p.double().numpy()
    chosen = oracle.heaviest(p64, size(p, BUDGET, estimator))
    counted = totals(draws(p, BUDGET, estimator, 40_000))
    error = oracle.squared_errors(counted, h, g).mean()
    assert 0.97 < error / oracle.variance(x, p64, BUDGET, chosen) < 1.03
    # The control: two rows more to draw is another variance.
    assert not 0.97 < error / oracle.variance(x, p64, BUDGET + 2, chosen) < 1.03


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
def test_variance_bound_holds_for_any_probabilities(data: st.DataObject) -> None:
    n = data.draw(st.integers(2, 30))
    k = data.draw(st.integers(1, n - 1))
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1)))
    h, g = oracle.example_rows(n, 1.0, seed=int(rng.integers(2**32)))
    p = distribution(np.exp(rng.normal(size=n) * 2))
    p64, x = p.double().numpy(), oracle.outer_products(h, g)
    chosen = oracle.heaviest(p64, size(p, k, "wta"))
    bound = (1 - p64[list(chosen)].sum()) * k / (k - len(chosen))
    crs = oracle.variance(x, p64, k, set())
    assert oracle.variance(x, p64, k, chosen) <= bound * crs * (1 + 1e-5)
    assert bound <= 1 + 1e-5


def test_topk_is_biased_and_has_no_luck_in_it() -> None:
    h, g = oracle.example_rows(NUM_ROWS, 1.0)
    p = example()
    indices, weights = draws(p, BUDGET, "topk", 2)
    counted = totals((indices, weights))
    assert set(counted[0].nonzero()[0]) == oracle.heaviest(p.double().numpy(), BUDGET)
    assert (weights == 1).all() and torch.equal(indices[0], indices[1])
    got = oracle.estimates(counted, h, g)
    assert not mean_check(got, oracle.grad_weight(h, g).reshape(-1)).ok


# Structure.


@pytest.mark.parametrize("estimator", REPLACED)
@pytest.mark.parametrize("log_std", [0.0, 1.0, 3.0])
def test_structure(estimator: Estimator, log_std: float) -> None:
    p = example(log_std, seed=5)
    indices, weights = draws(p, BUDGET, estimator, 2000)
    c = size(p, BUDGET, estimator)
    assert indices.dtype == torch.int32 and weights.dtype == torch.float32
    assert indices.shape == weights.shape == (2000, BUDGET)
    order = torch.sort(p, descending=True, stable=True).indices
    assert (indices[:, :c] == order[:c]).all() and (weights[:, :c] == 1).all()
    # A draw never repeats a row that is kept for sure; it may repeat another.
    drawn, p64 = indices[:, c:], p.double()
    assert not torch.isin(drawn, order[:c].to(torch.int32)).any()
    wanted = p64[order[c:]].sum() / ((BUDGET - c) * p64[drawn.long()])
    torch.testing.assert_close(weights[:, c:].double(), wanted, rtol=1e-5, atol=0)
    if log_std < 3:
        assert min(len(set(line.tolist())) for line in indices) < BUDGET


@each
def test_nothing_is_read_on_the_host(estimator: Estimator) -> None:
    scores = torch.empty(50, device="meta")
    p = probabilities(scores, torch.empty(50, dtype=torch.bool, device="meta"), 0.1)
    key = RandomKey(0, torch.empty((), dtype=torch.int64, device="meta"))
    assert sample(p, 12, estimator, key)[1].shape == (12,)


@each
# Dynamo warns of any cached function; the one that mixes seed and stream is pure.
@pytest.mark.filterwarnings("ignore:Dynamo detected a call to a .functools.lru_cache")
def test_compiles_in_one_graph(estimator: Estimator) -> None:
    mask = torch.arange(50) % 5 > 0

    def step(scores: Tensor, counter: Tensor) -> tuple[Tensor, Tensor]:
        return sample(probabilities(scores, mask, 0.05), 12, estimator, RandomKey(0, counter, 1))

    torch._dynamo.reset()
    compiled = torch.compile(step, backend="eager", fullgraph=True)
    scores = torch.rand(50)
    for counter in (torch.tensor(1), torch.tensor(2)):
        for a, b in zip(compiled(scores, counter), step(scores, counter), strict=True):
            assert torch.equal(a, b)


# The deterministic set, and the parts of a draw.


@settings(max_examples=300, deadline=None, derandomize=True)
@given(st.data())
def test_size_equals_brute_force_and_greedy(data: st.DataObject) -> None:
    n = data.draw(st.integers(2, 40))
    k = data.draw(st.integers(1, n - 1))
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1)))
    spread = data.draw(st.sampled_from([0.0, 0.01, 0.5, 1.0, 2.0, 4.0]))
    p = np.sort(np.exp(spread * rng.normal(size=n)))[::-1].copy()
    p *= data.draw(st.sampled_from([1.0, 1e-20, 1e20])) / p.sum()
    c = int(deterministic_size(torch.from_numpy(p), k))
    least = oracle.objective(p, k, oracle.brute_force_size(p, k))
    for found in (c, oracle.greedy_size(p, k)):
        assert oracle.objective(p, k, found) <= least * (1 + 1e-12)
    assert 0 <= c < k
    if p[0] * k > p.sum() * (1 + 1e-9):
        assert c >= 1
    # Inclusion probabilities: no row of the tail is expected twice.
    assert (k - c) * p[c] <= p[c:].sum() * (1 + 1e-9)


def test_tail_mass_lies_in_the_order_of_the_rows() -> None:
    scores = torch.tensor([1.0, 4.0, 2.0, 3.0])
    values, order = scores.sort(descending=True)
    assert tail_mass(values, order, torch.tensor(2)).tolist() == [1.0, 0.0, 2.0, 0.0]
    assert tail_mass(values, order, torch.tensor(0)).equal(scores)


@pytest.mark.parametrize(("point", "row"), [(0.0, 1), (0.999, 1), (1.0, 2), (2.5, 3), (4.0, 3)])
def test_points_hit_the_row_whose_stretch_they_lie_in(point: float, row: int) -> None:
    """A row without mass has no stretch, and rounding beyond the end hits the last that has one."""
    mass = torch.tensor([0.0, 2.0, 2.0, 4.0, 0.0])
    rows, interval = draw_at(torch.tensor([point]), mass, torch.tensor(4))
    assert rows.tolist() == [row] and interval.tolist() == [2.0]


@pytest.mark.parametrize("number", [0.0, 0.5, 1 - 2**-24])
def test_extreme_points_stay_inside(number: float) -> None:
    mass = torch.from_numpy(oracle.norm_products(*oracle.example_rows(1000, 1.0))).float()
    mass[:7] = mass[-7:] = 0
    rows, _ = draw_at(torch.arange(300) + number, mass, torch.tensor(300))
    assert (mass[rows] > 0).all()


def test_an_empty_tail_is_not_drawn_from() -> None:
    rows, interval = draw_at(torch.arange(3) + 0.5, torch.zeros(5), torch.tensor(0))
    assert interval.item() == 0 and (rows < 5).all()
    scores, heaviest = torch.tensor([0.0, 7.0, 0.0, 0.0, 0.0]), torch.tensor([1, 0, 2])
    indices, weights = with_deterministic_set(scores, heaviest, torch.tensor(1), rows, interval)
    assert indices.tolist() == [1, 1, 1] and weights.tolist() == [1.0, 0.0, 0.0]


def test_weights_of_sure_and_drawn_rows() -> None:
    scores, heaviest = torch.tensor([1.0, 8.0, 2.0, 4.0]), torch.tensor([1, 3, 2])
    drawn, interval = torch.tensor([3, 2, 0]), torch.tensor([3.5])
    indices, weights = with_deterministic_set(scores, heaviest, torch.tensor(1), drawn, interval)
    assert indices.tolist() == [1, 2, 0] and indices.dtype == torch.int32
    assert weights.tolist() == [1.0, 3.5 / 2, 3.5]


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
    assert (counted == scores.double().numpy()).all()


@each
def test_one_row_and_one_position(estimator: Estimator) -> None:
    indices, weights = draws(torch.ones(1), 1, estimator, 5)
    assert (indices == 0).all() and (weights == 1).all()
    counted = totals(draws(distribution(np.array([1.0, 2.0, 3.0])), 1, estimator, 20_000), 3)
    if estimator == "topk":
        assert (counted == [0, 0, 1]).all()
    else:
        assert mean_check(counted, np.ones(3), resolution=FLOAT32_NOISE).ok


@each
def test_masked_rows_are_never_selected(estimator: Estimator) -> None:
    h, g = oracle.example_rows(NUM_ROWS, 1.0)
    mask = torch.arange(NUM_ROWS) % 3 > 0
    p = probabilities(torch.from_numpy(oracle.norm_products(h, g)), mask, 0.1)
    counted = totals(draws(p, BUDGET, estimator, 5000))
    assert (counted[:, ~mask.numpy()] == 0).all()
    if estimator != "topk":
        assert mean_check(counted, mask.double().numpy(), resolution=FLOAT32_NOISE).ok


@each
def test_every_row_masked(estimator: Estimator) -> None:
    p = probabilities(torch.rand(NUM_ROWS), torch.zeros(NUM_ROWS, dtype=torch.bool), 0.1)
    assert (p == 0).all()
    assert (draws(p, BUDGET, estimator, 3)[1] == 0).all()


@each
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_not_a_number_reaches_the_weights(estimator: Estimator, value: float) -> None:
    mask = torch.arange(NUM_ROWS) != 2
    scores = torch.rand(NUM_ROWS)
    scores[1] = value
    p = probabilities(scores, mask, 0.1)
    assert p[mask].isnan().all() and p[2] == 0
    indices, weights = draws(p, BUDGET, estimator, 3)
    assert weights.isnan().all()
    assert indices.min() >= 0 and indices.max() < NUM_ROWS
    # A masked row may hold anything.
    scores = torch.rand(NUM_ROWS)
    scores[2] = value
    assert probabilities(scores, mask, 0.1).isfinite().all()


@each
def test_ties_go_to_the_lower_row(estimator: Estimator) -> None:
    p = distribution(np.repeat([8.0, 1.0], [10, 54]))
    c = size(p, BUDGET, estimator)
    assert c > 0 or estimator == "crs"
    assert (draws(p, BUDGET, estimator, 3)[0][:, :c] == torch.arange(c)).all()


# Probabilities and the budget.


def test_probabilities_follow_the_formula() -> None:
    scores = np.array([1.0, 0.0, 3.0, 6.0])
    np.testing.assert_allclose(distribution(scores).numpy(), [0.1, 0, 0.3, 0.6], rtol=1e-6)
    got = distribution(scores, 0.2).numpy()
    np.testing.assert_allclose(got, [0.13, 0.05, 0.29, 0.53], rtol=1e-6)
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
