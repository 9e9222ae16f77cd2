"""Scores by codes equal the oracle's, and the prototype's loss does what it says."""

import numpy as np
import pytest
import torch
from oracles import spt as oracle

from leantune.methods.spt_attention.pq import Quantised, assign_heads, quantisation_loss
from leantune.ops.codebooks import assign


def test_loss_equals_the_formula_and_its_gradient_finite_differences() -> None:
    z = torch.randn(6, 6, dtype=torch.float64, requires_grad=True)
    codebook = torch.randn(2, 5, 3, dtype=torch.float64, requires_grad=True)
    loss = quantisation_loss(z, codebook)
    wanted = oracle.quantisation_loss(z.detach().numpy(), codebook.detach().numpy())
    assert abs(float(loss.detach()) - wanted) < 1e-12
    assert torch.autograd.gradcheck(quantisation_loss, (z, codebook))
    grads = torch.autograd.grad(
        quantisation_loss(z.detach(), codebook), (z, codebook), allow_unused=True
    )
    assert grads[0] is None and bool(grads[1].any())


def test_loss_learns_separable_blobs() -> None:
    labels = torch.arange(200) % 4
    centres = torch.tensor([[2.0, 2.0], [2.0, -2.0], [-2.0, 2.0], [-2.0, -2.0]])
    z = centres[labels] + 0.2 * torch.randn(200, 2)
    codebook = torch.nn.Parameter(0.5 * centres[None] + 0.3 * torch.randn(1, 4, 2))
    optimizer = torch.optim.Adam([codebook], lr=0.05)
    losses = []
    for _ in range(60):
        loss = quantisation_loss(z, codebook)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.2 * losses[0]
    assert float((assign(z, codebook)[:, 0] == labels).float().mean()) > 0.75


@pytest.mark.parametrize("num_books", [1, 2])
@pytest.mark.parametrize("width", [8, 10, 16])
def test_scores_equal_the_oracles_with_grouped_heads(width: int, num_books: int) -> None:
    q, k = torch.randn(2, 4, 6, 2 * width), torch.randn(2, 2, 9, 2 * width)
    books = torch.randn(num_books, width, 4, 2)
    everything = (slice(0, 2), slice(0, 6))
    scores = {}
    for scorer in ("match", "adc"):
        x = Quantised.of(q, k, books, "l1", scorer)
        keys = x.keys(everything[0]).repeat_interleave(2, 1)
        scores[scorer] = x.queries(*everything) @ keys.mT
        whole = scores[scorer].double()
        assert torch.equal(whole, whole.round()) and float(whole.abs().max()) < 2**24
        # Rows on their own have the same features, to the bit.
        part = x.queries(slice(1, 2), slice(3, 5))
        assert torch.equal(part, x.queries(*everything)[1:2, :, 3:5])
    for b, h in np.ndindex(2, 4):
        book = books[h // 2 % num_books].double().numpy()
        own = oracle.nearest_codeword(q[b, h].double().numpy(), book, "l1")
        others = oracle.nearest_codeword(k[b, h // 2].double().numpy(), book, "l1")
        match = oracle.match_scores(own, others)
        assert np.array_equal(scores["match"][b, h].numpy(), match)
        wanted = oracle.adc_scores(q[b, h].double().numpy(), book, others)
        got = scores["adc"][b, h].double().numpy()
        # Equal up to a factor for each query, which the choice does not see.
        factor = (got * wanted).sum(-1, keepdims=True) / (wanted**2).sum(-1, keepdims=True)
        assert np.abs(got - factor * wanted).max() < 2 * width
        assert (factor > 0).all() and np.abs(got).max() > 1e4


def test_each_head_has_the_codes_of_its_own_codebook() -> None:
    z, books = torch.randn(2, 4, 5, 8), torch.randn(2, 4, 16, 2)
    codes = assign_heads(z, books, "l2")
    assert torch.equal(codes[:, :2], assign(z[:, :2], books[0], "l2"))
    assert torch.equal(codes[:, 2:], assign(z[:, 2:], books[1], "l2"))
    assert not torch.equal(codes[:, 2:], assign(z[:, 2:], books[0], "l2"))


def test_equal_keys_tie_whatever_stands_beside_them() -> None:
    q, books = torch.randn(1, 1, 5, 16), torch.randn(1, 2, 16, 8)
    key = torch.randn(1, 1, 1, 16)
    for num_keys in (1, 3, 37, 515):
        x = Quantised.of(q, key.repeat(1, 1, num_keys, 1), books, "l2", "adc")
        scores = x.queries(slice(0, 1), slice(0, 5)) @ x.keys(slice(0, 1)).mT
        assert torch.equal(scores, scores[..., :1].expand_as(scores))
