"""Row operations that know no method: counter-based random numbers and row norms.

Dimension letters: n rows, d features.
"""

import hashlib

import torch
from torch import Tensor

_MASK32 = 0xFFFFFFFF
_MASK64 = 0xFFFFFFFFFFFFFFFF
# Odd and below 2**31: the product with a 32-bit word stays inside int64, so nothing overflows.
_MULTIPLIERS = (0x7FEB352D, 0x21F0AAAD, 0x735A2D97)
_DRAW_STEP = 0x5851F42D


def uniform(seed: int, stream: int, draw: Tensor, n: int, *, device: torch.device | str) -> Tensor:
    """Return uniform numbers that depend on (seed, stream, draw, position) and on nothing else.

    No generator advances, so a recomputed forward gets the same numbers and the global stream
    stays untouched. The draw number is never read on the host: no sync, one CUDA graph serves
    every step. Integer arithmetic throughout, hence the same bits on every device.

    Each round multiplies a 32-bit word into 63 bits and folds the upper half onto the lower; the
    draw number enters after the first round, so draws do not share the order of the positions.

    Args:
        seed: any integer, taken modulo 2**64.
        stream: any integer, taken modulo 2**64; one per site.
        draw: () int64 on ``device``, in [0, 2**32).
        n: how many numbers, in [0, 2**32).
        device: where the numbers are made.

    Returns:
        (n,) float32 in [0, 1), multiples of 2**-24.

    Source: multiply-and-fold rounds as in the wyhash family; seed mixing as in SplitMix64.
    """
    x = _words(seed, stream, draw, torch.arange(n, device=device))
    return _to_unit(_fold(x, _MULTIPLIERS[2]))


def uniform_at(seed: int, stream: int, draw: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """Return the uniform number that belongs to each (row, column), whatever else is asked for.

    A table that is computed in pieces, of any size and order, gets the same numbers.

    Args:
        seed, stream, draw: as for :func:`uniform`.
        rows: int64 in [0, 2**32).
        columns: int64 in [0, 2**32); rows and columns broadcast.

    Returns:
        The broadcast shape, float32 in [0, 1), multiples of 2**-24.
    """
    x = _words(seed, stream, draw, rows.clone()) ^ columns
    for multiplier in _MULTIPLIERS:
        x = _fold(x, multiplier)
    return _to_unit(x)


def stream_of(name: str) -> int:
    """Return the random stream of a site: an integer that depends on its name alone."""
    digest = hashlib.blake2b(name.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little", signed=True)


def row_norms(x2d: Tensor) -> Tensor:
    """Return the L2 norm of every row, accumulated in float32 without a float32 copy of the input.

    Args:
        x2d: (n, d) any floating dtype.

    Returns:
        (n,) float32.
    """
    if x2d.dtype == torch.float64:
        return torch.linalg.vector_norm(x2d, dim=-1).float()
    return torch.linalg.vector_norm(x2d, dim=-1, dtype=torch.float32)


def _words(seed: int, stream: int, draw: Tensor, x: Tensor) -> Tensor:
    """Turn positions into 32-bit words of (seed, stream, draw, position); ``x`` is used up."""
    key = _mix64(_mix64(seed) + stream)
    x ^= key & _MASK32
    x = _fold(x, _MULTIPLIERS[0])
    x = x ^ ((draw * _DRAW_STEP + (key >> 32)) & _MASK32)
    return _fold(x, _MULTIPLIERS[1])


def _to_unit(words: Tensor) -> Tensor:
    words >>= 8
    return words.to(torch.float32).mul_(2.0**-24)


def _fold(x: Tensor, multiplier: int) -> Tensor:
    product = x * multiplier
    product ^= product >> 32
    product &= _MASK32
    return product


def _mix64(value: int) -> int:
    """Return the SplitMix64 finaliser of ``value``: a bijection of 64-bit words."""
    z = (value + 0x9E3779B97F4A7C15) & _MASK64
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & _MASK64
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & _MASK64
    return z ^ (z >> 31)
