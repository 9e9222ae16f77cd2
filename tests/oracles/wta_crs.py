"""Winner-take-all column-row sampling in float64 loops, straight from the formulas.

h is (n, d_in), g is (n, d_out), p is (n,); every function takes and returns numpy float64.
"""

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


def example_rows(n: int, log_std: float, seed: int = 0) -> tuple[Array, Array]:
    """Return h (n, 8) and g (n, 6), whose products have a common part and norms that differ."""
    rng = np.random.default_rng(seed)
    h = rng.normal(size=(n, 8)) + 0.3
    g = rng.normal(size=(n, 6)) + 0.3
    h /= np.linalg.norm(h, axis=1, keepdims=True)
    g /= np.linalg.norm(g, axis=1, keepdims=True)
    return h, g * np.exp(log_std * rng.normal(size=(n, 1)))


def norm_products(h: Array, g: Array) -> Array:
    """Return the optimal scores, ``||h_i|| ||g_i||``."""
    return np.linalg.norm(h, axis=1) * np.linalg.norm(g, axis=1)


def wrong_scores(name: str, h: Array, g: Array) -> Array:
    """Return positive scores that are more or less far from the optimal ones."""
    rng = np.random.default_rng(7)
    if name == "exact":
        return norm_products(h, g)
    if name == "random":
        return rng.random(len(h)) + 0.05
    if name == "input_norm":
        return np.linalg.norm(h, axis=1)
    assert name == "stale"
    return norm_products(h, g) * 10 ** rng.uniform(-1, 1, len(h))


def outer_products(h: Array, g: Array) -> Array:
    """Return X of shape (n, d_out, d_in), ``X_i = g_i h_i^T``."""
    return np.stack([np.outer(g[i], h[i]) for i in range(len(h))])


def grad_weight(h: Array, g: Array) -> Array:
    """Return the exact weight gradient, the sum of the outer products."""
    total = np.zeros((g.shape[1], h.shape[1]))
    for i in range(len(h)):
        total += np.outer(g[i], h[i])
    return total


def estimates(totals: Array, h: Array, g: Array) -> Array:
    """Return the weight gradients that total weights (num_draws, n) of the rows estimate, flat."""
    return totals @ outer_products(h, g).reshape(len(h), -1)


def squared_errors(totals: Array, h: Array, g: Array) -> Array:
    """Return ``||estimate - exact||_F^2`` of every draw, (num_draws,)."""
    return ((estimates(totals, h, g) - grad_weight(h, g).reshape(-1)) ** 2).sum(1)


def variance(x: Array, p: Array, k: int, chosen: set[int]) -> float:
    """Return E||estimate - exact||_F^2 with ``chosen`` kept and k - len(chosen) rows drawn.

    An empty ``chosen`` gives plain column-row sampling.
    """
    rest = [j for j in range(len(p)) if j not in chosen]
    tail = sum(p[j] for j in rest)
    second_moment = sum((x[j] ** 2).sum() / p[j] for j in rest if p[j] > 0)
    mean = x[rest].sum(0)
    return float((tail * second_moment - (mean**2).sum()) / (k - len(chosen)))


def heaviest(p: Array, c: int) -> set[int]:
    """Return the rows of the c largest p; among equals the lower row first."""
    return set(sorted(range(len(p)), key=lambda i: (-p[i], i))[:c])


def objective(p: Array, k: int, c: int) -> float:
    """Return what the choice of c minimises: the bound of the variance."""
    return sum(sorted(p)[: len(p) - c]) / (k - c)


def brute_force_size(p: Array, k: int) -> int:
    """Return the first c in [0, k) with the smallest objective."""
    values = [objective(p, k, c) for c in range(k)]
    return values.index(min(values))


def greedy_size(p: Array, k: int) -> int:
    """Return c by taking a row as long as it is expected more than once among the draws left."""
    descending = sorted(p, reverse=True)
    c = 0
    while c < k - 1 and descending[c] * (k - c) > sum(descending[c:]):
        c += 1
    return c


def draw_with_replacement(
    p: Array, k: int, chosen: set[int], rng: np.random.Generator, *, scaled: bool = True
) -> Array:
    """Return one draw as the total weight of every row, (n,).

    ``scaled=False`` leaves the factor ``1 / ((k - c) p_j)`` out: a biased scheme, for controls.
    """
    n, c = len(p), len(chosen)
    total = np.zeros(n)
    for i in chosen:
        total[i] = 1.0
    tail = sum(p[j] for j in range(n) if j not in chosen)
    for _ in range(k - c):
        point, j = rng.random() * tail, -1
        while True:
            j += 1
            if j in chosen:
                continue
            if point < p[j]:
                break
            point -= p[j]
        total[j] += tail / ((k - c) * p[j]) if scaled else tail
    return total


def draw_systematic(p: Array, k: int, chosen: set[int], rng: np.random.Generator) -> Array:
    """Return one systematic draw, in row order, as the total weight of every row, (n,)."""
    n, c = len(p), len(chosen)
    total = np.zeros(n)
    for i in chosen:
        total[i] = 1.0
    rest = [j for j in range(n) if j not in chosen]
    tail = sum(p[j] for j in rest)
    point, edge = rng.random(), 0.0
    for j in rest:
        inclusion = (k - c) * p[j] / tail
        edge += inclusion
        if point < edge:
            total[j] = 1.0 / inclusion
            point += 1.0
    return total
