"""Winner-take-all column-row sampling: the estimator as pure, static-shape, sync-free functions.

Dimension letters: n rows (batch times tokens), k kept rows (the budget), c rows of the
deterministic set, t position among the kept rows.

A weight gradient is a sum over rows, ``grad_weight = sum_i X_i`` with ``X_i`` the outer product of
row i of the output gradient and row i of the input. Keeping k rows with weights w estimates it as
``sum_t w_t X_(row t)``. The c heaviest rows are kept with certainty and weight 1; the other k - c
are drawn from the tail, with weights that make the estimate unbiased for every p that is positive
wherever X_i is not zero.

Source for the whole file: WTA-CRS, arXiv 2305.15265.
"""

import math
from typing import Literal, NamedTuple

import torch
from torch import Tensor

Estimator = Literal["crs", "topk", "wta", "systematic"]
CRule = Literal["paper", "variance"]

_FLOAT32_EPS = torch.finfo(torch.float32).eps


class Selection(NamedTuple):
    """Which rows are kept, and how much each counts.

    Attributes:
        indices: (k,) int32, in [0, n); repeats are possible with "crs" and "wta".
        weights: (k,) float32, non-negative; exactly 1 at positions below ``num_deterministic``.
        num_deterministic: () int64, c, in [0, k].
    """

    indices: Tensor
    weights: Tensor
    num_deterministic: Tensor


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


def deterministic_size(p_sorted: Tensor, k: int, rule: CRule) -> tuple[Tensor, Tensor]:
    """Return how many of the heaviest rows to keep with certainty, and the mass of every tail.

    With ``tail_c`` the mass behind the c heaviest rows, the result is the first minimum over
    ``0 <= c < k`` of ``tail_c / (k - c)`` ("paper") or ``tail_c**2 / (k - c)`` ("variance", the
    variance itself when p is optimal and the tail's contributions cancel). Where at most k rows
    have mass, c is their number and the estimate is exact.

    Args:
        p_sorted: (n,) float32, non-negative, descending; any total.
        k: kept rows, in [1, n].
        rule: which quantity to minimise.

    Returns:
        c: () int64, in [0, k].
        tail: (n,) float32, ``tail[j] = p_sorted[j] + ... + p_sorted[n - 1]``, summed from the
            small end, since ``1 - head`` would leave rounding noise where the tail is empty.

    Source: arXiv 2305.15265, the theorem's variance bound and its minimiser; "variance" is not in
    the paper.
    """
    n = p_sorted.numel()
    assert 1 <= k <= n, (k, n)
    tail = p_sorted.flip(0).cumsum(0).flip(0)
    num_positive = torch.count_nonzero(p_sorted[:k])
    if k == n:
        return num_positive, tail
    mass = tail[:k] if rule == "paper" else tail[:k].square()
    objective = mass / torch.arange(k, 0, -1, device=p_sorted.device)
    return torch.where(p_sorted[k] == 0, num_positive, objective.argmin()), tail


def num_uniforms(k: int, estimator: Estimator) -> int:
    """Return how many uniform numbers ``select`` reads."""
    if estimator == "topk":
        return 0
    return 1 if estimator == "systematic" else k


def select(p: Tensor, k: int, estimator: Estimator, c_rule: CRule, u: Tensor) -> Selection:
    """Choose k of n rows so that the weighted sum over them estimates the sum over all rows.

    ``E[sum_t w_t f(row t)] = sum_i f(i)`` for every f that is zero where p is zero, except with
    "topk", which is biased and there for comparison. With ``tail`` the mass outside the
    deterministic set, the draws are:

    - "wta": k - c rows with replacement, weight ``tail / ((k - c) p_i)``;
    - "crs": the same with c = 0;
    - "systematic": row i with probability ``pi_i = (k - c) p_i / tail <= 1`` and weight
      ``1 / pi_i``, by k - c equally spaced points on the cumulative sum: all k rows are distinct.
      Rows are laid out as they come, since neighbouring tokens are alike: that lowers the variance
      and spares a sort;
    - "topk": none, the k heaviest rows have weight 1.

    Positions below c hold the heaviest rows in descending order (ties: lower row first). If
    nothing is left to draw, the other positions have weight 0 and the estimate is exact.

    Args:
        p: (n,) float32, non-negative, any total; NaN gives NaN weights.
        k: kept rows, in [1, n].
        estimator: see above.
        c_rule: see ``deterministic_size``; "crs" and "topk" do not read it.
        u: at least ``num_uniforms(k, estimator)`` float32 numbers in [0, 1).

    Source: arXiv 2305.15265 for "wta" and "crs"; systematic sampling with unequal probabilities
    is a deviation with lower variance.
    """
    n = p.numel()
    p_sorted, order = torch.sort(p, descending=True, stable=True)
    heaviest = order[:k]
    if estimator == "topk":
        p_kept = p_sorted[:k]
        return Selection(
            heaviest.to(torch.int32), _ratio(p_kept, p_kept), torch.count_nonzero(p_kept)
        )

    if estimator == "crs":
        c = torch.zeros((), dtype=torch.int64, device=p.device)
        mass = p
    else:
        c, _ = deterministic_size(p_sorted, k, c_rule)
        in_tail = torch.arange(n, device=p.device) >= c
        mass = torch.zeros_like(p).scatter(0, order, p_sorted * in_tail)

    t = torch.arange(k, device=p.device)
    if estimator == "systematic":
        drawn, interval = _draw(mass, k - c, u[:1] + (t - c).clamp(min=0))
    else:
        drawn, interval = _draw(mass, k - c, u[:k] * (k - c))
    # An empty tail leaves nothing to draw: point at a row that is kept anyway, with weight 0.
    drawn = torch.where(interval > 0, drawn, heaviest[:1])
    deterministic = t < c
    indices = torch.where(deterministic, heaviest, drawn)
    p_kept = p.gather(0, indices)
    weights = _ratio(torch.where(deterministic, p_kept, interval), p_kept)
    return Selection(indices.to(torch.int32), weights, c)


def _draw(mass: Tensor, num_draws: Tensor, points: Tensor) -> tuple[Tensor, Tensor]:
    """Return the rows that the points hit, and the mass per draw.

    Args:
        mass: (n,) float32, zero on rows that must not be drawn.
        num_draws: () int64, the length of the axis in units of the points.
        points: (k,) float32, in [0, num_draws) up to rounding.
    """
    edges = mass.cumsum(0)
    total = edges[-1:]
    interval = total / num_draws.clamp(min=1)
    # Rounding may put the last point on the far edge, where it would hit no row.
    points = torch.minimum(points * interval, total * (1.0 - _FLOAT32_EPS))
    # The first edge above the point: a row without mass adds no edge and is never hit.
    hit = torch.searchsorted(edges, points, right=True).clamp(max=mass.numel() - 1)
    return hit, interval


def _ratio(numerator: Tensor, p: Tensor) -> Tensor:
    return torch.where(p == 0, 0.0, numerator / p)
