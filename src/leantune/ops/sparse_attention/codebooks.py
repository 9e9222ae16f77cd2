"""Product quantisation: codebooks by k-means in every subspace, codes, and scores from codes.

Legend: b batch, h query heads, hk key heads, n queries, m keys, d width, s subspaces, w = d / s
width of a subspace, e codewords per subspace, c codebooks (a divisor of hk), r rows of one part.

A vector is cut into s pieces and each piece named by its nearest codeword. Two vectors whose codes
agree in many subspaces are near each other ("match"); or the query is kept and only the key is
quantised ("adc"). Codes choose keys and nothing else: attention reads the true vectors.

Source for the whole file: SPT, arXiv 2312.10365, and its prototype, where that is more definite.
"""

from typing import Literal, NamedTuple

import torch
from torch import Tensor

from leantune.ops.backend import on_gpu
from leantune.ops.random import RandomKey, uniform
from leantune.ops.sparse_attention.tiles import accumulator, slices, tile_numbers

Scorer = Literal["adc", "match"]


def assign(z: Tensor, codebook: Tensor) -> Tensor:
    """Return the nearest codeword of every piece; among equally near ones the lowest number.

    Args:
        z: (..., d), any floating dtype.
        codebook: (s, e, w) with s w = d and e <= 256.

    Returns:
        (..., s) uint8.
    """
    num_subspaces, num_codewords, width = codebook.shape
    assert z.shape[-1] == num_subspaces * width and num_codewords <= 256
    rows = z.detach().reshape(-1, z.shape[-1])
    codes = torch.empty(len(rows), num_subspaces, dtype=torch.uint8, device=z.device)
    for part in slices(len(rows), tile_numbers(z) // (num_subspaces * num_codewords)):
        codes[part] = _squared_distances(rows[part], codebook).argmin(-1).to(torch.uint8)
    return codes.view(*z.shape[:-1], num_subspaces)


def _squared_distances(z: Tensor, codebook: Tensor) -> Tensor:
    """Return (r, s, e); equal pieces get equal bits wherever the pieces stand."""
    dtype = accumulator(z)
    pieces = z.to(dtype).unflatten(-1, codebook.shape[::2])  # (r, s, w)
    words = codebook.detach().to(dtype)
    total = torch.zeros((), dtype=dtype, device=z.device)
    # One coordinate at a time: no (r, s, e, w) tensor, and none of the cancellation of a product.
    for i in range(words.shape[2]):
        total = total + (pieces[..., i, None] - words[..., i]).square()
    return total


def kmeans(
    vectors: Tensor,
    num_subspaces: int,
    num_codewords: int,
    num_steps: int,
    *,
    seed: int,
    stream: int = 0,
) -> Tensor:
    """Return a codebook by Lloyd's steps in every subspace, the same for the same arguments.

    The first codewords are pieces drawn by counted numbers, each with a probability proportional
    to the squared distance from those before it. A codeword that nothing is nearest to moves to
    the piece that is farthest from its own, the second such one to the second farthest and so on.

    Args:
        vectors: (n, d), any floating dtype, n >= num_codewords.
        num_subspaces: s, a divisor of d.
        num_codewords: e, in [1, 256].
        num_steps: Lloyd's steps.
        seed: of the first codewords; ``stream`` tells sites apart.

    Returns:
        (s, e, w) float32 (float64 for float64 vectors).

    Source: Arthur and Vassilvitskii, "k-means++", 2007, for the start; the prototype starts from
    normal noise.
    """
    assert len(vectors) >= num_codewords and vectors.shape[1] % num_subspaces == 0
    vectors = vectors.detach().to(accumulator(vectors))
    zero = torch.zeros((), dtype=torch.int64, device=vectors.device)
    u = uniform(RandomKey(seed, zero, stream), num_codewords * num_subspaces)
    pieces = vectors.unflatten(1, (num_subspaces, -1)).transpose(0, 1)  # (s, n, w)
    codebook = _spread_codewords(pieces, u.view(num_codewords, num_subspaces, 1))
    for _ in range(num_steps):
        codebook = _lloyd_step(vectors, pieces, codebook)
    return codebook.contiguous()


def _spread_codewords(pieces: Tensor, u: Tensor) -> Tensor:
    """Draw codewords (s, e, w) of pieces (s, n, w) by numbers (e, s, 1) in [0, 1)."""
    mass = pieces.new_ones(pieces.shape[:2])
    words = []
    for point in u:
        edges = mass.cumsum(1, dtype=torch.float64)
        hit = torch.searchsorted(edges, point * edges[:, -1:], right=True)  # (s, 1)
        hit = hit.clamp(max=pieces.shape[1] - 1)[..., None].expand(-1, -1, pieces.shape[2])
        words.append(pieces.gather(1, hit))
        gap = (pieces - words[-1]).square().sum(-1)
        mass = gap if len(words) == 1 else torch.minimum(mass, gap)
    return torch.cat(words, 1)


def _lloyd_step(vectors: Tensor, pieces: Tensor, codebook: Tensor) -> Tensor:
    """Return the means of the pieces (s, n, w) nearest to each codeword, see :func:`kmeans`."""
    num_subspaces, num_codewords, width = codebook.shape
    codes = assign(vectors, codebook).long().t()  # (s, n)
    first = torch.arange(num_subspaces, device=codes.device)[:, None] * num_codewords
    flat = (codes + first).reshape(-1)
    sums = codebook.new_zeros(num_subspaces * num_codewords, width)
    # In a fixed order: index_add_ uses atomics on a GPU, index_put_ races on a CPU.
    if on_gpu(sums):
        sums.index_put_((flat,), pieces.reshape(-1, width), accumulate=True)
    else:
        sums.index_add_(0, flat, pieces.reshape(-1, width))
    counts = torch.bincount(flat, minlength=len(sums)).view(num_subspaces, num_codewords, 1)
    means = sums.view_as(codebook) / counts.clamp(min=1)
    own = codebook.flatten(0, 1).index_select(0, flat).view_as(pieces)
    farthest = (pieces - own).square().sum(-1).sort(dim=1, descending=True, stable=True).indices
    is_empty = counts == 0
    # The j-th empty codeword takes the j-th farthest piece; there are at least as many pieces.
    taken = farthest.gather(1, (is_empty[..., 0].cumsum(1) - 1).clamp(min=0))
    moved = pieces.gather(1, taken[..., None].expand(-1, -1, pieces.shape[2]))
    return torch.where(is_empty, moved, means)


class ScoreFactors(NamedTuple):
    """Queries and keys as whole numbers whose products are the scores of keys, some rows at a time.

    A one-hot code of the key meets a table of the query. "match": the table is the query's own
    one-hot code, the score the number of subspaces whose codes agree. "adc": the table holds
    ``q_s . codebook[s, e]``, the score is the product of the query with the decoded key, on a grid:
    the largest entry of a query's table is at most 2**23 / s, so that sums are exact in float32.

    Args:
        q: (b, h, n, d).
        codes_k: (b, hk, m, s) uint8.
        codebooks: (c, s, e, w); neighbouring heads share one.
        scorer: "adc" or "match".
    """

    q: Tensor
    codes_k: Tensor
    codebooks: Tensor
    scorer: Scorer

    def queries(self, batch: slice, rows: slice) -> Tensor:
        """Return the tables of some rows of queries, (b', h, r, s e) float32."""
        q = self.q[batch, :, rows]
        if self.scorer == "match":
            return _one_hot(_assign_heads(q, self.codebooks), self.codebooks.shape[2])
        num_books, num_subspaces, _, width = self.codebooks.shape
        words = self.codebooks.detach().float()
        pieces = q.float().unflatten(3, (num_subspaces, width)).unflatten(1, (num_books, -1))
        table = torch.zeros((), device=pieces.device)
        for i in range(width):
            # (b', c, h / c, r, s, e): the same bits wherever a query stands.
            table = table + pieces[..., i, None] * words[:, None, None, :, :, i]
        table = table.flatten(1, 2).flatten(-2)
        top = table.abs().amax(-1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny)
        return (table / top * (2**23 // num_subspaces)).round()

    def keys(self, batch: slice) -> Tensor:
        """Return the one-hot codes of the keys, (b', hk, m, s e) float32."""
        return _one_hot(self.codes_k[batch], self.codebooks.shape[2])


def quantise(q: Tensor, k: Tensor, codebooks: Tensor, scorer: Scorer) -> ScoreFactors:
    """Return the score factors of q (b, h, n, d) and k (b, hk, m, d) by codebooks (c, s, e, w)."""
    return ScoreFactors(q.detach(), _assign_heads(k, codebooks), codebooks, scorer)


def _assign_heads(z: Tensor, codebooks: Tensor) -> Tensor:
    """Return the codes (b, any, n, s) of z (b, any, n, d), each head by its own codebook."""
    groups = z.chunk(len(codebooks), 1)
    return torch.cat([assign(g, book) for g, book in zip(groups, codebooks, strict=True)], 1)


def _one_hot(codes: Tensor, num_codewords: int) -> Tensor:
    words = torch.arange(num_codewords, device=codes.device, dtype=torch.int16)
    return (codes[..., None] == words).flatten(-2).to(torch.float32)
