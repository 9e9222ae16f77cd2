"""Systematic sampling of rows against a float64 oracle, its parts at their edges, and row norms."""

import math

import numpy as np
import pytest
import torch
from oracles import wta_crs as oracle
from scipy.stats import norm
from stats import mean_check
from torch import Tensor

from leantune.ops.random import RandomKey
from leantune.ops.rows import (
    OuterProduct,
    pick_rows,
    row_norms,
    sample_rows,
    score_rows,
    update_norms,
)

NUM_ROWS, BUDGET = 64, 20
# Float32 scores and weights: the expectation itself is off by about this much.
FLOAT32_NOISE = 1e-6


def example_scores(log_std: float = 1.0, seed: int = 0) -> Tensor:
    h, g = oracle.example_rows(NUM_ROWS, log_std, seed)
    return torch.from_numpy(oracle.norm_products(h, g)).float()


def draws(scores: Tensor, k: int, num_draws: int, floor: float = 0.0) -> tuple[Tensor, Tensor]:
    """Return indices and weights (num_draws, k) of consecutive draws."""
    keys = [RandomKey(3, i, 11) for i in torch.arange(num_draws)]
    drawn = [sample_rows(scores, k, key, floor=floor) for key in keys]
    indices, weights = zip(*drawn, strict=True)
    return torch.stack(indices), torch.stack(weights)


def totals(indices: Tensor, weights: Tensor, n: int) -> np.ndarray:
    """Return the total weight of every row in every draw, (num_draws, n)."""
    out = torch.zeros(len(indices), n, dtype=torch.float64)
    return out.scatter_add_(1, indices.long(), weights.double()).numpy()


# Expectation and variance.


@pytest.mark.parametrize(
    ("source", "scale"),
    [("exact", 1.0), ("random", 1.0), ("input_norm", 1.0), ("stale", 1.0), ("stale", 1e-6)],
)
def test_estimate_is_unbiased_for_any_scores(source: str, scale: float) -> None:
    h, g = oracle.example_rows(NUM_ROWS, 1.0)
    scores = torch.from_numpy(oracle.wrong_scores(source, h, g) * scale).float()
    indices, weights = draws(scores, BUDGET, 5000)
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


@pytest.mark.parametrize("scale", [1.0, 1e-20, 1e20])
@pytest.mark.parametrize("log_std", [0.0, 0.01, 1.0, 3.0])
@pytest.mark.parametrize(("n", "k"), [(2, 1), (30, 3), (64, 20), (64, 63)])
def test_probabilities_are_those_of_the_smallest_bound(
    n: int, k: int, log_std: float, scale: float
) -> None:
    p = oracle.norm_products(*oracle.example_rows(n, log_std, seed=n + k)) * scale
    # Scores as they are counted: in units of 2**-30 of the largest.
    units = np.floor((p.astype(np.float32) / p.max().astype(np.float32)).astype(np.float64) * 2**30)
    c = oracle.brute_force_size(units, k)
    tau = oracle.objective(units, k, c)
    wanted = 1 / np.minimum(units / tau, 1)
    for counter in range(3):
        key = RandomKey(1, torch.tensor(counter))
        indices, weights = sample_rows(torch.from_numpy(p).float(), k, key)
        np.testing.assert_allclose(weights.numpy(), wanted[indices.numpy()], rtol=2e-6)
        # The c heaviest are there, in every draw.
        assert oracle.heaviest(p, c) <= set(indices.tolist())


@pytest.mark.parametrize("num_positive", [0, 1, BUDGET - 1, BUDGET])
def test_no_more_rows_than_the_budget_are_exact(num_positive: int) -> None:
    scores = torch.zeros(NUM_ROWS)
    scores[torch.randperm(NUM_ROWS)[:num_positive]] = 2.5
    indices, weights = draws(scores, BUDGET, 20)
    assert (totals(indices, weights, NUM_ROWS) == (scores > 0).double().numpy()).all()


def test_a_row_below_the_resolution_is_never_drawn() -> None:
    scores = torch.ones(NUM_ROWS)
    scores[5] = 2.0**-31
    assert not (draws(scores, BUDGET, 200)[0] == 5).any()
    scores[5] = 0.1
    assert (draws(scores, BUDGET, 200)[0] == 5).any()


# The structure of a sample.


@pytest.mark.parametrize("log_std", [0.0, 1.0, 3.0])
def test_structure(log_std: float) -> None:
    indices, weights = draws(example_scores(log_std, seed=5), BUDGET, 500)
    assert indices.dtype == torch.int32 and weights.dtype == torch.float32
    assert indices.shape == weights.shape == (500, BUDGET)
    assert indices.min() >= 0 and indices.max() < NUM_ROWS
    assert (indices.diff() > 0).all() and (weights >= 1).all()


def test_one_dominating_row_does_not_swallow_the_tail() -> None:
    scores = torch.ones(NUM_ROWS)
    scores[9] = 1e7
    indices, weights = draws(scores, BUDGET, 100)
    assert ((indices == 9) == (weights == 1)).all() and (weights == 1).sum() == 100
    # 1e9 + 63 is 1e9 in float32; the mass of the tail is summed exactly.
    torch.testing.assert_close(
        weights[weights > 1], torch.full((1900,), 63 / 19), rtol=1e-2, atol=0
    )


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_scores_that_are_not_finite_are_seen(bad: float) -> None:
    scores = example_scores()
    scores[3] = bad
    indices, weights = draws(scores, BUDGET, 3)
    assert weights.isnan().all() and indices.min() >= 0 and indices.max() < NUM_ROWS


@pytest.mark.parametrize("number", [0.0, 0.5, 1 - 2**-24])
def test_extreme_points_hit_rows_that_have_a_score(
    number: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("leantune.ops.rows.first_word", lambda key: int(number * 2**24))
    scores = torch.from_numpy(oracle.norm_products(*oracle.example_rows(1000, 1.0))).float()
    scores[:7] = scores[-7:] = 0
    indices, weights = sample_rows(scores, 300, RandomKey(0, torch.tensor(0)))
    assert (scores[indices[weights > 0].long()] > 0).all()
    assert (weights > 0).sum() >= 299


# Rows that may not be drawn, and scores that are a guess.


def test_masked_rows_are_never_drawn_whatever_their_score() -> None:
    scores, real = example_scores(), torch.arange(NUM_ROWS) % 3 > 0
    masked = scores.clone()
    masked[::3] = math.nan
    for floor in (0.0, 0.1):
        for counter in range(20):
            key = RandomKey(0, torch.tensor(counter))
            indices, weights = sample_rows(masked, BUDGET, key, real=real, floor=floor)
            assert real[indices[weights > 0].long()].all()
            # As if they were not there.
            others = sample_rows(scores[real], BUDGET, key, floor=floor)
            assert torch.equal(torch.arange(NUM_ROWS)[real][others[0]], indices.long())
            torch.testing.assert_close(weights, others[1])
    indices, weights = sample_rows(scores, BUDGET, key, real=torch.zeros_like(real), floor=0.1)
    assert (weights == 0).all()


def test_a_floor_spreads_its_share_evenly() -> None:
    scores, floor = example_scores(3.0), 0.2
    p = (1 - floor) * scores.double() / scores.double().sum() + floor / NUM_ROWS
    indices, weights = draws(scores, 1, 200, floor=floor)
    torch.testing.assert_close(1 / weights.double(), p[indices.long()], rtol=1e-5, atol=0)
    # A floor alone: scores of 0 say nothing.
    for zeros in (torch.zeros(NUM_ROWS), torch.full((NUM_ROWS,), 1e-45)):
        weights = draws(zeros, BUDGET, 5, floor=floor)[1]
        torch.testing.assert_close(weights, torch.full_like(weights, NUM_ROWS / BUDGET))


def test_scores_know_what_is_known_of_the_gradient() -> None:
    x, grad = torch.randn(6, 5), torch.randn(6, 4)
    norms = x.norm(dim=1)
    torch.testing.assert_close(score_rows(x), norms)
    torch.testing.assert_close(score_rows(x, grad), norms * grad.norm(dim=1))
    guess = torch.tensor([1.0, 2.0, 3.0])
    torch.testing.assert_close(score_rows(x, guess), norms * torch.tensor([1.0, 2, 3, 1, 2, 3]))


@pytest.mark.parametrize("is_masked", [False, True])
def test_a_guess_follows_the_norms_of_the_real_rows(is_masked: bool) -> None:
    norms, guess = torch.rand(4, 3).double() + 0.5, torch.tensor([1.0, 2.0, 0.5])
    real = torch.ones(4, 3, dtype=torch.bool)
    if is_masked:
        real[1:, 1] = real[:, 2] = False
    squares = np.where(real.numpy(), norms.numpy() ** 2, 0)
    with np.errstate(invalid="ignore"):
        relative = squares.sum(0) / real.numpy().sum(0) / (squares.sum() / real.numpy().sum())
    wanted = np.sqrt(0.75 * guess.double().numpy() ** 2 + 0.25 * relative)
    wanted[2] = 0.5 if is_masked else wanted[2]  # no real row was there
    update_norms(guess, norms.flatten().float(), 0.75, real.flatten() if is_masked else None)
    torch.testing.assert_close(guess.double(), torch.from_numpy(wanted), rtol=1e-6, atol=0)
    before = guess.clone()
    update_norms(guess, torch.tensor([1.0, math.inf, 2.0]), 0.75)
    update_norms(guess, torch.zeros(6), 0.75)
    assert torch.equal(guess, before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_picked_rows_meet_their_weights_in_float32(dtype: torch.dtype) -> None:
    grad, weights = torch.randn(9, 4).to(dtype), torch.tensor([1.0, 1.0 + 2**-12, 3.3])
    indices = torch.tensor([8, 0, 3], dtype=torch.int32)
    wanted = (grad[[8, 0, 3]].double() * weights.double()[:, None]).to(dtype)
    assert torch.equal(pick_rows(grad, indices, weights, dtype), wanted)


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
