"""Codes are the nearest codewords, and k-means finds what is there to be found."""

from typing import Any, get_args

import numpy as np
import pytest
import torch
from oracles import spt as oracle
from torch import Tensor

from leantune.errors import ConfigError
from leantune.ops import codebooks
from leantune.ops.codebooks import Metric, assign, kmeans, moving_step

METRICS = get_args(Metric)


@pytest.mark.parametrize("metric", METRICS)
def test_codes_are_the_nearest_codewords_lowest_first(metric: Metric, monkeypatch: Any) -> None:
    monkeypatch.setattr(codebooks, "_CHUNK_NUMBERS", 100)
    # Small integers: plenty of exact ties.
    z = torch.randint(-2, 3, (3, 2, 7, 12)).double()
    codebook = torch.randint(-2, 3, (4, 9, 3)).double()
    codes = assign(z, codebook, metric)
    assert codes.dtype == torch.uint8 and codes.shape == (3, 2, 7, 4)
    wanted = oracle.nearest_codeword(z.view(-1, 12).numpy(), codebook.numpy(), metric)
    assert np.array_equal(codes.view(-1, 4).numpy(), wanted)
    highest = 8 - oracle.nearest_codeword(z.view(-1, 12).numpy(), codebook.flip(1).numpy(), metric)
    assert not np.array_equal(wanted, highest)
    other = "l2" if metric == "l1" else "l1"
    assert not torch.equal(codes, assign(z, codebook, other))


def test_a_vectors_code_does_not_depend_on_its_company() -> None:
    z, codebook = torch.randn(100, 16).bfloat16(), torch.randn(2, 16, 8)
    codes = assign(z, codebook)
    assert torch.equal(codes[13:14], assign(z[13:14], codebook))
    assert torch.equal(codes, assign(z.float(), codebook))


def test_kmeans_finds_separated_blobs_in_every_subspace_and_repeats_itself() -> None:
    rng = np.random.default_rng(0)
    centres = rng.permutation(16)[:, None] * 10.0 + np.zeros((16, 4))
    labels = np.stack([rng.permutation(320) % 16 for _ in range(2)], 1)
    points = centres[labels] + 0.1 * rng.normal(size=(320, 2, 4))
    vectors = torch.from_numpy(points.reshape(320, 8)).float()
    codebook = kmeans(vectors, 2, 16, 20, seed=1)
    assert torch.equal(codebook, kmeans(vectors, 2, 16, 20, seed=1))
    start = kmeans(vectors, 2, 16, 0, seed=1)
    assert not torch.equal(start, kmeans(vectors, 2, 16, 0, seed=1, stream=1))

    def distortion(book: Tensor) -> float:
        codes = assign(vectors, book, "l2").long()
        hard = torch.stack([book[s][codes[:, s]] for s in range(2)], 1)
        return float((hard - vectors.view(320, 2, 4)).square().mean())

    # What is left is the noise, 0.1 squared; a blob without a codeword of its own would leave 3.
    assert distortion(codebook) < 0.0101 < distortion(start) < 0.03
    assert distortion(vectors[:16].view(16, 2, 4).transpose(0, 1)) > 3


def test_an_empty_codeword_moves_to_the_farthest_piece() -> None:
    vectors = torch.tensor([[0.0], [0.0], [2.0], [9.0], [4.0]])
    start = torch.tensor([[[0.0], [99.0], [-99.0], [0.5]]])
    after = codebooks._lloyd_step(vectors, vectors[None], start)
    assert after.flatten().tolist() == [0.0, 9.0, 4.0, 5.0]
    # Fewer distinct vectors than codewords: copies stay, nothing is NaN.
    same = kmeans(torch.ones(5, 4), 2, 4, 3, seed=0)
    assert torch.equal(same, torch.ones(2, 4, 2))


def test_one_step_is_the_mean_of_what_is_nearest() -> None:
    vectors = torch.randn(50, 6, dtype=torch.float64)
    start, after = (kmeans(vectors, 2, 4, i, seed=3) for i in (0, 1))
    codes = oracle.nearest_codeword(vectors.numpy(), start.numpy(), "l2")
    for s, e in np.ndindex(2, 4):
        mean = vectors.view(50, 2, 3)[codes[:, s] == e, s].mean(0)
        assert torch.allclose(after[s, e], mean, rtol=0, atol=1e-12)


def test_bad_calibration_names_field_and_way_out() -> None:
    with pytest.raises(ConfigError, match="vectors must be >= num_codewords = 16, got 15; calib"):
        kmeans(torch.randn(15, 8), 2, 16, 1, seed=0)
    with pytest.raises(ConfigError, match="num_subspaces must divide the width 8, got 3"):
        kmeans(torch.randn(20, 8), 3, 16, 1, seed=0)
    with pytest.raises(ConfigError, match="width of the vectors must be 2"):
        assign(torch.randn(4, 9), torch.randn(2, 16, 4))
    with pytest.raises(ConfigError, match="codewords must be <= 256"):
        assign(torch.randn(4, 8), torch.randn(2, 257, 4))


def test_a_moving_step_goes_towards_the_means_and_leaves_idle_codewords() -> None:
    vectors = torch.randn(50, 6, dtype=torch.float64)
    book = torch.randn(2, 4, 3, dtype=torch.float64)
    book[0, 2] = 99.0
    moved = moving_step(vectors, book, 0.75)
    codes = oracle.nearest_codeword(vectors.numpy(), book.numpy(), "l2")
    for s, e in np.ndindex(2, 4):
        mine = vectors.view(50, 2, 3)[codes[:, s] == e, s]
        wanted = 0.75 * book[s, e] + 0.25 * mine.mean(0) if len(mine) else book[s, e]
        assert torch.allclose(moved[s, e], wanted, rtol=0, atol=1e-12)
    assert torch.equal(moved[0, 2], book[0, 2])
