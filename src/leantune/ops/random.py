"""Counter-based random numbers: a function of (seed, site, draw number), never of a generator.

Dimension letters: n numbers.
"""

import hashlib
from typing import NamedTuple

import torch
from torch import Tensor

_MASK32 = 0xFFFFFFFF
_MASK64 = 0xFFFFFFFFFFFFFFFF
# Odd and below 2**31: the product with a 32-bit word stays inside int64, so nothing overflows.
MULTIPLIERS = (0x7FEB352D, 0x21F0AAAD, 0x735A2D97)
DRAW_STEP = 0x5851F42D


class RandomKey(NamedTuple):
    """A key names one draw of random numbers; equal keys give equal numbers on every device.

    A recomputed forward asks with the same key and so draws the same rows again. No generator
    advances, and the caller's global stream stays untouched.

    Args:
        seed: any integer, taken modulo 2**64; the session's seed with the process's rank folded in.
        counter: () int64 in [0, 2**32), on the device where numbers are made; counts the training
            forwards of the model.
        stream: any integer, taken modulo 2**64; tells sites apart.
    """

    seed: int
    counter: Tensor
    stream: int = 0


def uniform(key: RandomKey, n: int) -> Tensor:
    """Return uniform numbers that depend on the key and their position, and on nothing else.

    The counter is never read on the host: there is no sync, and one CUDA graph serves every step.
    Integer arithmetic throughout gives the same bits on every device.

    Each round multiplies a 32-bit word into 63 bits and folds the upper half onto the lower; the
    counter enters after the first round, so draws do not share the order of the positions.

    Returns:
        (n,) float32 in [0, 1), multiples of 2**-24, on the counter's device; n below 2**32.

    Source: multiply-and-fold rounds as in the wyhash family; seed mixing as in SplitMix64.
    """
    return _to_unit(words(key, n))


def words(key: RandomKey, n: int) -> Tensor:
    """Return n random words, int64 in [0, 2**32): what :func:`uniform` makes its numbers of."""
    x = _words(key, torch.arange(n, device=key.counter.device))
    return _fold(x, MULTIPLIERS[2])


def first_word(key: RandomKey) -> int | Tensor:
    """Return the key's first number in units of 2**-24: ``uniform(key, 1)`` as a whole number.

    Returns:
        an integer where the counter lies on the host, which takes microseconds; () int64 elsewhere.
    """
    if key.counter.device.type != "cpu":
        return _to_unit(_fold(_words(key, torch.zeros_like(key.counter)), MULTIPLIERS[2])) * 2**24
    word = mixed(key.seed, key.stream)
    x = _fold_int(word & _MASK32, MULTIPLIERS[0])
    x ^= (int(key.counter) * DRAW_STEP + (word >> 32)) & _MASK32
    return _fold_int(_fold_int(x, MULTIPLIERS[1]), MULTIPLIERS[2]) >> 8


def uniform_at(key: RandomKey, rows: Tensor, columns: Tensor) -> Tensor:
    """Return the uniform number that belongs to each (row, column), whatever else is asked for.

    A table that is computed in pieces, of any size and order, gets the same numbers.

    Args:
        key: seed, counter and stream.
        rows: int64 in [0, 2**32), as ``columns``; both broadcast to the shape of the result, which
            is float32 in [0, 1), multiples of 2**-24.
    """
    x = _words(key, rows.clone()) ^ columns
    for multiplier in MULTIPLIERS:
        x = _fold(x, multiplier)
    return _to_unit(x)


def stream_of(name: str) -> int:
    """Return the random stream of a site: an integer that depends on its name alone."""
    digest = hashlib.blake2b(name.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little", signed=True)


def _words(key: RandomKey, x: Tensor) -> Tensor:
    """Turn positions into 32-bit words of (key, position); ``x`` is used up."""
    word = mixed(key.seed, key.stream)
    x ^= word & _MASK32
    x = _fold(x, MULTIPLIERS[0])
    x = x ^ ((key.counter * DRAW_STEP + (word >> 32)) & _MASK32)
    return _fold(x, MULTIPLIERS[1])


def mixed(seed: int, stream: int) -> int:
    """Return a 64-bit word of both: the finaliser of SplitMix64, a bijection, over each in turn."""
    word = 0
    for value in (seed, stream):
        word = (word + value + 0x9E3779B97F4A7C15) & _MASK64
        word = ((word ^ (word >> 30)) * 0xBF58476D1CE4E5B9) & _MASK64
        word = ((word ^ (word >> 27)) * 0x94D049BB133111EB) & _MASK64
        word ^= word >> 31
    return word


def _to_unit(words: Tensor) -> Tensor:
    words >>= 8
    return words.to(torch.float32).mul_(2.0**-24)


def _fold(x: Tensor, multiplier: int) -> Tensor:
    product = x * multiplier
    product ^= product >> 32
    product &= _MASK32
    return product


def _fold_int(x: int, multiplier: int) -> int:
    product = x * multiplier
    return (product ^ (product >> 32)) & _MASK32
