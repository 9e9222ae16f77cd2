"""Product quantisation: codebooks by k-means in every subspace, and the codes of vectors.

Legend: d width, s subspaces, w = d / s width of a subspace, e codewords per subspace, r rows of one
part.

A vector is cut into s pieces and each piece named by its nearest codeword.
"""

from typing import Literal

import torch
from torch import Tensor

from leantune.errors import ConfigError
from leantune.ops.rows import uniform
from leantune.ops.sparse_parts import add_rows_

Metric = Literal["l1", "l2"]

# Numbers per transient tensor of a chunk: 4 MiB of them in float32.
_CHUNK_NUMBERS = 2**20


def assign(z: Tensor, codebook: Tensor, metric: Metric = "l1") -> Tensor:
    """Return the nearest codeword of every piece; among equally near ones the lowest number.

    Args:
        z: (..., d), any floating dtype.
        codebook: (s, e, w) with s w = d and e <= 256.
        metric: "l1" is the prototype's.

    Returns:
        (..., s) uint8.

    Raises:
        ConfigError: d is not s w, or e is above 256.
    """
    num_subspaces, num_codewords, width = codebook.shape
    if z.shape[-1] != num_subspaces * width:
        raise ConfigError(
            f"assign: width of the vectors must be {num_subspaces} * {width} as in the codebook, "
            f"got {z.shape[-1]}"
        )
    if num_codewords > 256:
        raise ConfigError(f"assign: codewords must be <= 256 to fit a byte, got {num_codewords}")
    rows = z.detach().reshape(-1, z.shape[-1])
    codes = torch.empty(len(rows), num_subspaces, dtype=torch.uint8, device=z.device)
    step = max(1, _CHUNK_NUMBERS // (num_subspaces * num_codewords))
    for start in range(0, len(rows), step):
        part = slice(start, start + step)
        codes[part] = _distances(rows[part], codebook, metric).argmin(-1).to(torch.uint8)
    return codes.view(*z.shape[:-1], num_subspaces)


def _distances(z: Tensor, codebook: Tensor, metric: Metric) -> Tensor:
    """Return (r, s, e), the l2 ones squared; equal pieces get equal bits wherever they stand."""
    dtype = torch.float64 if z.dtype == torch.float64 else torch.float32
    pieces = z.to(dtype).unflatten(-1, codebook.shape[::2])  # (r, s, w)
    words = codebook.detach().to(dtype)
    total = torch.zeros((), dtype=dtype, device=z.device)
    # One coordinate at a time: no (r, s, e, w) tensor, and none of the cancellation of a product.
    for i in range(words.shape[2]):
        gap = pieces[..., i, None] - words[..., i]
        total = total + (gap.abs() if metric == "l1" else gap.square())
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
    """Return codebooks by Lloyd's steps in every subspace, the same for the same arguments.

    The start are pieces drawn by counted numbers, each with a probability proportional to the
    squared distance from those before it. A codeword that nothing is nearest to moves to the piece
    that is farthest from its own, the second such one to the second farthest and so on.

    Args:
        vectors: (n, d), any floating dtype, n >= num_codewords.
        num_subspaces: s, a divisor of d.
        num_codewords: e, in [1, 256].
        num_steps: Lloyd's steps, >= 0.
        seed: of the choice of the start.
        stream: tells sites apart.

    Returns:
        (s, e, w) float32 (float64 for float64 vectors).

    Raises:
        ConfigError: too few vectors, or subspaces that do not divide the width.

    Source: Arthur and Vassilvitskii, "k-means++", 2007, for the start; the prototype has neither
    and starts from normal noise.
    """
    n, d = vectors.shape
    if n < num_codewords:
        raise ConfigError(
            f"kmeans: vectors must be >= num_codewords = {num_codewords}, got {n}; calibrate with "
            "more tokens or lower num_codewords"
        )
    if num_subspaces < 1 or d % num_subspaces:
        raise ConfigError(f"kmeans: num_subspaces must divide the width {d}, got {num_subspaces}")
    dtype = torch.float64 if vectors.dtype == torch.float64 else torch.float32
    vectors = vectors.detach().to(dtype)
    zero = torch.zeros((), dtype=torch.int64, device=vectors.device)
    u = uniform(seed, stream, zero, num_codewords * num_subspaces, device=vectors.device)
    pieces = vectors.unflatten(1, (num_subspaces, -1)).transpose(0, 1)  # (s, n, w)
    codebook = _spread(pieces, u.view(num_codewords, num_subspaces, 1))
    for _ in range(num_steps):
        codebook = _lloyd_step(vectors, pieces, codebook)
    return codebook.contiguous()


def _spread(pieces: Tensor, u: Tensor) -> Tensor:
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


def moving_step(vectors: Tensor, codebook: Tensor, decay: float) -> Tensor:
    """Return the codebook moved towards the means of what is nearest to its codewords now.

    ``decay * codeword + (1 - decay) * mean``; a codeword that nothing is nearest to stays.

    Args:
        vectors: (n, d).
        codebook: (s, e, w) with s w = d.
        decay: weight of the past, in [0, 1).
    """
    vectors = vectors.detach().to(codebook.dtype)
    pieces = vectors.unflatten(1, codebook.shape[::2]).transpose(0, 1)  # (s, n, w)
    _, means, counts = _means(vectors, pieces, codebook)
    moved = torch.lerp(means, codebook, decay)
    return torch.where(counts > 0, moved, codebook)


def _means(vectors: Tensor, pieces: Tensor, codebook: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the codeword of each piece (s n,), and the mean (s, e, w) and number (s, e, 1) of
    pieces of each codeword."""
    num_subspaces, num_codewords, width = codebook.shape
    codes = assign(vectors, codebook, "l2").long().t()  # (s, n)
    first = torch.arange(num_subspaces, device=codes.device)[:, None] * num_codewords
    flat = (codes + first).reshape(-1)
    sums = codebook.new_zeros(num_subspaces * num_codewords, width)
    add_rows_(sums, flat, pieces.reshape(-1, width))
    counts = torch.bincount(flat, minlength=len(sums)).view(num_subspaces, num_codewords, 1)
    return flat, sums.view_as(codebook) / counts.clamp(min=1), counts


def _lloyd_step(vectors: Tensor, pieces: Tensor, codebook: Tensor) -> Tensor:
    flat, means, counts = _means(vectors, pieces, codebook)
    own = codebook.flatten(0, 1).index_select(0, flat).view_as(pieces)
    farthest = (pieces - own).square().sum(-1).sort(dim=1, descending=True, stable=True).indices
    is_empty = counts[..., 0] == 0
    # The j-th empty codeword takes the j-th farthest piece; there are at least as many pieces.
    taken = farthest.gather(1, (is_empty.cumsum(1) - 1).clamp(min=0))
    moved = pieces.gather(1, taken[..., None].expand(-1, -1, pieces.shape[2]))
    return torch.where(is_empty[..., None], moved, means)
