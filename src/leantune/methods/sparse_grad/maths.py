"""SparseGrad's bases, rotations and selections as pure functions on any device.

Dimension letters: n rows (batch times tokens), d_out and d_in the sides of the weight, r_out and
r_in the basis vectors in use (all of them, or the leading ones), k selected entries, m_out and m_in
the rows and columns that hold a selected entry.

In the whole file ``x`` is (n, d_in), ``grad_output`` (n, d_out) and ``grad`` (d_out, d_in), of any
floating dtype. Basis vectors are columns: ``q_out`` (d_out, r_out) and ``q_in`` (d_in, r_in),
float32 or wider; they set the dtype of results. ``indices`` (k,) are flat row-major positions in
the rotated gradient ``q_out^T grad q_in`` (r_out, r_in), int32 or int64, ascending, without
repeats. Only ``support`` waits for the device, and ``basis`` where its solver does.

Source for the whole file: SparseGrad, arXiv 2410.07383. The input side is rotated by ``q_in``, as
the higher-order SVD has it; the released code multiplies by the transpose.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F


class Support(NamedTuple):
    """The rows (m_out,) and columns (m_in,) that hold a selected entry, ascending."""

    rows: Tensor
    columns: Tensor


def accumulate_grams(gram_out: Tensor, gram_in: Tensor, grad: Tensor) -> None:
    """Add one gradient to both Gram matrices, in place: no stack of gradients is ever held.

    ``gram_out += grad grad^T`` and ``gram_in += grad^T grad``. The eigenvectors are the left
    singular vectors of the stack's two unfoldings, in 40 MB instead of 3.4 GB for RoBERTa-base.

    Args:
        gram_out: (d_out, d_out) float32 or float64, changed.
        gram_in: (d_in, d_in) the same dtype, changed.
    """
    grad = grad.to(gram_out.dtype)
    gram_out.addmm_(grad, grad.mT)
    gram_in.addmm_(grad.mT, grad)


def basis(gram: Tensor) -> Tensor:
    """Return a complete orthonormal eigenbasis, largest eigenvalue first.

    Args:
        gram: (d, d) from ``accumulate_grams``, finite and not zero. Directions without energy come
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
    """Return which lines of ``shape`` (r_out, r_in) hold an entry of ``indices``."""
    rows = torch.unique_consecutive(indices // shape[1])
    return Support(rows, torch.unique(indices % shape[1]))


def rotate_back_sparse(
    indices: Tensor, values: Tensor, lines: Support, q_out: Tensor, q_in: Tensor
) -> Tensor:
    """Return ``q_out scatter(values) q_in^T`` (d_out, d_in), forming only lines with an entry.

    By rows that takes ``k d_in + d_out m_out d_in`` multiply-adds, by columns
    ``k d_out + d_out m_in d_in``: the cheaper way is taken. The dense product takes
    ``d_out r_out r_in + d_out r_in d_in``.

    Args:
        indices: (k,), possibly none.
        values: (k,) any floating dtype.
        lines: ``support(indices, (r_out, r_in))``.
    """
    (d_out, r_out), (d_in, r_in) = q_out.shape, q_in.shape
    num_rows, num_columns = lines.rows.numel(), lines.columns.numel()
    by_rows = indices.numel() * d_in + d_out * num_rows * d_in
    by_columns = indices.numel() * d_out + d_out * num_columns * d_in
    row, column = indices // r_in, indices % r_in
    if by_columns < by_rows:
        # The transposed problem, whose positions must again be ascending.
        flipped, order = torch.sort(column * r_out + row)
        swapped = Support(lines.columns, lines.rows)
        return rotate_back_sparse(flipped, values[order], swapped, q_in, q_out).mT
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


def rotates_rows_first(n: int, q_out: Tensor, q_in: Tensor) -> bool:
    """Return whether rotating the rows takes fewer multiply-adds than rotating their product.

    Scalar products of the selected columns alone would take ``n k`` on gathered numbers, each as
    dear as 110 inside a GEMM (a CPU core with AVX-512, 23,593 entries of (3072, 768) at 512 rows):
    more than the whole matrix from a density of 1 % on.
    """
    (d_out, r_out), (d_in, r_in) = q_out.shape, q_in.shape
    rows = n * (d_out * r_out + d_in * r_in + r_out * r_in)
    rotation = min(d_in * r_out * (d_out + r_in), d_out * r_in * (d_in + r_out))
    return rows <= n * d_out * d_in + rotation


def selected_gradient(
    x: Tensor, grad_output: Tensor, q_out: Tensor, q_in: Tensor, indices: Tensor, lines: Support
) -> Tensor:
    """Return the selected entries (k,) of the rotated weight gradient, in the cheaper order.

    Entry (i, j) is the scalar product of column i of ``grad_output q_out`` and column j of
    ``x q_in``, as in ``rotate(grad_output^T x, q_out, q_in)``. Basis vectors outside ``lines``,
    which is ``support(indices, (r_out, r_in))``, are skipped. GEMMs over rows run in the dtype of
    ``x``.
    """
    row, column = indices // q_in.shape[1], indices % q_in.shape[1]
    q_out, q_in = q_out.index_select(1, lines.rows), q_in.index_select(1, lines.columns)
    row, column = torch.searchsorted(lines.rows, row), torch.searchsorted(lines.columns, column)
    if rotates_rows_first(len(x), q_out, q_in):
        return grad_block(x @ q_in.to(x.dtype), grad_output, q_out)[row, column]
    return rotate(grad_output.mT @ x, q_out, q_in)[row, column]


def accumulate_second_moment(moment: Tensor, grad: Tensor, q_out: Tensor, q_in: Tensor) -> None:
    """Add the squares of the rotated gradient to ``moment`` (r_out, r_in), in place.

    The largest entries of the sum are the ones worth training throughout. The bases come first,
    hence a second pass over the calibration batches.
    """
    moment.add_(rotate(grad.to(moment.dtype), q_out, q_in).square())


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
    """Return the ascending positions of the largest magnitudes, exactly as many as asked for.

    Of equal magnitudes the earlier position is taken, on every device. NaN counts as the largest
    magnitude: a broken gradient is kept and stays visible. The result is int32, or int64 from
    2**31 scores on.
    """
    assert 1 <= num_entries <= scores.numel()
    magnitude = scores.flatten().abs()
    magnitude = magnitude.masked_fill(magnitude.isnan(), torch.inf)
    dtype = torch.int32 if magnitude.numel() < 2**31 else torch.int64
    # Which of equal entries topk returns is the device's choice; the k-th value is not.
    threshold = magnitude.topk(num_entries, sorted=False).values.amin()
    above, equal = magnitude > threshold, magnitude == threshold
    num_equal = num_entries - torch.count_nonzero(above)
    taken = above | (equal & (equal.cumsum(0, dtype=dtype) <= num_equal))
    # Where the running count first reaches 1, 2, ... k: nonzero() would wait for the device.
    counts = torch.arange(1, num_entries + 1, dtype=dtype, device=magnitude.device)
    return torch.searchsorted(taken.cumsum(0, dtype=dtype), counts, out_int32=dtype == torch.int32)
