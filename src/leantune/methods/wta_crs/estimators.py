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

Estimator = Literal["wta", "crs", "topk"]

_FLOAT32_EPS = torch.finfo(torch.float32).eps


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
    """Choose k of n rows by one of the paper's estimators.

    ``E[sum_t w_t f(row t)] = sum_i f(i)`` for every f that is zero where p is zero, except with
    "topk". With ``tail`` the mass outside the deterministic set, the draws are:

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


def deterministic_size(scores_sorted: Tensor, k: int) -> Tensor:
    """Return c, how many of the heaviest rows are kept with certainty: () int64 in [0, k].

    With ``tail_c`` the mass behind the c heaviest rows, c is the first minimum over ``0 <= c < k``
    of ``tail_c / (k - c)``, which bounds the variance. Where at most k rows have mass, c is their
    number and the estimate is exact.

    Args:
        scores_sorted: (n,) float32, non-negative, descending; any total.
        k: kept rows, in [1, n].

    Source: arXiv 2305.15265, the theorem's variance bound and its minimiser.
    """
    n = scores_sorted.numel()
    assert 1 <= k <= n, (k, n)
    num_positive = torch.count_nonzero(scores_sorted[:k])
    if k == n:
        return num_positive
    # Summed from the small end: ``1 - head`` would leave rounding noise where the tail is empty.
    tail = scores_sorted.flip(0).cumsum(0).flip(0)
    objective = tail[:k] / torch.arange(k, 0, -1, device=scores_sorted.device)
    return torch.where(scores_sorted[k] == 0, num_positive, objective.argmin())


def tail_mass(scores_sorted: Tensor, order: Tensor, c: Tensor) -> Tensor:
    """Return the scores (n,) in the order of the rows, 0 on the c heaviest."""
    in_tail = torch.arange(scores_sorted.numel(), device=scores_sorted.device) >= c
    return torch.zeros_like(scores_sorted).scatter(0, order, scores_sorted * in_tail)


def draw_at(points: Tensor, mass: Tensor, num_draws: Tensor) -> tuple[Tensor, Tensor]:
    """Return the rows (k,) int64 that points (k,) hit, and the mass per draw, (1,).

    Rows lie side by side on an axis from 0 to ``num_draws``, each as long as its share of the mass
    (n,): one of mass 0 is never hit.
    """
    edges = mass.cumsum(0)
    total = edges[-1:]
    interval = total / num_draws.clamp(min=1)
    # Rounding may put the last point on the far edge, where it would hit no row.
    points = torch.minimum(points * interval, total * (1.0 - _FLOAT32_EPS))
    # The first edge above the point: a row without mass adds no edge.
    hit = torch.searchsorted(edges, points, right=True).clamp(max=mass.numel() - 1)
    return hit, interval


def with_deterministic_set(
    scores: Tensor, heaviest: Tensor, c: Tensor, drawn: Tensor, interval: Tensor
) -> tuple[Tensor, Tensor]:
    """Return indices (k,) int32 and weights (k,) float32: the c heaviest rows, then drawn ones.

    Of ``heaviest`` (k,) the first c are read, of ``drawn`` (k,) the others; ``interval`` (1,) is
    the mass per draw of scores (n,).
    """
    is_sure = torch.arange(len(heaviest), device=scores.device) < c
    # An empty tail leaves nothing to draw: point at a row that is kept anyway, with weight 0.
    indices = torch.where(is_sure, heaviest, torch.where(interval > 0, drawn, heaviest[:1]))
    kept = scores.gather(0, indices)
    weights = torch.where(is_sure, kept, interval)
    return indices.to(torch.int32), torch.where(kept == 0, 0.0, weights / kept)
