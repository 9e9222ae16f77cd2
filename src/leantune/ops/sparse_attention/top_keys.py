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
        always_keep: so many of the first visible keys, and of those up to the query's own, come
            before all others.
    """

    keep_ratio: float
    min_keys: int = 1
    always_keep: int = 0

    @property
    def floor(self) -> int:
        """How many keys are kept at least: what is always kept counts in the budget."""
        return max(self.min_keys, 2 * self.always_keep)

    def num_kept(self, num_visible: Tensor) -> Tensor:
        """Return how many of so many visible keys are kept, int64 of the same shape."""
        # In float64, less what a ratio such as 0.1 is above its decimal.
        share = (num_visible.double() * self.keep_ratio - 1e-9).ceil().long()
        return share.clamp(min=self.floor)

    def limit(self, num_keys: int) -> int:
        """Return the most that a query of ``num_keys`` keys can keep."""
        share = math.ceil(num_keys * self.keep_ratio - 1e-9)
        return min(num_keys, max(share, self.floor))


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

    The query's own key comes first, and what ``budget.always_keep`` names; then the highest score.
    Equal scores go to the nearest key: in a decoder the most recent, in an encoder the nearest on
    either side (before the query first), in cross attention, where a query has no position, the
    last. Invisible keys have no influence: padding on either side changes no choice but its
    numbering, and neither do later tokens.

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
                rank, num_visible = _rank(
                    scores, visible, own[:, None], visibility.kind, budget.always_keep
                )
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
    scores: Tensor, visible: Tensor, own: Tensor, kind: AttentionKind, always_keep: int
) -> tuple[Tensor, Tensor]:
    """Return the rank of each key, int64, and how many are visible, (b' or 1, h or 1, r, 1).

    Ranks are all different, and negative where a key is invisible.
    """
    position = torch.arange(scores.shape[-1], device=scores.device)
    count = visible.cumsum(-1, dtype=torch.int32)
    num_visible = count[..., -1:]
    rank = scores.long()
    num_recent = max(1, always_keep)
    if kind == "causal":
        rank.masked_fill_(count > num_visible - num_recent, _ALWAYS)
    elif kind == "self":
        own_count = (visible & (position <= own)).sum(-1, keepdim=True)
        rank.masked_fill_((count > own_count - num_recent) & (count <= own_count), _ALWAYS)
    if always_keep:
        rank.masked_fill_(count <= always_keep, _ALWAYS)
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
