"""Which rows of a linear's input backward keeps: the seam, scores of rows, and samples of them.

Dimension letters: n rows (all leading dimensions flattened), k kept rows, d features, w features
kept of each row, t token positions.
"""

from functools import lru_cache
from typing import Any, Literal, NamedTuple, Protocol, cast

import torch
from torch import Tensor
from torch.compiler import is_compiling

from leantune.ops.random import RandomKey, first_word, words

Estimator = Literal["systematic", "wta", "crs", "topk"]

_TINY = torch.finfo(torch.float32).tiny
_UNITS = 2.0**30
"""Scores and probabilities are whole numbers of 2**-30: sums are exact, whatever their order."""


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
            x: (..., w), in the dtype of the product, without a graph; not to be written to.
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
    return torch.linalg.vector_norm(x2d, dim=-1, dtype=wide).float()  # type: ignore[no-any-return]


def score_rows(x2d: Tensor, grad: Tensor | None = None) -> Tensor:
    """Return the norm of each row's outer product as far as it is known, (n,) float32.

    Args:
        x2d: (n, d) input rows.
        grad: what is known of the output's gradient: its rows (n, d_out), a guess of their norms by
            position (t,) float32, where row i stands at position ``i % t``, or nothing.
    """
    scores = row_norms(x2d)
    if grad is None:
        return scores
    if grad.ndim == 2:
        return scores * row_norms(grad)
    return (scores.view(-1, len(grad)) * grad).view(-1)


def draw_rows(
    x2d: Tensor,
    k: int,
    key: RandomKey,
    *,
    grad: Tensor | None = None,
    real: Tensor | None = None,
    floor: float = 0.0,
    estimator: Estimator = "systematic",
) -> tuple[Tensor, Tensor]:
    """Choose k rows of (n, d) by their scores; see :func:`score_rows` and :func:`sample_rows`.

    A compiler sees one registered operation.
    """
    if is_compiling():
        seed = (key.seed + 2**63) % 2**64 - 2**63
        return _draw_rows(x2d, k, seed, key.counter, key.stream, grad, real, floor, estimator)
    scores = score_rows(x2d, grad)
    return sample_rows(scores, k, key, real=real, floor=floor, estimator=estimator)


@torch.library.custom_op("leantune::reference_draw_rows", mutates_args=())
def _draw_rows(
    x2d: Tensor,
    k: int,
    seed: int,
    counter: Tensor,
    stream: int,
    grad: Tensor | None,
    real: Tensor | None,
    floor: float,
    estimator: str,
) -> tuple[Tensor, Tensor]:
    key, name = RandomKey(seed, counter, stream), cast(Estimator, estimator)
    return draw_rows(x2d, k, key, grad=grad, real=real, floor=floor, estimator=name)


@_draw_rows.register_fake
def _(x2d: Tensor, k: int, *others: Any) -> tuple[Tensor, Tensor]:
    return x2d.new_empty(k, dtype=torch.int32), x2d.new_empty(k, dtype=torch.float32)


def sample_rows(
    scores: Tensor,
    k: int,
    key: RandomKey,
    *,
    real: Tensor | None = None,
    floor: float = 0.0,
    estimator: Estimator = "systematic",
) -> tuple[Tensor, Tensor]:
    """Choose k of n rows so that the weighted sum over them estimates the sum over all rows.

    ``E[sum_t weights_t f(indices_t)] = sum_i f(i)`` for every f that is zero where the score is
    zero, except with "topk". The estimators are:

    - "systematic": row i is kept with probability ``pi_i = min(1, scores_i / tau)`` and weight
      ``1 / pi_i``, where tau makes the probabilities add up to k: the c rows that reach tau are the
      deterministic set. The probabilities lie side by side on an axis, and k points at distance 1
      hit the rows: all are distinct, and in ascending order. Rows are laid out as they come, since
      neighbouring tokens are alike: that lowers the variance, and nothing is sorted by row.
    - "wta": the same c rows with weight 1, and k - c draws from the others with replacement, with
      ``tail`` the sum of their scores and weight ``tail / ((k - c) scores_i)``.
    - "crs": the same with c = 0.
    - "topk": the k heaviest rows with weight 1; biased, and there for comparison.

    Scores count in units of 2**-30 of the largest one, and smaller ones as 0. Every sum is of whole
    numbers, so that a kernel finds the same rows to the bit.

    Args:
        scores: (n,) float32, non-negative, of any magnitude; NaN or infinity gives NaN weights.
        k: kept rows, in [1, n].
        key: of the random numbers.
        real: (n,) bool, False on rows that are never drawn; None draws from all.
        floor: share of the probability that is spread evenly over the real rows, in [0, 1): above
            0 a row whose score is far too small has no weight without bound.
        estimator: see above.

    Returns:
        indices (k,) int32 and weights (k,) float32, non-negative. Where fewer than k rows have a
        score, those are kept exactly, except with "crs", and the other positions have weight 0.

    Source: WTA-CRS, arXiv 2305.15265; systematic sampling of the tail is a deviation with lower
    variance. The size c minimises the paper's bound ``tail_c / (k - c)``, whose minimum is tau.
    """
    slots, slots_left = _slots(k, scores.device)
    mass = _mass(scores, real, floor)
    heaviest = mass.topk(k).values
    head = heaviest.cumsum(0, dtype=torch.float64)
    # Behind the c heaviest rows lies a tail, for the other k - c: c = 0, 1, ..., k - 1.
    tails = (mass.sum(dtype=torch.float64) - head).add_(heaviest)
    tau = tails.div_(slots_left).amin().clamp_(min=1 / _UNITS)
    if estimator != "systematic":
        return _replaced(mass, _sure_rows(mass, k, estimator, tau * _UNITS, heaviest[-1]), k, key)
    pi = mass.div_(tau, rounding_mode="trunc").clamp_(max=_UNITS)
    edges = pi.cumsum(0, dtype=torch.float64)
    points = slots - first_word(key) * 2**6
    # The last row takes what lies beyond the others: points past its edge get weight 0.
    indices = torch.searchsorted(edges[:-1], points, out_int32=True)
    weights = pi.index_select(0, indices).reciprocal_().mul_(_UNITS)
    return indices, weights.masked_fill_(points > edges[-1], 0.0)


def _mass(scores: Tensor, real: Tensor | None, floor: float) -> Tensor:
    """Return scores with the floor mixed in, as whole numbers in float32, the largest 2**30."""
    if real is not None:
        scores = torch.where(real, scores, 0.0)
    if floor > 0:
        # Above 0: scores that are all 0 say nothing, and every real row is as likely.
        evenly = scores.mean(dtype=torch.float64).clamp_(min=_TINY)
        if real is not None:
            evenly = real * (evenly / real.double().mean().clamp_(min=_TINY)).float()
        scores = scores.add(evenly, alpha=floor / (1 - floor))
    largest = scores.amax().clamp_(min=_TINY)
    return scores.div(largest).div_(1 / _UNITS, rounding_mode="trunc")


def _sure_rows(mass: Tensor, k: int, estimator: Estimator, tau: Tensor, least: Tensor) -> Tensor:
    """Return which rows are kept for certain, (n,) bool; ``least`` is the k-th largest mass."""
    if estimator == "crs":
        return torch.zeros_like(mass, dtype=torch.bool)
    if estimator == "wta":
        return mass >= tau
    above, level = mass > least, mass == least
    return above | (level & (level.cumsum(0) <= k - above.sum()))


def _replaced(mass: Tensor, sure: Tensor, k: int, key: RandomKey) -> tuple[Tensor, Tensor]:
    """Keep the sure rows, in order, and draw a row of the others for each position that is left."""
    positions = torch.arange(1, k + 1, device=mass.device)
    counts = sure.cumsum(0)
    edges = mass.masked_fill(sure, 0.0).cumsum(0, dtype=torch.float64)
    num_sure, tail = counts[-1], edges[-1]
    is_sure = (positions <= num_sure) & tail.isfinite()
    points = words(key, k).double() * 2.0**-32 * tail
    drawn = torch.searchsorted(edges, points, right=True)
    # Without a tail every point lies beyond the last row, and gets weight 0.
    indices = torch.where(is_sure, torch.searchsorted(counts, positions), drawn)
    indices = indices.clamp(max=len(mass) - 1)
    kept = mass[indices]
    share = (tail / (k - num_sure)).float()
    # A mass is a whole number.
    weights = torch.where(is_sure, (kept > 0).float(), share / kept.clamp(min=1))
    return indices.int(), weights


@lru_cache(maxsize=64)
def _slots(k: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return 1 to k, in units, and k to 1: (k,) float64 each."""
    slots = torch.arange(1, k + 1, dtype=torch.float64, device=device).mul_(_UNITS)
    return slots, slots.flip(0)


def pick_rows(grad_output: Tensor, indices: Tensor, weights: Tensor, dtype: torch.dtype) -> Tensor:
    """Return rows (k, d) of (n, d), each times its weight in float32, in ``dtype``."""
    return (grad_output.index_select(0, indices) * weights[:, None]).to(dtype)


def update_norms(
    guess: Tensor, grad_norms: Tensor, decay: float, real: Tensor | None = None
) -> None:
    """Bring a guess of gradient norms up to date in place with those that a backward met.

    The squares of both are averaged, ``decay`` being the weight of the guess, after those of the
    backward were averaged by position and divided by their mean. A position without a real row
    keeps its guess, and all do where a norm is not finite, as after an overflowed step.

    Args:
        guess: (t,) float32 by position.
        grad_norms: (n,) float32; row i stands at position ``i % t``.
        decay: in [0, 1).
        real: (n,) bool; False on rows that do not count.
    """
    squares = grad_norms.square().view(-1, len(guess))
    if real is None:
        by_position = squares.mean(0)
        mean = by_position.mean()
    else:
        real = real.view_as(squares)
        squares = torch.where(real, squares, 0.0)
        by_position, mean = squares.sum(0) / real.sum(0), squares.sum() / real.sum()
    ratio = by_position / mean + (mean - mean)  # nan everywhere if one is infinite
    new = guess.square().lerp_(ratio, 1 - decay).sqrt_()
    guess.copy_(torch.where(new < torch.inf, new, guess))
