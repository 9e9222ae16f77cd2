"""Statistical checks with one false alarm in a million, whatever the correlation of the entries."""

import math
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike
from scipy import stats

FALSE_ALARM = 1e-6


class Check(NamedTuple):
    """A statistic and the value that it exceeds by chance once in a million runs."""

    statistic: float
    threshold: float

    @property
    def ok(self) -> bool:
        return bool(self.statistic <= self.threshold)  # NaN is not ok


def mean_check(samples: ArrayLike, expected: ArrayLike, *, resolution: float = 0.0) -> Check:
    """Compare the mean of many draws with its expectation by the pooled mean of z squared.

    Args:
        samples: (num_draws, ...) independent along the first axis.
        expected: the shape of one draw.
        resolution: numerical error of the samples themselves, added to every standard error; it
            must be far below the standard errors, except for entries that do not vary.
    """
    draws, deviation = _centre(samples, expected)
    num_draws = len(draws)
    standard_error = draws.std(0, ddof=1) / math.sqrt(num_draws) + resolution
    counted = (standard_error > 0) | (deviation != 0)
    if not counted.any():
        return Check(0.0, 1.0)
    with np.errstate(divide="ignore"):
        z = deviation[counted] / standard_error[counted]
    scale = standard_error[counted] * math.sqrt(num_draws)
    return Check(float((z**2).mean()), _bound(draws[:, counted] / np.where(scale > 0, scale, 1.0)))


def aggregate_check(samples: ArrayLike, expected: ArrayLike, variance: float) -> Check:
    """Compare ``num_draws * ||mean - expected||^2`` with the total variance of one draw.

    Their ratio has expectation 1 if the draws are unbiased and ``variance`` is right.

    Args:
        samples: (num_draws, ...) independent along the first axis.
        expected: the shape of one draw.
        variance: the closed form of ``E||draw - expected||^2``.
    """
    draws, deviation = _centre(samples, expected)
    return Check(float(len(draws) * (deviation**2).sum() / variance), _bound(draws))


def _centre(samples: ArrayLike, expected: ArrayLike) -> tuple[np.ndarray, np.ndarray]:
    draws = np.asarray(samples, dtype=np.float64)
    draws = draws.reshape(len(draws), -1)
    mean = draws.mean(0)
    return draws - mean, mean - np.asarray(expected, dtype=np.float64).reshape(-1)


def _bound(centred: np.ndarray) -> float:
    """Return what a sum of squares of a mean exceeds once in a million, relative to its mean.

    Such a sum is a weighted sum of squared normals, the weights being the eigenvalues of the
    covariance; the bound of Laurent and Massart (2000) is
    ``1 + (2 sqrt(x sum(eigenvalues^2)) + 2 x max(eigenvalues)) / sum(eigenvalues)``.
    """
    # The smaller one of the two Gram matrices: their non-zero eigenvalues are the same.
    tall = centred.shape[0] >= centred.shape[1]
    weights = np.linalg.eigvalsh(centred.T @ centred if tall else centred @ centred.T)
    if not weights[-1] > 0:
        return 1.0
    x = -math.log(FALSE_ALARM)
    slack = 2 * math.sqrt(x * (weights**2).sum()) + 2 * x * weights[-1]
    return 1 + float(slack / weights.sum())


def z_check(samples: ArrayLike, expected: float) -> Check:
    """Compare the mean of independent numbers with its expectation, two-sided."""
    draws = np.asarray(samples, dtype=np.float64).reshape(-1)
    standard_error = draws.std(ddof=1) / math.sqrt(len(draws))
    z = abs(draws.mean() - expected) / standard_error
    return Check(float(z), float(stats.norm.isf(FALSE_ALARM / 2)))


def chi_square_check(counts: ArrayLike, expected: ArrayLike | None = None) -> Check:
    """Compare counts with their expectation (None: all equal) by Pearson's chi-square."""
    observed = np.asarray(counts, dtype=np.float64).reshape(-1)
    if expected is None:
        wanted = np.full_like(observed, observed.mean())
    else:
        wanted = np.asarray(expected, dtype=np.float64).reshape(-1)
    statistic = ((observed - wanted) ** 2 / wanted).sum()
    return Check(float(statistic), float(stats.chi2.isf(FALSE_ALARM, len(observed) - 1)))


def correlation_check(a: ArrayLike, b: ArrayLike) -> Check:
    """Compare the correlation of two sets of independent numbers with zero, two-sided."""
    x, y = (np.asarray(v, dtype=np.float64).reshape(-1) for v in (a, b))
    z = abs(np.corrcoef(x, y)[0, 1]) * math.sqrt(len(x) - 1)
    return Check(float(z), float(stats.norm.isf(FALSE_ALARM / 2)))
