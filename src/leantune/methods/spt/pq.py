"""Product quantisation of queries and keys, and the exact choice of the best keys by their codes.

Legend: b batch, h heads, n queries, m keys, l kept keys per query, d width, s subspaces, w = d / s
width of a subspace, e codewords per subspace, r queries in one chunk.

A vector is cut into s pieces and each piece named by its nearest codeword. Two vectors whose names
agree in many subspaces are near each other ("match"); or the query is kept and only the key named
("adc"). Codes choose keys and nothing else: attention reads the true vectors.

Source for the whole file: SPT, arXiv 2312.10365, and its prototype, where that is more definite.
"""

from collections.abc import Callable
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from leantune.errors import ConfigError
from leantune.ops.rows import uniform
from leantune.ops.sparse import add_rows_

Metric = Literal["l1", "l2"]
TieRule = Literal["nearest", "lowest"]
ScoreRows = Callable[[slice], Tensor]

# Numbers per transient tensor of a chunk: 4 MiB of them in float32.
_CHUNK_NUMBERS = 2**20
_INT32 = torch.iinfo(torch.int32)


class Choice(NamedTuple):
    """The keys of each query.

    Attributes:
        indices: (b, h, n, l) int32, ascending in [0, m), then -1 in slots without a key.
        is_valid: like indices, bool; a row has min(l, visible keys) of them.
    """

    indices: Tensor
    is_valid: Tensor


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


def _lloyd_step(vectors: Tensor, pieces: Tensor, codebook: Tensor) -> Tensor:
    num_subspaces, num_codewords, width = codebook.shape
    codes = assign(vectors, codebook, "l2").long().t()  # (s, n)
    first = torch.arange(num_subspaces, device=codes.device)[:, None] * num_codewords
    flat = (codes + first).reshape(-1)
    sums = codebook.new_zeros(num_subspaces * num_codewords, width)
    add_rows_(sums, flat, pieces.reshape(-1, width))
    counts = torch.bincount(flat, minlength=len(sums)).view(num_subspaces, num_codewords, 1)
    means = sums.view_as(codebook) / counts.clamp(min=1)
    own = codebook.flatten(0, 1).index_select(0, flat).view_as(pieces)
    farthest = (pieces - own).square().sum(-1).sort(dim=1, descending=True, stable=True).indices
    is_empty = counts[..., 0] == 0
    # The j-th empty codeword takes the j-th farthest piece; there are at least as many pieces.
    taken = farthest.gather(1, (is_empty.cumsum(1) - 1).clamp(min=0))
    moved = pieces.gather(1, taken[..., None].expand(-1, -1, width))
    return torch.where(is_empty[..., None], moved, means)


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


def match_scores(codes_q: Tensor, codes_k: Tensor) -> Tensor:
    """Return in how many subspaces the codes agree: the paper's score.

    Args:
        codes_q: (b, h, r, s) uint8, a chunk of the queries.
        codes_k: (b, hk, m, s) uint8, hk a divisor of h.

    Returns:
        (b, h, r, m) uint8, in [0, s].
    """
    codes_k = _per_query_head(codes_k, codes_q.shape[1]).movedim(-1, 0).contiguous()
    scores = codes_q.new_zeros(*codes_q.shape[:3], codes_k.shape[-1])
    for own, others in zip(codes_q.unbind(-1), codes_k, strict=True):
        scores += (own[..., None] == others[..., None, :]).view(torch.uint8)
    return scores


def adc_scores(q: Tensor, codebook: Tensor, codes_k: Tensor) -> Tensor:
    """Return the product of each query with the decoded keys, by look-up; equal codes tie exactly.

    ``sum_s q_s . codebook[s, code_s(k)]``. A matrix product with decoded keys would be faster, but
    its rounding depends on where a key stands, and would decide between keys of equal codes.

    Args:
        q: (b, h, r, d), a chunk of the queries.
        codebook: (s, e, w) with s w = d.
        codes_k: (b, hk, m, s) uint8, hk a divisor of h.

    Returns:
        (b, h, r, m) float32.
    """
    pieces = q.detach().float().unflatten(-1, codebook.shape[::2])
    words = codebook.detach().float()
    table = torch.zeros((), device=q.device)
    for i in range(words.shape[2]):
        table = table + pieces[..., i, None] * words[..., i]  # (b, h, r, s, e)
    codes_k = _per_query_head(codes_k, q.shape[1]).long()
    shape = (*q.shape[:3], codes_k.shape[2])
    scores = torch.zeros(shape, device=q.device)
    for i in range(codes_k.shape[-1]):
        scores += table[..., i, :].gather(-1, codes_k[..., None, :, i].expand(shape))
    return scores


def _per_query_head(codes_k: Tensor, num_heads: int) -> Tensor:
    return codes_k.repeat_interleave(num_heads // codes_k.shape[1], dim=1)


def select_keys(
    score_rows: ScoreRows,
    shape: tuple[int, int, int, int],
    num_keys: int,
    *,
    is_causal: bool,
    mask: Tensor | None = None,
    segments: Tensor | None = None,
    first_position: int | None = None,
    num_recent: int = 1,
    num_sinks: int = 0,
    ties: TieRule = "nearest",
    device: torch.device | str,
) -> Choice:
    """Choose the best visible keys of each query, exactly and always the same ones.

    Query i stands at position ``first_position + i``. A key is visible if mask and segments allow
    it and, with is_causal, if it does not stand behind the query. Sinks (the first visible keys)
    and recent keys (the nearest visible ones up to the query's own position, itself included, and
    as many behind it less one) come first; then the highest score. Equal scores go by ``ties``.
    Invisible keys have no influence: padding on either side changes no choice but its numbering.
    Queries go chunk by chunk: scores of a chunk are about 2**20 numbers, or one query's.

    Args:
        score_rows: returns the (b, h, r, m) scores, uint8 to int32 or floating, of a slice of the
            queries, such as ``lambda rows: match_scores(codes_q[:, :, rows], codes_k)``.
        shape: (b, h, n, m).
        num_keys: keys kept per query, l = min(num_keys, m).
        is_causal: whether keys behind the query are hidden.
        mask: bool, True where visible; broadcasts to (b, h, n, m) and is never expanded.
        segments: (b, m) integers, packed documents; a query sees its own. Positions of the queries
            must lie in [0, m).
        first_position: position of the first query; None: m - n, the queries are the last.
        num_recent: w, recent keys that are always kept; 1 is the query's own; 0 where queries and
            keys are not one sequence.
        num_sinks: first visible keys that are always kept.
        ties: "nearest" position to the query (before the query first), which with is_causal is the
            most recent; "lowest" position, the prototype's.
        device: of the scores.

    Raises:
        ConfigError: num_keys below 1 or below the keys that are always kept.

    Source: arXiv 2312.10365 keeps the largest; the prototype's four coarse buckets per lane are
    not reproduced. What is always kept is an addition.
    """
    b, h, n, m = shape
    kept_always = num_sinks + max(0, num_recent if is_causal else 2 * num_recent - 1)
    if num_keys < max(1, kept_always):
        raise ConfigError(
            f"select_keys: num_keys must be >= {max(1, kept_always)}, the sinks and recent keys, "
            f"got {num_keys}; raise it or keep fewer of those"
        )
    first = m - n if first_position is None else first_position
    position = torch.arange(m, device=device)
    indices = torch.empty(b, h, n, min(num_keys, m), dtype=torch.int32, device=device)
    step = max(1, _CHUNK_NUMBERS // max(1, b * h * m))
    for start in range(0, n, step):
        rows = slice(start, min(start + step, n))
        own = torch.arange(first + start, first + rows.stop, device=device)[:, None]  # (r, 1)
        visible = _visible(own, position, rows, is_causal, mask, segments)
        always = _always_kept(visible, own, position, num_recent, num_sinks)
        rank = _ordered(score_rows(rows)).masked_fill_(always, _INT32.max)
        rank = rank.masked_fill_(~visible, _INT32.min).long() << 32
        if ties == "nearest":
            # Twice the distance, and one more behind the query: all different within a row.
            rank |= 2**31 - 2 * (own - position).abs() - (position > own).long()
        else:
            rank |= m - 1 - position
        best = rank.topk(indices.shape[-1], sorted=False)
        # Unfilled slots sort to the end, then become -1.
        chosen = best.indices.masked_fill_(best.values >> 32 == _INT32.min, m).sort(-1).values
        indices[:, :, rows] = chosen.masked_fill_(chosen == m, -1).to(torch.int32)
    return Choice(indices, indices >= 0)


def _visible(
    own: Tensor,
    position: Tensor,
    rows: slice,
    is_causal: bool,
    mask: Tensor | None,
    segments: Tensor | None,
) -> Tensor:
    """Return bool, (b or 1, h or 1, r, m)."""
    visible = (position <= own) if is_causal else (position == position).expand(len(own), -1)
    visible = visible[None, None]
    if mask is not None:
        visible = visible & (mask if mask.shape[-2] == 1 else mask[..., rows, :])
    if segments is not None:
        same = segments[:, own[:, 0], None] == segments[:, None, :]  # (b, r, m)
        visible = visible & same[:, None]
    return visible


def _always_kept(
    visible: Tensor, own: Tensor, position: Tensor, num_recent: int, num_sinks: int
) -> Tensor:
    """Count visible keys only, so that padding takes nobody's place."""
    count = visible.cumsum(-1, dtype=torch.int32)
    own_count = (visible & (position <= own)).sum(-1, keepdim=True)
    return (visible & (count <= num_sinks)) | (visible & ((count - own_count).abs() < num_recent))


def _ordered(scores: Tensor) -> Tensor:
    """Map scores to int32 of the same order, a new tensor; -0.0 becomes 0.0."""
    if not scores.is_floating_point():
        return scores.to(torch.int32, copy=True)
    bits = (scores.float() + 0.0).view(torch.int32)
    return bits ^ ((bits >> 31) & _INT32.max)
