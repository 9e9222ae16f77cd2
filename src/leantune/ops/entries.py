"""SparseGrad's bases, rotations and selections as pure functions on any device.

Legend: d_out and d_in the sides of the weight, r_out and r_in the basis vectors in use (all of
them, or the leading ones). ``grad`` is (d_out, d_in), of any floating dtype. Basis vectors are
columns: ``q_out`` (d_out, r_out) and ``q_in`` (d_in, r_in), float32 or wider; they set the dtype of
results. Nothing waits for the device, but ``basis`` where its solver does.

Source for the whole file: SparseGrad, arXiv 2410.07383. The input side is rotated by ``q_in``, as
the higher-order SVD has it; the released code multiplies by the transpose.
"""

import math

import torch
from torch import Tensor


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


def num_entries(shape: tuple[int, int], density: float) -> int:
    """Return how many entries a share of a weight is, 0 where that is less than half of one."""
    return round(density * shape[0] * shape[1])


def block_shape(shape: tuple[int, int], most: int) -> tuple[int, int]:
    """Return (r_out, r_in) of at most ``most`` entries, with ``d_out r_out`` near ``d_in r_in``.

    So balanced, thin bases are smallest and so is the work of rotating rows. Tensor cores want
    sides in multiples of 16, and of 64 in wide layers: a side that is as long is cut to one.
    """
    d_out, d_in = shape
    balanced = math.sqrt(most * d_in / d_out)
    found = []
    for side in (balanced, balanced + _unit(balanced, d_out)):
        r_in = _cut(most / _cut(side, d_out), d_in)
        # What cutting left over goes to the first side.
        found.append((_cut(most / r_in, d_out), r_in))
    return max(found, key=math.prod)


def _unit(side: float, width: int) -> int:
    return 64 if width >= 2048 and side >= 128 else 16 if side >= 16 else 1


def _cut(side: float, width: int) -> int:
    unit = _unit(side, width)
    return width if side >= width else max(int(side) // unit * unit, 1)


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
