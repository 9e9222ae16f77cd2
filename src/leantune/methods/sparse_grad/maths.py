"""SparseGrad's bases, rotations and selections as pure functions on any device.

Dimension letters: n rows (batch times tokens), d_out and d_in the sides of the weight, r_out and
r_in the basis vectors in use (all of them, or the leading ones), k selected entries, m_out and m_in
the rows and columns that hold a selected entry.

Throughout, of any floating dtype: ``x`` (n, d_in), ``grad_output`` (n, d_out), both of one dtype;
``grad`` (d_out, d_in). Basis vectors are columns: ``q_out`` (d_out, r_out), ``q_in`` (d_in, r_in);
float32 or wider, they set the dtype of results. ``indices`` (k,) is a mask: int32 or int64, flat
row-major positions in the rotated gradient ``q_out^T grad q_in`` (r_out, r_in), each once and
ascending. Only ``support`` waits for the device, and ``basis`` where its solver does.

Source for the whole file: SparseGrad, arXiv 2410.07383, with its input-side basis the way round
that the higher-order SVD has it (the released code multiplies by the transpose).
"""

import math
from typing import Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from leantune.errors import ConfigError

Plan = Literal["rows", "matrix"]


class Support(NamedTuple):
    """The rows (m_out,) and columns (m_in,) that hold a selected entry, ascending."""

    rows: Tensor
    columns: Tensor


class Refresh(NamedTuple):
    """The new mask, and where each entry stood in the old one: (k,) int64, -1 for a new entry."""

    indices: Tensor
    source: Tensor


def accumulate_grams(gram_out: Tensor, gram_in: Tensor, grad: Tensor, normalize: bool) -> None:
    """Add one gradient to both Gram matrices, in place: no stack of gradients is ever held.

    ``gram_out += grad grad^T`` and ``gram_in += grad^T grad``. Their eigenvectors are the left
    singular vectors of the stack's two unfoldings.

    Args:
        gram_out: (d_out, d_out) float32 or float64, changed.
        gram_in: (d_in, d_in) the same dtype, changed.
        normalize: scale the gradient to unit Frobenius norm first, so that layers and steps count
            alike whatever their magnitude; a zero gradient then adds nothing. The paper does not.
    """
    grad = _statistics(grad, gram_out.dtype, normalize)
    gram_out.addmm_(grad, grad.mT)
    gram_in.addmm_(grad.mT, grad)


def basis(gram: Tensor) -> Tensor:
    """Return a complete orthonormal eigenbasis, largest eigenvalue first.

    Args:
        gram: (d, d) from ``accumulate_grams``, finite and not zero; directions without energy come
            last, in any order.

    Returns:
        (d, d) eigenvectors as columns; float32, or float64 where ``gram`` is.
    """
    gram = gram.to(torch.promote_types(gram.dtype, torch.float32))
    # By rows: a basis that comes back from a file then rounds products the same way.
    return torch.linalg.eigh(gram / gram.diagonal().amax()).eigenvectors.flip(-1).contiguous()


def rotate(grad: Tensor, q_out: Tensor, q_in: Tensor) -> Tensor:
    """Return ``q_out^T grad q_in``, (r_out, r_in), multiplied in the cheaper order."""
    return torch.linalg.multi_dot((q_out.mT, grad.to(q_out.dtype), q_in))


def support(indices: Tensor, shape: tuple[int, int]) -> Support:
    """Return which lines of ``shape`` (r_out, r_in) a mask touches; compute it once per mask."""
    rows = torch.unique_consecutive(indices // shape[1])
    return Support(rows, torch.unique(indices % shape[1]))


def rotate_back_sparse(
    indices: Tensor,
    values: Tensor,
    shape: tuple[int, int],
    q_out: Tensor,
    q_in: Tensor,
    lines: Support | None = None,
) -> Tensor:
    """Return ``q_out scatter(values) q_in^T`` (d_out, d_in), forming only lines with an entry.

    By rows that takes ``k d_in + d_out m_out d_in`` multiply-adds, by columns
    ``k d_out + d_out m_in d_in``: the cheaper way is taken. The dense product takes
    ``d_out r_out r_in + d_out r_in d_in``.

    Args:
        indices: a mask, possibly empty.
        values: (k,) any floating dtype.
        shape: (r_out, r_in)
        lines: ``support(indices, shape)`` if at hand; else it is computed, which waits.
    """
    lines = support(indices, shape) if lines is None else lines
    d_out, d_in = q_out.shape[0], q_in.shape[0]
    num_rows, num_columns = lines.rows.numel(), lines.columns.numel()
    by_rows = indices.numel() * d_in + d_out * num_rows * d_in
    by_columns = indices.numel() * d_out + d_out * num_columns * d_in
    row, column = indices // shape[1], indices % shape[1]
    if by_columns < by_rows:
        # The transposed problem, whose mask must again be ascending.
        flipped, order = torch.sort(column * shape[0] + row)
        swapped = Support(lines.columns, lines.rows)
        args = (flipped, values[order], (shape[1], shape[0]), q_in, q_out, swapped)
        return rotate_back_sparse(*args).mT
    # A sparse times dense product without a (k, d_in) intermediate and without a COO tensor.
    inner = F.embedding_bag(
        column,
        q_in.mT.contiguous(),
        torch.searchsorted(row, lines.rows, out_int32=indices.dtype == torch.int32),
        mode="sum",
        per_sample_weights=values.to(q_in.dtype),
    )  # (m_out, d_in)
    return q_out.index_select(1, lines.rows) @ inner


def grad_block(projected: Tensor, grad_output: Tensor, q_out: Tensor) -> Tensor:
    """Return the rotated gradient (r_out, r_in) in these basis vectors, from thin products only.

    ``(grad_output q_out)^T projected``, in the dtype of ``projected``, which is ``x q_in``
    (n, r_in); it equals ``rotate(grad_output^T x, q_out, q_in)``.
    """
    return ((grad_output @ q_out.to(grad_output.dtype)).mT @ projected).to(q_out.dtype)


def gradient_plan(n: int, q_out: Tensor, q_in: Tensor) -> Plan:
    """Return the way to the selected gradient that takes fewer multiply-adds.

    - "rows": ``n (d_out r_out + d_in r_in) + n r_out r_in``, rotates rows first;
    - "matrix": ``n d_out d_in + rotation``, forms the gradient and rotates it, with
      ``rotation = min(d_in r_out (d_out + r_in), d_out r_in (d_in + r_out))``.

    Scalar products of the selected columns alone would take ``n k`` on gathered numbers, each as
    dear as 110 inside a GEMM (a CPU core with AVX-512, 23,593 entries of (3072, 768) at 512 rows):
    more than the whole matrix from a density of 1 % on.
    """
    (d_out, r_out), (d_in, r_in) = q_out.shape, q_in.shape
    rows = n * (d_out * r_out + d_in * r_in + r_out * r_in)
    rotation = min(d_in * r_out * (d_out + r_in), d_out * r_in * (d_in + r_out))
    return "rows" if rows <= n * d_out * d_in + rotation else "matrix"


def selected_gradient(
    x: Tensor,
    grad_output: Tensor,
    q_out: Tensor,
    q_in: Tensor,
    indices: Tensor,
    lines: Support | None = None,
    plan: Plan | None = None,
) -> Tensor:
    """Return the selected entries (k,) of the rotated weight gradient, the cheaper way.

    Entry (i, j) is the scalar product of column i of ``grad_output q_out`` and column j of
    ``x q_in``, as in ``rotate(grad_output^T x, q_out, q_in)``. GEMMs over rows run in the dtype of
    ``x``.

    Args:
        indices: a mask; any order will do.
        lines: ``support(indices, (r_out, r_in))`` if at hand: other basis vectors are then skipped.
        plan: None leaves the choice to ``gradient_plan``.
    """
    row, column = indices // q_in.shape[1], indices % q_in.shape[1]
    if lines is not None:
        q_out, q_in = q_out.index_select(1, lines.rows), q_in.index_select(1, lines.columns)
        row, column = torch.searchsorted(lines.rows, row), torch.searchsorted(lines.columns, column)
    plan = gradient_plan(len(x), q_out, q_in) if plan is None else plan
    if plan == "matrix":
        return rotate(grad_output.mT @ x, q_out, q_in)[row, column]
    return grad_block(x @ q_in.to(x.dtype), grad_output, q_out)[row, column]


def accumulate_second_moment(
    moment: Tensor, grad: Tensor, q_out: Tensor, q_in: Tensor, normalize: bool
) -> None:
    """Add the squares of the rotated gradient in place; ``top_entries`` of it is a fixed mask.

    ``moment`` is (r_out, r_in) float32 or float64, ``normalize`` as in ``accumulate_grams``. The
    bases come first, hence a second pass over the calibration batches.
    """
    moment.add_(rotate(_statistics(grad, moment.dtype, normalize), q_out, q_in).square())


def block_shape(shape: tuple[int, int], num_entries: int) -> tuple[int, int]:
    """Return (r_out, r_in) of about ``num_entries``, with ``d_out r_out`` near ``d_in r_in``.

    So balanced, thin bases are smallest and so is the work of rotating rows.
    """
    d_out, d_in = shape
    r_out = min(max(round(math.sqrt(num_entries * d_in / d_out)), 1), d_out)
    r_in = min(max(round(num_entries / r_out), 1), d_in)
    # A side that ran into its end leaves the rest to the other one.
    return min(max(round(num_entries / r_in), 1), d_out), r_in


def top_entries(scores: Tensor, num_entries: int) -> Tensor:
    """Return the positions of the entries of largest magnitude, exactly as many as asked for.

    Of equal magnitudes the earlier position is taken, on every device. NaN counts as the largest
    magnitude: a broken gradient is kept and stays visible. The result is int32, or int64 from
    2**31 scores on.
    """
    _check_count("num_entries", num_entries, 0, scores.numel())
    return _largest(_magnitude(scores), num_entries)


def refresh_mask(
    old_indices: Tensor, momentum: Tensor, grad_scores: Tensor, num_replace: int
) -> Refresh:
    """Exchange the entries of smallest momentum for the largest ones outside the mask.

    Magnitudes count in ``momentum`` (k,) and ``grad_scores`` (r_out, r_in). Dropped entries do not
    return in the same refresh; no more are exchanged than there are outside.
    """
    k = old_indices.numel()
    _check_count("num_replace", num_replace, 0, k)
    num_replace = min(num_replace, grad_scores.numel() - k)
    kept = top_entries(momentum, k - num_replace).long()
    outside = _magnitude(grad_scores).index_fill(0, old_indices.long(), -1.0)
    grown = _largest(outside, num_replace)
    indices, order = torch.sort(torch.cat((old_indices[kept], grown.to(old_indices.dtype))))
    return Refresh(indices, torch.cat((kept, torch.full_like(grown, -1, dtype=kept.dtype)))[order])


def carry_over(values: Tensor, source: Tensor) -> Tensor:
    """Return per-entry state (k,) in the order of a refreshed mask, new entries starting at 0."""
    return values[source.clamp(min=0)].masked_fill(source < 0, 0)


def outliers(scores: Tensor, r_out: int, r_in: int, num_outliers: int) -> Tensor:
    """Return the positions of the largest of ``scores`` (d_out, d_in) outside the leading block."""
    outside = _magnitude(scores).view(scores.shape).clone()
    outside[:r_out, :r_in] = -1.0
    return _largest(outside.flatten(), num_outliers)


def energy_share(matrix: Tensor, density: float) -> Tensor:
    """Return the share of the squared Frobenius norm that the largest entries hold.

    ``density`` in (0, 1] says how many of (r_out, r_in) count as the largest. The result is (), in
    [0, 1]; NaN if the matrix is zero or not finite.
    """
    wide = matrix.to(torch.promote_types(matrix.dtype, torch.float32))
    # The ratio to the largest entry: squares neither overflow nor vanish.
    energy = (wide / wide.abs().amax()).square().flatten()
    k = max(1, round(density * energy.numel()))
    return energy.topk(k, sorted=False).values.sum() / energy.sum()


def _statistics(grad: Tensor, dtype: torch.dtype, normalize: bool) -> Tensor:
    grad = grad.to(dtype)
    if not normalize:
        return grad
    # The largest entry goes first, or the squares of tiny and huge gradients leave float32.
    largest = grad.abs().amax()
    grad = grad / torch.where(largest == 0, 1.0, largest)
    return grad / torch.linalg.vector_norm(grad).clamp(min=1.0)


def _magnitude(scores: Tensor) -> Tensor:
    magnitude = scores.flatten().abs()
    return magnitude.masked_fill(magnitude.isnan(), torch.inf)


def _largest(magnitude: Tensor, k: int) -> Tensor:
    """Return the ascending positions of the k largest; of equal ones the earlier position."""
    dtype = torch.int32 if magnitude.numel() < 2**31 else torch.int64
    if k == 0:
        return torch.empty(0, dtype=dtype, device=magnitude.device)
    # Which of equal entries topk returns is the device's choice; the k-th value is not.
    threshold = magnitude.topk(k, sorted=False).values.amin()
    above, equal = magnitude > threshold, magnitude == threshold
    num_equal = k - torch.count_nonzero(above)
    taken = above | (equal & (equal.cumsum(0, dtype=dtype) <= num_equal))
    # Where the running count first reaches 1, 2, ... k: nonzero() would wait for the device.
    steps = torch.arange(1, k + 1, dtype=dtype, device=magnitude.device)
    return torch.searchsorted(taken.cumsum(0, dtype=dtype), steps, out_int32=dtype == torch.int32)


def _check_count(field: str, value: int, low: int, high: int) -> None:
    if not low <= value <= high:
        nearest = min(max(value, low), high)
        raise ConfigError(
            f"SparseGrad: {field} must be in [{low}, {high}], got {value}; {nearest} is the nearest"
        )
