"""Which rows of a linear's input backward keeps: the seam, row norms, and the default sample.

Dimension letters: n rows (all leading dimensions flattened), k kept rows, d features, w features
kept of each row.
"""

from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from leantune.ops.random import RandomKey, uniform

_FLOAT32_EPS = torch.finfo(torch.float32).eps


class KeptRows(NamedTuple):
    """The rows of one input that backward keeps, and how much each counts.

    Args:
        rows: (k, w), unscaled; the whole input (..., w) where ``indices`` is None.
        indices: (k,) int32 row numbers; None where every row is kept.
        weights: (k,) float32, multiplied onto the rows of the output's gradient; None likewise.
    """

    rows: Tensor
    indices: Tensor | None = None
    weights: Tensor | None = None


class OuterProduct(NamedTuple):
    """A weight gradient in factored form: ``grad_weight = scale * grad_rows.T @ input_rows``.

    The product is delayed because some methods never need it in full: SparseGrad computes 1 % of
    its entries straight from the factors, which is far cheaper than forming the (d_out, d_in)
    matrix. With every row kept the factors have n rows; with WTA-CRS they have k.

    Args:
        grad_rows: (k, d_out), rows of the output's gradient, already multiplied by their weights.
        input_rows: (k, w), the matching rows of what was kept of the input.
        scale: () float32, or None for 1; keeps ``grad_rows`` inside float16's range.
    """

    grad_rows: Tensor
    input_rows: Tensor
    scale: Tensor | None = None

    def dense(self) -> Tensor:
        """Return the product, (d_out, w)."""
        product = self.grad_rows.t() @ self.input_rows
        return product if self.scale is None else product.float() * self.scale


class RowPolicy(Protocol):
    """A row policy decides which rows of one linear's input are kept for its weight gradient.

    The policy sees the input after any projection, so rows and what is kept of each row are chosen
    apart. In how many bits a row is kept is the codec's business.
    """

    def keep(self, x: Tensor, source: Tensor, key: RandomKey) -> tuple[KeptRows, Any]:
        """Return the rows to keep, and a note that :meth:`outer_product` gets back.

        Args:
            x: (..., w), in the dtype of the product; not to be written to.
            source: the tensor that the caller passed, before any cast; its identity tells which
                linears read one input.
            key: the random numbers of this forward.
        """
        ...

    def outer_product(self, kept: KeptRows, note: Any, grad_output: Tensor) -> OuterProduct:
        """Return the weight gradient in factored form, from ``grad_output`` (n, d_out)."""
        ...

    def nbytes(self, shape: torch.Size, dtype: torch.dtype) -> int:
        """Return the bytes kept of an input of ``shape`` (..., w), as the ledger measures them."""
        ...


def row_norms(x2d: Tensor) -> Tensor:
    """Return the L2 norm of every row of (n, d), (n,) float32, without a float32 copy of it."""
    wide = torch.float64 if x2d.dtype == torch.float64 else torch.float32
    norms: Tensor = torch.linalg.vector_norm(x2d, dim=-1, dtype=wide)
    return norms.float()


def sample_rows(scores: Tensor, k: int, key: RandomKey) -> tuple[Tensor, Tensor]:
    """Choose k of n rows so that the weighted sum over them estimates the sum over all rows.

    ``E[sum_t weights_t f(indices_t)] = sum_i f(i)`` for every f that is zero where the score is
    zero. The c heaviest rows are kept with certainty and weight 1. Of the others row i is kept with
    probability ``pi_i = (k - c) scores_i / tail <= 1`` and weight ``1 / pi_i``, by k - c equally
    spaced points on the cumulative sum: all k rows are distinct. Rows are laid out as they come,
    since neighbouring tokens are alike: that lowers the variance and spares a sort.

    Positions below c hold the heaviest rows in descending order (ties: lower row first). If
    nothing is left to draw, the other positions have weight 0 and the estimate is exact.

    Args:
        scores: (n,) float32, non-negative, any total; NaN gives NaN weights.
        k: kept rows, in [1, n].
        key: of the one uniform number that places the points.

    Returns:
        indices (k,) int32 in [0, n), and weights (k,) float32, non-negative.

    Source: WTA-CRS, arXiv 2305.15265, for the deterministic set; systematic sampling of the tail is
    a deviation with lower variance.
    """
    scores_sorted, order = torch.sort(scores, descending=True, stable=True)
    c = deterministic_size(scores_sorted, k)
    t = torch.arange(k, device=scores.device)
    points = uniform(key, 1) + (t - c).clamp(min=0)
    mass = tail_mass(scores_sorted, order, c)
    drawn, interval = draw_at(points, mass, k - c)
    return with_deterministic_set(scores, order[:k], c, drawn, interval)


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
