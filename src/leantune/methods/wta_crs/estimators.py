"""Winner-take-all column-row sampling: budget, probabilities and the paper's own estimators.

Dimension letters: n rows (batch times tokens), k kept rows (the budget), c rows of the
deterministic set, t position among the kept rows.

A weight gradient is a sum over rows, ``grad_weight = sum_i X_i`` with ``X_i`` the outer product of
row i of the output gradient and row i of the input. Keeping k rows with weights w estimates it as
``sum_t w_t X_(row t)``. The c heaviest rows are kept with certainty and weight 1; the other k - c
are drawn from the tail, with weights that make the estimate unbiased for every p that is positive
wherever X_i is not zero.

Source for the whole file: WTA-CRS, arXiv 2305.15265. The default estimator, systematic sampling of
the tail, is :func:`leantune.ops.rows.sample_rows`.
"""

import math
from typing import Literal

import torch
from torch import Tensor

from leantune.ops.random import RandomKey, uniform
from leantune.ops.rows import (
    deterministic_size,
    draw_at,
    sample_rows,
    tail_mass,
    with_deterministic_set,
)

Estimator = Literal["systematic", "wta", "crs", "topk"]


def budget(n: int, keep_ratio: float, min_rows: int = 10) -> int:
    """Return how many rows to keep: ``min(max(floor(keep_ratio * n), min_rows, 1), n)``.

    Args:
        n: rows there are, >= 0.
        keep_ratio: in (0, 1].
        min_rows: never keep fewer than this, as long as there are as many.
    """
    # 0.29 * 100 is 28.999999999999996 in floating point; four units of rounding undo that.
    share = math.floor(keep_ratio * n * (1 + 2**-50))
    return min(max(share, min_rows, 1), n)


def probabilities(scores: Tensor, row_mask: Tensor | None, floor: float) -> Tensor:
    """Return sampling probabilities proportional to the scores, mixed with a uniform floor.

    ``p_i = (1 - floor) * scores_i / sum(scores) + floor / num_allowed`` over the allowed rows.
    Scores that are all zero give the uniform distribution.

    Args:
        scores: (n,) any floating dtype, non-negative; the ratio to the largest one is taken first,
            so that no magnitude of float32 overflows or vanishes.
        row_mask: (n,) bool, True where a row may be selected; None allows every row.
        floor: in [0, 1); above 0 it bounds the weights of rows whose score is far too small.

    Returns:
        (n,) float32 with sum 1; exactly 0 on masked rows; all 0 if every row is masked; NaN on
        every allowed row if the score of one of them is not finite.

    Source: arXiv 2305.15265, optimal column-row probabilities; the floor is an addition.
    """
    allowed = torch.ones_like(scores, dtype=torch.bool) if row_mask is None else row_mask
    scores = scores.to(torch.float32).masked_fill(~allowed, 0.0)
    largest = scores.amax()
    share = torch.where(largest == 0, allowed.to(torch.float32), scores / largest)
    # The largest share is 1, so the sum is at least 1 unless every row is masked.
    p = share / share.sum().clamp(min=1.0)
    if floor > 0:
        p = (1.0 - floor) * p + floor / allowed.sum().clamp(min=1)
    return p.masked_fill(~allowed, 0.0)


def sample(p: Tensor, k: int, estimator: Estimator, key: RandomKey) -> tuple[Tensor, Tensor]:
    """Choose k of n rows by the estimator that was asked for.

    ``E[sum_t w_t f(row t)] = sum_i f(i)`` for every f that is zero where p is zero, except with
    "topk". With ``tail`` the mass outside the deterministic set, the draws are:

    - "systematic": see :func:`leantune.ops.rows.sample_rows`;
    - "wta": k - c rows with replacement, weight ``tail / ((k - c) p_i)``;
    - "crs": the same with c = 0;
    - "topk": none, the k heaviest rows have weight 1; biased, and there for comparison.

    Args:
        p: (n,) float32, non-negative, any total; NaN gives NaN weights.
        k: kept rows, in [1, n].
        estimator: see above.
        key: of the random numbers.

    Returns:
        indices (k,) int32 in [0, n), repeats possible with "crs" and "wta"; and weights (k,)
        float32, non-negative.

    Source: arXiv 2305.15265 for "wta" and "crs".
    """
    if estimator == "systematic":
        return sample_rows(p, k, key)
    p_sorted, order = torch.sort(p, descending=True, stable=True)
    heaviest = order[:k]
    if estimator == "topk":
        p_kept = p_sorted[:k]
        return heaviest.to(torch.int32), torch.where(p_kept == 0, 0.0, p_kept / p_kept)
    if estimator == "crs":
        c, mass = torch.zeros((), dtype=torch.int64, device=p.device), p
    else:
        c = deterministic_size(p_sorted, k)
        mass = tail_mass(p_sorted, order, c)
    drawn, interval = draw_at(uniform(key, k) * (k - c), mass, k - c)
    return with_deterministic_set(p, heaviest, c, drawn, interval)
