"""Systematic sampling of rows against a float64 oracle, its parts at their edges, and row norms."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import wta_crs as oracle
from scipy.stats import norm
from stats import mean_check
from torch import Tensor

from leantune.ops.random import RandomKey
from leantune.ops.rows import (
    OuterProduct,
    deterministic_size,
    draw_at,
    row_norms,
    sample_rows,
    tail_mass,
    with_deterministic_set,
)

NUM_ROWS, BUDGET = 64, 20
# Float32 scores and weights: the expectation itself is off by about this much.
FLOAT32_NOISE = 1e-6


def example_scores(log_std: float = 1.0, seed: int = 0) -> Tensor:
    h, g = oracle.example_rows(NUM_ROWS, log_std, seed)
    return torch.from_numpy(oracle.norm_products(h, g)).float()


def draws(scores: Tensor, k: int, num_draws: int) -> tuple[Tensor, Tensor]:
    """Return indices and weights (num_draws, k) of consecutive draws."""

    def one(number: Tensor) -> tuple[Tensor, Tensor]:
        return sample_rows(scores, k, RandomKey(3, number, 11))

    return torch.func.vmap(one)(torch.arange(num_draws))


def totals(indices: Tensor, weights: Tensor, n: int) -> np.ndarray:
    """Return the total weight of every row in every draw, (num_draws, n)."""
    out = torch.zeros(len(indices), n, dtype=torch.float64)
    return out.scatter_add_(1, indices.long(), weights.double()).numpy()


def size(scores: Tensor, k: int) -> int:
    return int(deterministic_size(scores.sort(descending=True).values, k))


# Expectation and variance.


@pytest.mark.parametrize("source", ["exact", "random", "input_norm", "stale"])
@pytest.mark.parametrize("scale", [1.0, 1e-6])
def test_estimate_is_unbiased_for_any_scores(source: str, scale: float) -> None:
    h, g = oracle.example_rows(NUM_ROWS, 1.0)
    scores = torch.from_numpy(oracle.wrong_scores(source, h, g) * scale).float()
    indices, weights = draws(scores, BUDGET, 10_000)
    counted = totals(indices, weights, NUM_ROWS)
    exact = oracle.grad_weight(h, g).reshape(-1)
    noise = FLOAT32_NOISE * float(np.abs(exact).max())
    assert mean_check(oracle.estimates(counted, h, g), exact, resolution=noise).ok
    # In expectation every row counts once.
    assert mean_check(counted, np.ones(NUM_ROWS), resolution=FLOAT32_NOISE).ok
    # The control: the same rows with weight 1.
    counted = totals(indices, torch.ones_like(weights), NUM_ROWS)
    assert not mean_check(oracle.estimates(counted, h, g), exact, resolution=noise).ok


def test_scores_alike_need_no_deterministic_set() -> None:
    _, weights = draws(torch.full((NUM_ROWS,), 1 / NUM_ROWS), BUDGET, 10)
    torch.testing.assert_close(weights, torch.full_like(weights, NUM_ROWS / BUDGET))


def test_variance_is_that_of_the_slow_sampler() -> None:
    h, g = oracle.example_rows(NUM_ROWS, 1.0)
    p = oracle.norm_products(h, g)
    chosen = oracle.heaviest(p, oracle.brute_force_size(p, BUDGET))
    rng = np.random.default_rng(0)
    slow = np.stack([oracle.draw_systematic(p, BUDGET, chosen, rng) for _ in range(2000)])
    replaced = np.stack([oracle.draw_with_replacement(p, BUDGET, chosen, rng) for _ in range(1000)])
    exact = oracle.grad_weight(h, g).reshape(-1)
    assert mean_check(oracle.estimates(slow, h, g), exact).ok
    fast = totals(*draws(torch.from_numpy(p).float(), BUDGET, 10_000), NUM_ROWS)

    def differ(reference: np.ndarray) -> bool:
        a, b = (oracle.squared_errors(t, h, g) for t in (fast, reference))
        return abs(a.mean() - b.mean()) / math.sqrt(a.var() / len(a) + b.var() / len(b)) > 4.9

    assert not differ(slow)
    # The control: sampling with replacement has a larger variance.
    assert differ(replaced)


def test_variance_on_spread_norms_is_below_the_papers() -> None:
    n, k = 1024, 307
    h, g = oracle.example_rows(n, 0.0)
    # The quantiles themselves: the ratio of 1024 random norms would vary from seed to seed.
    quantiles = norm.ppf((np.arange(n) + 0.5) / n)
    g *= np.exp(2 * np.random.default_rng(1).permutation(quantiles))[:, None]
    p = oracle.norm_products(h, g)
    p /= p.sum()
    chosen = oracle.heaviest(p, oracle.brute_force_size(p, k))
    paper = oracle.variance(oracle.outer_products(h, g), p, k, chosen)
    counted = totals(*draws(torch.from_numpy(p).float(), k, 600), n)
    assert oracle.squared_errors(counted, h, g).mean() <= 0.65 * paper


def test_neighbours_that_are_alike_lower_the_variance() -> None:
    n, k = 256, 77
    h, g = (np.repeat(t, 8, axis=0) for t in oracle.example_rows(n // 8, 0.3))

    def variance(order: np.ndarray) -> float:
        scores = torch.from_numpy(oracle.norm_products(h[order], g[order])).float()
        counted = totals(*draws(scores, k, 1000), n)
        return float(oracle.squared_errors(counted, h[order], g[order]).mean())

    shuffled = np.random.default_rng(0).permutation(n)
    assert variance(np.arange(n)) < 0.5 * variance(shuffled)


# The deterministic set.


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


@pytest.mark.parametrize("num_positive", [0, 1, BUDGET - 1, BUDGET])
def test_no_more_rows_than_the_budget_are_exact(num_positive: int) -> None:
    scores = torch.zeros(NUM_ROWS)
    scores[torch.randperm(NUM_ROWS)[:num_positive]] = 2.5
    indices, weights = draws(scores, BUDGET, 20)
    assert size(scores, BUDGET) == num_positive
    assert (totals(indices, weights, NUM_ROWS) == (scores > 0).double().numpy()).all()
    # Idle positions point at a row that is kept anyway.
    if num_positive:
        assert (scores[indices.long()] > 0).all()


def test_tail_mass_lies_in_the_order_of_the_rows() -> None:
    scores = torch.tensor([1.0, 4.0, 2.0, 3.0])
    values, order = scores.sort(descending=True)
    assert tail_mass(values, order, torch.tensor(2)).tolist() == [1.0, 0.0, 2.0, 0.0]
    assert tail_mass(values, order, torch.tensor(0)).equal(scores)


# The structure of a sample.


@pytest.mark.parametrize("log_std", [0.0, 1.0, 3.0])
def test_structure(log_std: float) -> None:
    scores = example_scores(log_std, seed=5)
    indices, weights = draws(scores, BUDGET, 2000)
    c = size(scores, BUDGET)
    assert indices.dtype == torch.int32 and weights.dtype == torch.float32
    assert indices.shape == weights.shape == (2000, BUDGET)
    assert indices.min() >= 0 and indices.max() < NUM_ROWS
    assert min(len(set(line.tolist())) for line in indices) == BUDGET
    order = torch.sort(scores, descending=True, stable=True).indices
    assert (indices[:, :c] == order[:c]).all() and (weights[:, :c] == 1).all()
    s = scores.double()
    wanted = s[order[c:]].sum() / ((BUDGET - c) * s[indices[:, c:].long()])
    torch.testing.assert_close(weights[:, c:].double(), wanted, rtol=1e-5, atol=0)


def test_one_dominating_row_does_not_swallow_the_tail() -> None:
    scores = torch.ones(NUM_ROWS)
    scores[9] = 1e9
    indices, weights = draws(scores, BUDGET, 100)
    assert (indices[:, 0] == 9).all() and size(scores, BUDGET) == 1
    # 1e9 + 63 is 1e9 in float32; the mass of the tail, summed by itself, is not lost.
    torch.testing.assert_close(weights[:, 1:], torch.full_like(weights[:, 1:], 63 / 19))


def test_nothing_is_read_on_the_host() -> None:
    key = RandomKey(0, torch.empty((), dtype=torch.int64, device="meta"))
    indices, weights = sample_rows(torch.empty(50, device="meta"), 12, key)
    assert indices.shape == weights.shape == (12,)
    # The control: an index by c is a host read, which this device refuses.
    with pytest.raises(RuntimeError):
        torch.empty(50, device="meta")[deterministic_size(torch.empty(50, device="meta"), 12)]


# Dynamo warns of any cached function; the one that mixes seed and stream is pure.
@pytest.mark.filterwarnings("ignore:Dynamo detected a call to a .functools.lru_cache")
def test_compiles_in_one_graph() -> None:
    def step(scores: Tensor, counter: Tensor) -> tuple[Tensor, Tensor]:
        return sample_rows(scores, 12, RandomKey(0, counter, 1))

    torch._dynamo.reset()
    compiled = torch.compile(step, backend="eager", fullgraph=True)
    scores = example_scores()
    for counter in (torch.tensor(1), torch.tensor(2)):
        for a, b in zip(compiled(scores, counter), step(scores, counter), strict=True):
            assert torch.equal(a, b)


# The parts of a draw.


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


# What samples are made of, and what becomes of them.


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_row_norms_accumulate_in_float32(dtype: torch.dtype) -> None:
    x = torch.randn(5, 3000).to(dtype)
    x[1] = 0
    x[2] = 300  # the square overflows float16
    norms = row_norms(x)
    assert norms.dtype == torch.float32 and norms.shape == (5,)
    torch.testing.assert_close(norms.double(), x.double().norm(dim=1), rtol=1e-6, atol=0)
    assert row_norms(x[:0]).shape == (0,)


def test_an_outer_product_is_multiplied_out_in_its_scale() -> None:
    g, h = torch.full((2, 3), 3e4), torch.full((2, 4), 2.0)
    assert torch.equal(OuterProduct(g, h).dense(), g.t() @ h)
    half = OuterProduct(g.half() / 4, h.half(), torch.tensor(4.0)).dense()
    # 120,000 is beyond float16: the scale is applied in float32.
    assert half.dtype == torch.float32
    torch.testing.assert_close(half, g.t() @ h, rtol=1e-3, atol=0)
