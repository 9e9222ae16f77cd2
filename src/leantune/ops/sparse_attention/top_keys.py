"""The exact choice of each query's best keys by whole-number scores, some rows at a time.

Legend: b batch, h query heads, hk key heads, n queries, m keys, f score factors, r rows of queries
in one part.

The score of a query and a key is a product of their factors, whole numbers so small that every
order of summation gives the same bits: padding, chunks and caches cannot turn a choice.
"""

import math
from typing import Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from leantune.ops.autocast import autocast_off
from leantune.ops.sparse_attention.codebooks import ScoreFactors
from leantune.ops.sparse_attention.tiles import pack_bits, slices, tile_numbers

AttentionKind = Literal["causal", "self", "cross"]

# Scores are below 2**24; the query's own key ranks above them.
_ALWAYS = 2**25


class KeyBudget(NamedTuple):
    """How many keys a query keeps: a share of what the query sees, rounded up, and a floor.

    A query's own budget depends on its visible keys alone, so later tokens cannot change it.

    Attributes:
        keep_ratio: share of the visible keys, in (0, 1].
        min_keys: keys kept at least, where so many are visible.
    """

    keep_ratio: float
    min_keys: int = 1

    def num_kept(self, num_visible: Tensor) -> Tensor:
        """Return how many of so many visible keys are kept, int64 of the same shape."""
        # In float64, less what a ratio such as 0.1 is above its decimal.
        share = (num_visible.double() * self.keep_ratio - 1e-9).ceil().long()
        return share.clamp(min=self.min_keys)

    def limit(self, num_keys: int) -> int:
        """Return the most that a query of ``num_keys`` keys can keep."""
        share = math.ceil(num_keys * self.keep_ratio - 1e-9)
        return min(num_keys, max(share, self.min_keys))


class Visibility(NamedTuple):
    """Which keys a query may see.

    Attributes:
        kind: "causal": a query's own key is the last that it sees; "self": bidirectional over one
            sequence, query i stands at key m - n + i; "cross": keys of another sequence.
        mask: bool, True where visible, (b or 1, h or 1, n or 1, m); None for everything, or, where
            causal and n = m > 1, for keys up to the query's own.
    """

    kind: AttentionKind
    mask: Tensor | None

    def rows(self, like: Tensor, batch: slice, rows: slice, stop: int) -> Tensor:
        """Return what some queries of ``like`` (b, h, n, any) see of the first ``stop`` keys.

        The result is (b' or 1, h or 1, r, stop).
        """
        num_rows, device = rows.stop - rows.start, like.device
        if self.mask is not None:
            mask = self.mask[batch if self.mask.shape[0] > 1 else slice(None)]
            mask = (mask if mask.shape[2] == 1 else mask[:, :, rows])[..., :stop]
            return mask.expand(-1, -1, num_rows, -1)
        if self.hides_later(like.shape[2]):
            own = torch.arange(rows.start, rows.stop, device=device)[:, None]
            return (torch.arange(stop, device=device) <= own)[None, None]
        return torch.ones(1, 1, num_rows, stop, dtype=torch.bool, device=device)

    def hides_later(self, n: int) -> bool:
        """Return whether keys behind a query are hidden without a mask that says so."""
        return self.kind == "causal" and self.mask is None and n > 1


@torch.no_grad()
def top_keys(
    factors: ScoreFactors, q: Tensor, num_keys: int, budget: KeyBudget, visibility: Visibility
) -> Tensor:
    """Choose the best visible keys of each query, exactly and always the same ones.

    The query's own key comes first, then the highest score. Equal scores go to the nearest key: in
    a decoder the most recent, in an encoder the nearest on either side (before the query first), in
    cross attention, where a query has no position, the last. Invisible keys have no influence:
    padding on either side changes no choice but its numbering, and neither do later tokens.

    Args:
        factors: of the scores.
        q: (b, h, n, d); its shape and device alone.
        num_keys: m.
        budget: of each query.
        visibility: of the keys.

    Returns:
        (b, h, n, ceil(m / 8)) uint8, one bit for each key; see
        :mod:`leantune.ops.sparse_attention.tiles`.

    Source: arXiv 2312.10365 keeps the largest; the prototype's four coarse buckets per lane are
    not reproduced. That the query's own key is always kept is an addition.
    """
    b, h, n, _ = q.shape
    limit = budget.limit(num_keys)
    out = torch.zeros(b, h, n, -(-num_keys // 8), dtype=torch.uint8, device=q.device)
    with autocast_off(q):
        for batch in slices(b, tile_numbers(q) // (h * n * num_keys)):
            keys = factors.keys(batch)
            for rows in slices(n, tile_numbers(q) // (h * num_keys)):
                stop = rows.stop if visibility.hides_later(n) else num_keys
                scores = _scores(factors.queries(batch, rows), keys[:, :, :stop])
                visible = visibility.rows(q, batch, rows, stop)
                own = torch.arange(rows.start, rows.stop, device=q.device) + num_keys - n
                rank, num_visible = _rank(scores, visible, own[:, None], visibility.kind)
                best = rank.topk(min(limit, stop)).values
                last = (budget.num_kept(num_visible) - 1).clamp(max=best.shape[-1] - 1)
                least = best.gather(-1, last.expand(*rank.shape[:-1], 1))
                packed = pack_bits((rank >= least) & visible)
                out[batch, :, rows, : packed.shape[-1]] = packed
    return out


def _scores(queries: Tensor, keys: Tensor) -> Tensor:
    """Return the products of factors (b', h, r, f) and (b', hk, m, f): (b', h, r, m), whole."""
    h, hk = queries.shape[1], keys.shape[1]
    grouped = queries.unflatten(1, (hk, h // hk)).flatten(2, 3)
    return (grouped @ keys.mT).view(*queries.shape[:3], -1)


def _rank(
    scores: Tensor, visible: Tensor, own: Tensor, kind: AttentionKind
) -> tuple[Tensor, Tensor]:
    """Return the rank of each key, int64, and how many are visible, (b' or 1, h or 1, r, 1).

    Ranks are all different, and negative where a key is invisible.
    """
    position = torch.arange(scores.shape[-1], device=scores.device)
    count = visible.cumsum(-1, dtype=torch.int32)
    num_visible = count[..., -1:]
    rank = scores.long()
    if kind == "causal":
        rank.masked_fill_(count == num_visible, _ALWAYS)
    elif kind == "self":
        own_count = (visible & (position <= own)).sum(-1, keepdim=True)
        rank.masked_fill_(count == own_count, _ALWAYS)
    rank.add_(_ALWAYS)
    rank <<= 32
    rank |= _order(position, own, kind)
    return rank.masked_fill_(~visible, -1), num_visible


def _order(position: Tensor, own: Tensor, kind: AttentionKind) -> Tensor:
    """Return numbers that grow towards the key that wins a tie, below 2**32, all different."""
    if kind == "self":
        # Twice the distance, and one more behind the query.
        return 2**31 - 2 * (own - position).abs() - (position > own).long()
    return position


@torch.no_grad()
def top_blocks(
    factors: ScoreFactors,
    q: Tensor,
    num_keys: int,
    budget: KeyBudget,
    visibility: Visibility,
    block_size: int,
) -> Tensor:
    """Choose blocks of keys for blocks of queries: the pairs of tokens vote by their scores.

    In a bidirectional sequence all queries of a block vote. Elsewhere those would tell the first
    query about later ones, so a block's first query votes, and the ``block_size - 1`` before it.
    Where the queries are the last of more keys (a cache), each is a block of its own. The block of
    the query itself is always kept. As many blocks are kept as hold the keys that a query would
    keep.

    Args: as for :func:`top_keys`; ``block_size`` in tokens.

    Returns:
        (b, h, query blocks, key blocks) bool.
    """
    b, h, n, _ = q.shape
    kind = visibility.kind
    size = query_block(visibility, n, num_keys, block_size)
    num_rows, num_blocks = -(-n // size), -(-num_keys // block_size)
    visible = _visible_blocks(visibility, q, num_keys, size, block_size)
    first = torch.arange(num_rows, device=q.device)[:, None] * size
    block = torch.arange(num_blocks, device=q.device)
    always = torch.zeros_like(visible)
    if kind != "cross":
        first = first + num_keys - n
        last = (first + size - 1).clamp(max=num_keys - 1)
        always = visible & (block >= first // block_size) & (block <= last // block_size)
    kept = budget.num_kept(visible.sum(-1, keepdim=True) * block_size)
    kept = torch.maximum((kept + block_size - 1) // block_size, always.sum(-1, keepdim=True))
    preferred = _order(block, first // block_size, kind).expand(num_rows, -1)
    preferred = preferred.argsort(-1, descending=True)
    out = torch.empty(b, h, num_rows, num_blocks, dtype=torch.bool, device=q.device)
    with autocast_off(q):
        for part in slices(b, 1):
            scores = _votes(factors, q, num_keys, visibility, size, block_size, part)
            here = part if visible.shape[0] > 1 else slice(None)
            scores = scores.masked_fill_(always[here], torch.inf)
            scores = scores.masked_fill_(~visible[here], -torch.inf)
            by = preferred.expand_as(scores)
            best = scores.gather(-1, by).argsort(dim=-1, descending=True, stable=True)
            is_kept = (block < kept[here]).expand_as(scores)
            out[part] = torch.zeros_like(out[part]).scatter_(-1, by.gather(-1, best), is_kept)
    return out & visible


def query_block(visibility: Visibility, n: int, num_keys: int, block_size: int) -> int:
    """Return how many neighbouring queries share a choice of blocks."""
    return 1 if visibility.kind != "cross" and n != num_keys else block_size


def _visible_blocks(
    visibility: Visibility, q: Tensor, num_keys: int, size: int, block_size: int
) -> Tensor:
    """Return (b or 1, h or 1, query blocks, key blocks): whether any pair of tokens is visible."""
    n = q.shape[2]
    num_rows, num_blocks = -(-n // size), -(-num_keys // block_size)
    mask = visibility.mask
    if mask is None:
        all_blocks = torch.ones(1, 1, num_rows, num_blocks, dtype=torch.bool, device=q.device)
        return all_blocks.tril() if visibility.hides_later(n) else all_blocks
    height = size if mask.shape[2] > 1 else 1
    mask = F.pad(mask, (0, -mask.shape[3] % block_size, 0, -mask.shape[2] % height))
    mask = mask.unflatten(3, (-1, block_size)).unflatten(2, (-1, height))
    return mask.any(-1).any(3).expand(-1, -1, num_rows, -1)


def _votes(
    factors: ScoreFactors,
    q: Tensor,
    num_keys: int,
    visibility: Visibility,
    size: int,
    block_size: int,
    part: slice,
) -> Tensor:
    """Return the sum of the scores of all voting pairs, (1, h, query blocks, key blocks).

    They are whole numbers in float64, so that the order of summation does not matter.
    """
    n = q.shape[2]
    keys = factors.keys(part).double()
    mask, is_real = visibility.mask, None
    if mask is not None:
        is_real = mask[part if mask.shape[0] > 1 else slice(None)].any(1).any(1)
        keys = keys * is_real[:, None, :, None]
    keys = F.pad(keys, (0, 0, 0, -num_keys % block_size))
    keys = keys.unflatten(2, (-1, block_size)).sum(3)
    num_rows = -(-n // size)
    votes = keys.new_zeros(1, q.shape[1], num_rows + 1, keys.shape[-1])
    for rows in slices(n, tile_numbers(q) // (q.shape[1] * keys.shape[-1])):
        voters = factors.queries(part, rows).double()
        if is_real is not None and visibility.kind == "self" and n == num_keys:
            voters = voters * is_real[:, None, rows, None]
        row = torch.arange(rows.start, rows.stop, device=q.device)
        if visibility.kind != "self":
            row = row + size - 1
        votes.index_add_(2, row // size, voters)
    return _scores(votes[:, :, :num_rows], keys)


@torch.no_grad()
def expand_blocks(
    blocks: Tensor, q: Tensor, num_keys: int, visibility: Visibility, block_size: int
) -> Tensor:
    """Return the visible pairs of chosen blocks in bits, (b, h, n, ceil(m / 8)) uint8."""
    b, h, n, _ = q.shape
    size = query_block(visibility, n, num_keys, block_size)
    out = torch.zeros(b, h, n, -(-num_keys // 8), dtype=torch.uint8, device=q.device)
    for batch in slices(b, tile_numbers(q) // (h * n * num_keys)):
        for rows in slices(n, tile_numbers(q) // (h * num_keys)):
            stop = rows.stop if visibility.hides_later(n) else num_keys
            row = torch.arange(rows.start, rows.stop, device=q.device) // size
            column = torch.arange(stop, device=q.device) // block_size
            keep = blocks[batch][:, :, row][..., column]
            packed = pack_bits(keep & visibility.rows(q, batch, rows, stop))
            out[batch, :, rows, : packed.shape[-1]] = packed
    return out
