"""SparseGrad's bases, rotations and selections as pure functions on any device.

Dimension letters: n rows (batch times tokens), d_out and d_in the sides of the weight, r_out and
r_in the basis vectors in use (all of them, or the leading ones), k selected entries, m_out and m_in
the rows and columns that hold a selected entry.

Throughout, of any floating dtype: ``x`` (n, d_in), ``grad_output`` (n, d_out), both of one dtype;
``grad`` (d_out, d_in). Basis vectors are columns: ``q_out`` (d_out, r_out), ``q_in`` (d_in, r_in);
float32 or wider, they set the dtype of results. ``indices`` (k,) is a mask: int32 or int64, flat
row-major positions in the rotated gradient ``q_out^T grad q_in`` (r_out, r_in), each once and
ascending. Only ``basis`` and ``support`` wait for the device.

Source for the whole file: SparseGrad, arXiv 2410.07383, with its input-side basis the way round
that the higher-order SVD has it (the released code multiplies by the transpose).
"""

from typing import Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from leantune.errors import LeantuneError

Plan = Literal["sampled", "rows", "matrix"]

# One multiply-add on gathered numbers takes as long as this many inside a GEMM: 110 on a CPU core
# with AVX-512, float32, 23,593 entries of (3072, 768) at 512 rows.
GATHER_COST = 100
# Gathered elements per operand and chunk; 1 MiB of float32 stays inside a core's L2 cache.
_CHUNK_ELEMENTS = 2**18


class Support(NamedTuple):
    """The rows (m_out,) and columns (m_in,) that hold a selected entry, ascending."""

    rows: Tensor
    columns: Tensor


class Refresh(NamedTuple):
    """The new mask, and where each entry stood in the old one: (k,) int64, -1 for a new entry."""

    indices: Tensor
    source: Tensor


class BlockMask(NamedTuple):
    """Two masks: the leading block, in the order of the flat block, and entries outside it."""

    block: Tensor
    outliers: Tensor


def accumulate_grams(gram_out: Tensor, gram_in: Tensor, grad: Tensor, normalize: bool) -> None:
    """Add one gradient to both Gram matrices, in place: no stack of gradients is ever held.

    ``gram_out += grad grad^T`` and ``gram_in += grad^T grad``. Their eigenvectors are the left
    singular vectors of the stack's two unfoldings. A NaN or infinite entry makes both matrices
    non-finite, which ``basis`` reports.

    Args:
        gram_out: (d_out, d_out) float32 or float64, changed.
        gram_in: (d_in, d_in) the same dtype, changed.
        normalize: scale the gradient to unit Frobenius norm first, so that layers and steps count
            alike whatever their magnitude; a zero gradient then adds nothing. The paper does not.
    """
    grad = _statistics(grad, gram_out.dtype, normalize)
    gram_out.addmm_(grad, grad.mT)
    gram_in.addmm_(grad.mT, grad)


def basis(gram: Tensor, name: str = "gram") -> Tensor:
    """Return a complete orthonormal eigenbasis, largest eigenvalue first.

    Args:
        gram: (d, d) from ``accumulate_grams``; directions without energy come last, in any order.
        name: what errors call it, for instance with the layer type.

    Returns:
        (d, d) eigenvectors as columns; float32, or float64 where ``gram`` is.

    Raises:
        LeantuneError: the matrix has a NaN or infinite entry, or no energy at all.
    """
    gram = gram.to(torch.promote_types(gram.dtype, torch.float32))
    num_bad = int(torch.count_nonzero(~torch.isfinite(gram)))
    if num_bad:
        raise LeantuneError(
            f"SparseGrad: {name} must be finite, got {num_bad} NaN or infinite entries of "
            f"{gram.numel()}; leave out the calibration batch whose loss or gradient is not finite"
        )
    largest = float(gram.diagonal().amax())
    if not largest > 0:
        raise LeantuneError(
            f"SparseGrad: {name} must have a positive diagonal, got at most {largest:g}; calibrate "
            "with at least one batch whose loss depends on these weights (labels present, weights "
            "not frozen), and with normalize=True if gradients are below 1e-22"
        )
    return torch.linalg.eigh(gram / largest).eigenvectors.flip(-1)


def leading(basis: Tensor, rank: int) -> Tensor:
    """Return the first ``rank`` of d basis vectors, (d, rank), without a hold on the rest."""
    _check_count("rank", rank, 1, basis.shape[1])
    return basis[:, :rank].clone(memory_format=torch.contiguous_format)


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


def grad_block(x: Tensor, grad_output: Tensor, q_out_r: Tensor, q_in_r: Tensor) -> Tensor:
    """Return the leading block of the rotated gradient, (r_out, r_in), from thin products only.

    ``(grad_output q_out_r)^T (x q_in_r)``, taken in the dtype of ``x``; it equals
    ``rotate(grad_output^T x, q_out_r, q_in_r)``.
    """
    rotated_output = grad_output @ q_out_r.to(grad_output.dtype)  # (n, r_out)
    return (rotated_output.mT @ (x @ q_in_r.to(x.dtype))).to(q_out_r.dtype)


def gradient_plan(n: int, q_out: Tensor, q_in: Tensor, num_entries: int) -> Plan:
    """Return the way to the selected gradient that takes the fewest weighted multiply-adds.

    - "sampled": ``n (d_out r_out + d_in r_in) + GATHER_COST n k``, never forms a matrix;
    - "rows": ``n (d_out r_out + d_in r_in) + n r_out r_in``, forms the rotated gradient;
    - "matrix": ``n d_out d_in + rotation``, forms the gradient and rotates it, with
      ``rotation = min(d_in r_out (d_out + r_in), d_out r_in (d_in + r_out))``.

    Ties go to the earlier one, which needs less memory.
    """
    (d_out, r_out), (d_in, r_in) = q_out.shape, q_in.shape
    rows = n * (d_out * r_out + d_in * r_in)
    rotation = min(d_in * r_out * (d_out + r_in), d_out * r_in * (d_in + r_out))
    costs: dict[Plan, int] = {
        "sampled": rows + GATHER_COST * n * num_entries,
        "rows": rows + n * r_out * r_in,
        "matrix": n * d_out * d_in + rotation,
    }
    return min(costs, key=lambda plan: costs[plan])


def selected_gradient(
    x: Tensor,
    grad_output: Tensor,
    q_out: Tensor,
    q_in: Tensor,
    indices: Tensor,
    lines: Support | None = None,
    plan: Plan | None = None,
) -> Tensor:
    """Return the selected entries (k,) of the rotated weight gradient, the cheapest way.

    Entry (i, j) is the scalar product of column i of ``grad_output q_out`` and column j of
    ``x q_in``, as in ``rotate(grad_output^T x, q_out, q_in)``. GEMMs run in the dtype of ``x``.

    Args:
        indices: a mask; any order will do.
        lines: ``support(indices, (r_out, r_in))`` if at hand: other basis vectors are then skipped.
        plan: "sampled" never forms a matrix; None leaves the choice to ``gradient_plan``.
    """
    row, column = indices // q_in.shape[1], indices % q_in.shape[1]
    if lines is not None:
        q_out, q_in = q_out.index_select(1, lines.rows), q_in.index_select(1, lines.columns)
        row, column = torch.searchsorted(lines.rows, row), torch.searchsorted(lines.columns, column)
    plan = gradient_plan(len(x), q_out, q_in, indices.numel()) if plan is None else plan
    if plan == "matrix":
        return rotate(grad_output.mT @ x, q_out, q_in)[row, column]
    if plan == "rows":
        return grad_block(x, grad_output, q_out, q_in)[row, column]
    # Transposed, so that the gathered lines are contiguous.
    output_t = q_out.to(x.dtype).mT @ grad_output.mT  # (r_out, n)
    input_t = q_in.to(x.dtype).mT @ x.mT  # (r_in, n)
    values = q_out.new_empty(indices.numel())
    size = max(1, _CHUNK_ELEMENTS // max(1, len(x)))
    chunks = (row.split(size), column.split(size), values.split(size))
    for one_row, one_column, out in zip(*chunks, strict=True):
        product = output_t.index_select(0, one_row) * input_t.index_select(0, one_column)
        out.copy_(product.sum(1, dtype=values.dtype))
    return values


def accumulate_second_moment(
    moment: Tensor, grad: Tensor, q_out: Tensor, q_in: Tensor, normalize: bool
) -> None:
    """Add the squares of the rotated gradient in place; ``top_entries`` of it is a fixed mask.

    ``moment`` is (r_out, r_in) float32 or float64, ``normalize`` as in ``accumulate_grams``. The
    bases come first, hence a second pass over the calibration batches.
    """
    moment.add_(rotate(_statistics(grad, moment.dtype, normalize), q_out, q_in).square())


def num_entries(shape: tuple[int, int], density: float) -> int:
    """Return ``max(1, round(density * r_out * r_in))``, density being a share in (0, 1]."""
    if not 0 < density <= 1:
        raise LeantuneError(
            f"SparseGrad: density must be in (0, 1], got {density}; it is a share, not a percentage"
        )
    return max(1, round(density * shape[0] * shape[1]))


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


def block_and_outliers(scores: Tensor, r_out: int, r_in: int, num_outliers: int) -> BlockMask:
    """Select the leading block, which GEMMs can form, and the largest of ``scores`` outside it."""
    d_out, d_in = scores.shape
    _check_count("r_out", r_out, 1, d_out)
    _check_count("r_in", r_in, 1, d_in)
    _check_count("num_outliers", num_outliers, 0, scores.numel() - r_out * r_in)
    row, column = (torch.arange(r, device=scores.device) for r in (r_out, r_in))
    block = (row[:, None] * d_in + column).flatten()
    outliers = _largest(_magnitude(scores).index_fill(0, block, -1.0), num_outliers)
    return BlockMask(block.to(outliers.dtype), outliers)


def energy_share(matrix: Tensor, density: float) -> Tensor:
    """Return the share of the squared Frobenius norm that the largest entries hold.

    ``density`` in (0, 1] says how many of (r_out, r_in) count as the largest. The result is (), in
    [0, 1]; NaN if the matrix is zero or not finite.
    """
    wide = matrix.to(torch.promote_types(matrix.dtype, torch.float32))
    # The ratio to the largest entry: squares neither overflow nor vanish.
    energy = (wide / wide.abs().amax()).square().flatten()
    k = num_entries((1, energy.numel()), density)
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
        raise LeantuneError(
            f"SparseGrad: {field} must be in [{low}, {high}], got {value}; {nearest} is the nearest"
        )
