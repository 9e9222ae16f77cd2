"""meProp in float64, straight from the formulas: loops and full sorts.

Matrices are x (n, d_in), grad_output (n, d_out), weight (d_out, d_in).
"""

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


def keep_units(grad_output: Array, k: int) -> Array:
    """Return the columns with the k largest sums of magnitudes, the others zero."""
    sums = [sum(abs(v) for v in column) for column in grad_output.T]
    kept = np.zeros_like(grad_output)
    for j in sorted(range(len(sums)), key=lambda j: -sums[j])[:k]:
        kept[:, j] = grad_output[:, j]
    return kept


def keep_entries(grad: Array, k: int) -> Array:
    """Return the k entries of largest magnitude, the others zero."""
    flat = grad.reshape(-1)
    kept = np.zeros_like(flat)
    for p in sorted(range(len(flat)), key=lambda p: -abs(flat[p]))[:k]:
        kept[p] = flat[p]
    return kept.reshape(grad.shape)


def gradients(x: Array, kept: Array, weight: Array) -> tuple[Array, Array, Array]:
    """Return (dW, dX, db) of what was kept of the output's gradient."""
    grad_weight = sum(np.outer(s, row) for s, row in zip(kept, x, strict=True))
    return np.asarray(grad_weight), kept @ weight, kept.sum(0)
