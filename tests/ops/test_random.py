"""The counter-based numbers look independent along every argument."""

import hashlib

import numpy as np
import pytest
import torch
from stats import chi_square_check, correlation_check, z_check
from torch import Tensor

from leantune.ops.random import RandomKey, stream_of, uniform, uniform_at

NUM_ROWS = 1024


def draw_table(seed: int = 0, stream: int = 0, num_draws: int = 512) -> np.ndarray:
    """(num_draws, NUM_ROWS): one line per draw number."""
    line = torch.func.vmap(lambda counter: uniform(RandomKey(seed, counter, stream), NUM_ROWS))
    return line(torch.arange(num_draws)).double().numpy()


def stack(name: str) -> np.ndarray:
    """(256, NUM_ROWS): one line per value of the argument ``name``, the others fixed."""
    zero = torch.tensor(0)
    if name == "draw":
        return draw_table(num_draws=256)
    if name == "seed":
        lines = [uniform(RandomKey(i, zero, 3), NUM_ROWS) for i in range(256)]
    else:
        lines = [uniform(RandomKey(3, zero, i), NUM_ROWS) for i in range(256)]
    return torch.stack(lines).double().numpy()


def weyl_table() -> np.ndarray:
    """An additive sequence: evenly spread but far from random; every check must notice."""
    i = np.arange(256)[:, None] * NUM_ROWS + np.arange(NUM_ROWS)
    return (i * 0.6180339887498949) % 1.0


def pair_counts(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Counts over a 32 by 32 grid of (a, b)."""
    cell = (a * 32).astype(np.int64) * 32 + (b * 32).astype(np.int64)
    return np.bincount(cell.reshape(-1), minlength=1024)


def test_same_arguments_same_numbers_and_range() -> None:
    key = RandomKey(1, torch.tensor(5), 2)
    first = uniform(key, 1000)
    assert torch.equal(first, uniform(RandomKey(1, torch.tensor(5))._replace(stream=2), 1000))
    assert first.dtype == torch.float32
    assert first.shape == (1000,)
    assert first.min() >= 0 and first.max() < 1
    # A shorter request is a prefix: the number of a row does not depend on how many there are.
    assert torch.equal(first[:10], uniform(key, 10))


def test_bits_are_pinned() -> None:
    # A recipe's draws must not change with a release, a device or a torch version.
    words = uniform(RandomKey(1, torch.tensor(3), 2), 4).mul(2**24).to(torch.int64).tolist()
    assert words == [10195082, 10418062, 2750556, 7140559]


def test_arithmetic_equals_unbounded_integers() -> None:
    """The same rounds in Python integers: no int64 product overflows, even at the extremes."""

    def mix64(value: int) -> int:
        z = (value + 0x9E3779B97F4A7C15) % 2**64
        z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
        z = (z ^ (z >> 27)) * 0x94D049BB133111EB % 2**64
        return z ^ (z >> 31)

    def fold(x: int, multiplier: int) -> int:
        return (x * multiplier) % 2**32 ^ (x * multiplier) >> 32

    for seed, stream, draw in [(0, 0, 0), (-1, 2**64 - 1, 2**32 - 1), (2**80 + 7, -5, 123456)]:
        key = mix64(mix64(seed) + stream)
        expected = []
        for row in range(64):
            x = fold(row ^ key % 2**32, 0x7FEB352D)
            x ^= (draw * 0x5851F42D + (key >> 32)) % 2**32
            expected.append((fold(fold(x, 0x21F0AAAD), 0x735A2D97) >> 8) / 2**24)
        actual = uniform(RandomKey(seed, torch.tensor(draw), stream), 64)
        assert actual.tolist() == expected


def test_moments() -> None:
    u = draw_table(seed=1)
    centred = u - 0.5
    assert z_check(u, 1 / 2).ok
    assert z_check(centred**2, 1 / 12).ok
    assert z_check(centred**4, 1 / 80).ok
    assert not z_check(u * 1.01, 1 / 2).ok
    assert not z_check((centred * 1.01) ** 2, 1 / 12).ok


def test_every_bit_level_is_uniform() -> None:
    u = draw_table(seed=2)
    for scale in (1, 2**7, 2**14):
        assert chi_square_check(np.bincount((u * scale % 1 * 1024).astype(int).reshape(-1))).ok
    skewed = u**1.02
    assert not chi_square_check(np.bincount((skewed * 1024).astype(int).reshape(-1))).ok


@pytest.mark.parametrize("lag", [1, 2, 3, 8, 64, 512])
def test_neighbouring_rows_are_independent(lag: int) -> None:
    u = draw_table(seed=3)
    assert correlation_check(u[:, lag:], u[:, :-lag]).ok
    assert chi_square_check(pair_counts(u[:, lag:], u[:, :-lag])).ok
    weyl = weyl_table()
    assert not chi_square_check(pair_counts(weyl[:, lag:], weyl[:, :-lag])).ok


@pytest.mark.parametrize("name", ["draw", "stream", "seed"])
@pytest.mark.parametrize("lag", [1, 2, 16])
def test_lines_of_every_argument_are_independent(name: str, lag: int) -> None:
    u = stack(name)
    assert correlation_check(u[lag:], u[:-lag]).ok
    assert chi_square_check(pair_counts(u[lag:], u[:-lag])).ok
    weyl = weyl_table()
    assert not chi_square_check(pair_counts(weyl[lag:], weyl[:-lag])).ok
    # One line shared by two draws is the defect of a generator that is not advanced.
    u[1] = u[0]
    assert not correlation_check(u[1], u[0]).ok


@pytest.mark.parametrize("name", ["draw", "stream", "seed"])
def test_line_sums_have_the_variance_of_independent_numbers(name: str) -> None:
    centred = stack(name) - 0.5
    for axis, count in ((1, NUM_ROWS), (0, 256)):
        assert z_check(centred.sum(axis) ** 2, count / 12).ok
    stratified = np.sort(centred, axis=1)[:, ::2]
    assert not z_check(stratified.sum(1) ** 2, NUM_ROWS / 24).ok


def test_a_table_in_pieces_is_the_whole_table() -> None:
    rows, columns = torch.arange(300)[:, None], torch.arange(500)
    key = RandomKey(5, torch.tensor(3), 7)
    whole = uniform_at(key, rows, columns)
    assert whole.dtype == torch.float32 and 0 <= float(whole.min()) <= float(whole.max()) < 1
    picked = torch.randperm(500)[:40]
    assert torch.equal(uniform_at(key, rows[90:95], picked), whole[90:95, picked])
    assert torch.equal(rows, torch.arange(300)[:, None]), "the arguments are left alone"
    for other in ((6, 7, 3), (5, 8, 3), (5, 7, 4)):
        again = uniform_at(RandomKey(other[0], torch.tensor(other[2]), other[1]), rows, columns)
        assert float((again == whole).double().mean()) < 1e-3


def test_rows_and_columns_of_a_table_are_independent() -> None:
    u = uniform_at(RandomKey(5, torch.tensor(3), 7), torch.arange(512)[:, None], torch.arange(512))
    table = u.double().numpy()
    for a, b in (
        (table[:, :-1], table[:, 1:]),
        (table[:-1], table[1:]),
        (table[:, :-64], table[:, 64:]),
        (table[:-7, :-3], table[7:, 3:]),
    ):
        assert chi_square_check(pair_counts(a, b)).ok
    sums = (table.sum(1) - 256) / np.sqrt(512 / 12)
    assert abs(float((sums**2).mean()) - 1) < 5 * np.sqrt(2 / 512)
    # Control: rows that share their words up to a shift of the columns are noticed.
    shifted = np.stack([np.roll(table[0], i) for i in range(512)])
    assert not chi_square_check(pair_counts(shifted[:-1, :-1], shifted[1:, 1:])).ok


def test_no_host_read() -> None:
    def numbers(draw: Tensor) -> Tensor:
        return uniform(RandomKey(1, draw, 2), 64)

    assert numbers(torch.empty((), dtype=torch.int64, device="meta")).shape == (64,)


@pytest.mark.gpu
def test_same_bits_on_the_gpu() -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    on_gpu = uniform(RandomKey(9, torch.tensor(7, device="cuda"), 8), 5000)
    assert torch.equal(on_gpu.cpu(), uniform(RandomKey(9, torch.tensor(7), 8), 5000))


def test_streams_are_pinned_and_differ_by_name() -> None:
    assert stream_of("a") == int.from_bytes(
        hashlib.blake2b(b"a", digest_size=8).digest(), "little", signed=True
    )
    names = [f"layer.{i}.query" for i in range(1000)]
    assert len({stream_of(name) for name in names}) == 1000
