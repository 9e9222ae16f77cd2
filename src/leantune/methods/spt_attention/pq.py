"""Scores of keys by product quantisation, and the prototype's loss for codebooks.

Legend: b batch, h query heads, hk key heads, n queries, m keys, d width, s subspaces, w = d / s
width of a subspace, e codewords per subspace, r rows of one part.

Two vectors whose codes agree in many subspaces are near each other ("match"); or the query is kept
and only the key quantised ("adc"). Codes choose keys and nothing else: attention reads the true
vectors.

Source for the whole file: SPT, arXiv 2312.10365, and its prototype, where that is more definite.
"""

from typing import Literal, NamedTuple

import torch
from torch import Tensor

from leantune.ops.codebooks import Metric, assign

Scorer = Literal["match", "adc"]


def assign_heads(z: Tensor, codebooks: Tensor, metric: Metric) -> Tensor:
    """Return the codes of z (b, h, n, d) by codebooks (1 or hk, s, e, w), (b, h, n, s) uint8."""
    groups = z.chunk(len(codebooks), 1)
    codes = [assign(g, book, metric) for g, book in zip(groups, codebooks, strict=True)]
    return torch.cat(codes, 1)


def quantisation_loss(z: Tensor, codebook: Tensor) -> Tensor:
    """Return the prototype's loss, which pulls codewords to vectors and vectors to codewords.

    ``mean((soft - hard)^2) + mean((z - hard)^2)``, hard the nearest codewords in L1 and soft the
    mean of all codewords weighted by the inverse of the distance, at least 1e-5. Pass
    ``z.detach()`` to train the codebook alone.

    Args:
        z: (..., d).
        codebook: (s, e, w) with s w = d.

    Returns:
        () in the dtype of the codebook.
    """
    width = codebook.shape[2]
    pieces = z.reshape(-1, z.shape[-1]).to(codebook.dtype).unflatten(1, (-1, width)).transpose(0, 1)
    distances = torch.cdist(pieces, codebook, p=1.0)  # (s, n, e)
    nearness = distances.clamp(min=1e-5).reciprocal()
    soft = (nearness / nearness.sum(-1, keepdim=True)) @ codebook  # (s, n, w)
    nearest = distances.argmin(-1, keepdim=True).expand(-1, -1, width)
    hard = codebook.gather(1, nearest)
    return (soft - hard).square().mean() + (pieces - hard).square().mean()


class Quantised(NamedTuple):
    """Features of scores from codes: a one-hot code of the key meets a table of the query.

    "match": the table is the query's own one-hot code, the score the number of subspaces whose
    codes agree (the paper's). "adc": the table holds ``q_s . codebook[s, e]``, the score is the
    product of the query with the decoded key, on a grid of whole numbers: the largest entry of a
    query's table is at most 2**23 / s, so that sums are exact in float32.

    Args:
        q: (b, h, n, d).
        codes_q: (b, h, n, s) uint8.
        codes_k: (b, hk, m, s) uint8.
        codebooks: (1 or hk, s, e, w).
        scorer: "match" or "adc".
    """

    q: Tensor
    codes_q: Tensor
    codes_k: Tensor
    codebooks: Tensor
    scorer: Scorer

    @classmethod
    def of(
        cls, q: Tensor, k: Tensor, codebooks: Tensor, metric: Metric, scorer: Scorer
    ) -> "Quantised":
        """Quantise q (b, h, n, d) and k (b, hk, m, d)."""
        codes = [assign_heads(x, codebooks, metric) for x in (q, k)]
        return cls(q.detach(), codes[0], codes[1], codebooks, scorer)

    def queries(self, batch: slice, rows: slice) -> Tensor:
        """Return (b', h, r, s e) float32."""
        if self.scorer == "match":
            return _one_hot(self.codes_q[batch, :, rows], self.codebooks.shape[2])
        num_books, num_subspaces, _, width = self.codebooks.shape
        words = self.codebooks.detach().float()
        pieces = self.q[batch, :, rows].float()
        pieces = pieces.unflatten(3, (num_subspaces, width)).unflatten(1, (num_books, -1))
        table = torch.zeros((), device=pieces.device)
        for i in range(width):
            # (b', books, h / books, r, s, e): the same bits wherever a query stands.
            table = table + pieces[..., i, None] * words[:, None, None, :, :, i]
        table = table.flatten(1, 2).flatten(-2)
        top = table.abs().amax(-1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny)
        return (table / top * (2**23 // num_subspaces)).round()

    def keys(self, batch: slice) -> Tensor:
        """Return (b', hk, m, s e) float32."""
        return _one_hot(self.codes_k[batch], self.codebooks.shape[2])


def _one_hot(codes: Tensor, num_codewords: int) -> Tensor:
    words = torch.arange(num_codewords, device=codes.device, dtype=torch.int16)
    return (codes[..., None] == words).flatten(-2).to(torch.float32)
