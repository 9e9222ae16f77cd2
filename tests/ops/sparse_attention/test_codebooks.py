"""Codes are the nearest codewords, k-means finds what is there, and scores are the oracle's."""

from typing import Any

import numpy as np
import pytest
import torch
from oracles import spt as oracle
from torch import Tensor

from leantune.ops.sparse_attention import codebooks, tiles
from leantune.ops.sparse_attention.codebooks import assign, kmeans, quantise


def test_codes_are_the_nearest_codewords_lowest_first(monkeypatch: Any) -> None:
    monkeypatch.setattr(tiles, "_TILE_NUMBERS", 100)
    # Small integers: plenty of exact ties.
    z = torch.randint(-2, 3, (3, 2, 7, 12)).double()
    codebook = torch.randint(-2, 3, (4, 9, 3)).double()
    codes = assign(z, codebook)
    assert codes.dtype == torch.uint8 and codes.shape == (3, 2, 7, 4)
    wanted = oracle.nearest_codeword(z.view(-1, 12).numpy(), codebook.numpy())
    assert np.array_equal(codes.view(-1, 4).numpy(), wanted)
    highest = 8 - oracle.nearest_codeword(z.view(-1, 12).numpy(), codebook.flip(1).numpy())
    assert not np.array_equal(wanted, highest)


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
        codes = assign(vectors, book).long()
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
    codes = oracle.nearest_codeword(vectors.numpy(), start.numpy())
    for s, e in np.ndindex(2, 4):
        mean = vectors.view(50, 2, 3)[codes[:, s] == e, s].mean(0)
        assert torch.allclose(after[s, e], mean, rtol=0, atol=1e-12)


@pytest.mark.parametrize("num_books", [1, 2])
@pytest.mark.parametrize("width", [8, 10, 16])
def test_scores_equal_the_oracles_with_grouped_heads(width: int, num_books: int) -> None:
    q, k = torch.randn(2, 4, 6, 2 * width), torch.randn(2, 2, 9, 2 * width)
    books = torch.randn(num_books, width, 4, 2)
    everything = (slice(0, 2), slice(0, 6))
    scores = {}
    for scorer in ("match", "adc"):
        x = quantise(q, k, books, scorer)
        keys = x.keys(everything[0]).repeat_interleave(2, 1)
        scores[scorer] = x.queries(*everything) @ keys.mT
        whole = scores[scorer].double()
        assert torch.equal(whole, whole.round()) and float(whole.abs().max()) < 2**24
        # Rows on their own have the same features, to the bit.
        part = x.queries(slice(1, 2), slice(3, 5))
        assert torch.equal(part, x.queries(*everything)[1:2, :, 3:5])
    for b, h in np.ndindex(2, 4):
        book = books[h // 2 % num_books].double().numpy()
        own = oracle.nearest_codeword(q[b, h].double().numpy(), book)
        others = oracle.nearest_codeword(k[b, h // 2].double().numpy(), book)
        match = oracle.match_scores(own, others)
        assert np.array_equal(scores["match"][b, h].numpy(), match)
        wanted = oracle.adc_scores(q[b, h].double().numpy(), book, others)
        got = scores["adc"][b, h].double().numpy()
        # Equal up to a factor for each query, which the choice does not see.
        factor = (got * wanted).sum(-1, keepdims=True) / (wanted**2).sum(-1, keepdims=True)
        assert np.abs(got - factor * wanted).max() < 2 * width
        assert (factor > 0).all() and np.abs(got).max() > 1e4


def test_each_head_has_the_codes_of_its_own_codebook() -> None:
    q, k, books = torch.randn(2, 4, 5, 8), torch.randn(2, 2, 5, 8), torch.randn(2, 4, 16, 2)
    codes = quantise(q, k, books, "match").codes_k
    assert torch.equal(codes[:, 0], assign(k[:, 0], books[0]))
    assert torch.equal(codes[:, 1], assign(k[:, 1], books[1]))
    assert not torch.equal(codes[:, 1], assign(k[:, 1], books[0]))


def test_equal_keys_tie_whatever_stands_beside_them() -> None:
    q, books = torch.randn(1, 1, 5, 16), torch.randn(1, 2, 16, 8)
    key = torch.randn(1, 1, 1, 16)
    for num_keys in (1, 3, 37, 515):
        x = quantise(q, key.repeat(1, 1, num_keys, 1), books, "adc")
        scores = x.queries(slice(0, 1), slice(0, 5)) @ x.keys(slice(0, 1)).mT
        assert torch.equal(scores, scores[..., :1].expand_as(scores))
