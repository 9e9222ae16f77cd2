"""Sampling of rows in whole numbers and loops, straight from its definition.

Scores and probabilities count in units of 2**-30; n rows, k kept rows.
"""

import numpy as np
from numpy.typing import NDArray

ONE = 1 << 30
Floats = NDArray[np.float32]


def masses(scores: Floats) -> list[int]:
    """Return each score as a whole number of 2**-30 of the largest one."""
    largest = max(scores.max(), np.finfo(np.float32).tiny)
    return [int(score / largest * np.float32(ONE)) for score in scores]


def threshold(mass: list[int], k: int) -> float:
    """Return tau, the least of ``tail_c / (k - c)``, the c heaviest rows being left out."""
    heaviest = sorted(mass, reverse=True)
    return min(sum(heaviest[c:]) / (k - c) for c in range(k))


def chances(mass: list[int], tau: float) -> list[int]:
    """Return the probability that each row is kept, in units."""
    unit = np.float32(max(tau / ONE, 1 / ONE))
    return [min(int(np.float32(m) / unit), ONE) for m in mass]


def sample_rows(scores: Floats, k: int, word: int) -> tuple[list[int], Floats]:
    """Return indices and weights of k rows, for ``word`` in [0, 2**24), the place of the points."""
    chance = chances(masses(scores), threshold(masses(scores), k))
    ends = [sum(chance[: i + 1]) for i in range(len(chance))]
    indices, weights = [], []
    for slot in range(k):
        point = (slot + 1) * ONE - (word << 6)
        hit = [i for i, end in enumerate(ends) if end >= point]
        indices.append(hit[0] if hit else len(chance) - 1)
        weights.append(np.float32(ONE) / np.float32(chance[hit[0]]) if hit else 0.0)
    return indices, np.array(weights, dtype=np.float32)


def sample_replaced(
    scores: Floats, k: int, words: list[int], estimator: str
) -> tuple[list[int], Floats]:
    """Return indices and weights of k rows by one of the paper's estimators.

    The word of each position, in [0, 2**32), says which row it draws.
    """
    mass = masses(scores)
    by_weight = sorted(range(len(mass)), key=lambda i: (-mass[i], i))
    tau = threshold(mass, k)
    num_sure = {"crs": 0, "topk": k, "wta": sum(m >= max(tau, 1) for m in mass)}[estimator]
    sure, rest = sorted(by_weight[:num_sure]), sorted(by_weight[num_sure:])
    weights = [1.0 if mass[i] else 0.0 for i in sure]
    indices, tail = list(sure), sum(mass[i] for i in rest)
    for word in words[num_sure:]:
        point = word / 2**32 * tail
        end, row, weight = 0, len(mass) - 1, 0.0
        for i in rest:
            end += mass[i]
            if end > point:
                row, weight = i, np.float32(tail / (k - num_sure)) / np.float32(mass[i])
                break
        indices.append(row)
        weights.append(weight)
    return indices, np.array(weights, dtype=np.float32)


def update_norms(
    guess: list[float], norms: NDArray[np.float64], decay: float, real: NDArray[np.bool_]
) -> list[float]:
    """Return the guess by position after norms (b, t) were met; ``real`` (b, t) rows count."""
    mean = (norms[real] ** 2).mean()
    new = []
    for position, old in enumerate(guess):
        here = norms[:, position][real[:, position]]
        ratio = (here**2).mean() / mean if len(here) else 0.0
        new.append((decay * old**2 + (1 - decay) * ratio) ** 0.5 if len(here) else old)
    return new
