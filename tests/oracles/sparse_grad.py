"""SparseGrad in float64, straight from the formulas: unfoldings, loops and full sorts.

Matrices are (d_out, d_in), bases have vectors as columns, masks are lists of flat positions.
"""

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


def unfolding_bases(stack: Array) -> tuple[Array, Array]:
    """Return the left singular vectors of both unfoldings of a stack (s, d_out, d_in)."""
    unfolded_out = np.concatenate(list(stack), axis=1)  # (d_out, s * d_in)
    unfolded_in = np.concatenate([t.T for t in stack], axis=1)  # (d_in, s * d_out)
    return np.linalg.svd(unfolded_out)[0], np.linalg.svd(unfolded_in)[0]


def rotate(grad: Array, q_out: Array, q_in: Array) -> Array:
    """Return q_out^T grad q_in, entry by entry."""
    rotated = np.zeros((q_out.shape[1], q_in.shape[1]))
    for i in range(q_out.shape[1]):
        for j in range(q_in.shape[1]):
            rotated[i, j] = (np.outer(q_out[:, i], q_in[:, j]) * grad).sum()
    return rotated


def rotate_back(indices: list[int], values: Array, q_out: Array, q_in: Array) -> Array:
    """Return the sum over entries of value times the outer product of its two basis vectors."""
    total = np.zeros((len(q_out), len(q_in)))
    for position, value in zip(indices, values, strict=True):
        i, j = divmod(position, q_in.shape[1])
        total += value * np.outer(q_out[:, i], q_in[:, j])
    return total


def selected_gradient(
    x: Array, grad_output: Array, q_out: Array, q_in: Array, indices: list[int]
) -> Array:
    """Return the scalar products of rotated columns, one selected entry after the other."""
    values = []
    for position in indices:
        i, j = divmod(position, q_in.shape[1])
        pairs = zip(grad_output, x, strict=True)
        values.append(sum((g @ q_out[:, i]) * (h @ q_in[:, j]) for g, h in pairs))
    return np.array(values)


def top_entries(scores: Array, k: int) -> list[int]:
    """Return the k positions of largest magnitude, ascending; of equal ones the earlier."""
    flat = scores.reshape(-1)
    return sorted(sorted(range(len(flat)), key=lambda p: (-abs(flat[p]), p))[:k])


def energy_share(matrix: Array, k: int) -> float:
    """Return the share of the sum of squares that the k largest squares hold."""
    squares = sorted((float(v) ** 2 for v in matrix.reshape(-1)), reverse=True)
    return sum(squares[:k]) / sum(squares)
