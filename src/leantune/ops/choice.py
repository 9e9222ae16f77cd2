"""The exact choice of each query's best keys by integer scores, a few rows at a time.

Legend: b batch, h query heads, hk key heads, n queries, m keys, l kept keys, f features, r rows of
queries in one part, c key blocks.

The score of a query and a key is a product of their features, whole numbers small enough that
every order of summation gives the same bits: padding, chunks and caches cannot turn a choice.
"""

from typing import Literal, NamedTuple, Protocol

import torch
from torch import Tensor

from leantune.ops.autocast import autocast_off
from leantune.ops.sparse_parts import pack_bits

TieRule = Literal["nearest", "lowest"]
Place = Literal["causal", "self", "cross"]

# Scores in a transient tensor of one part; a GPU wants larger products.
_PART_NUMBERS = 2**19
_PART_NUMBERS_GPU = 2**24
# Scores are below 2**24; what is always kept ranks above them.
_ALWAYS = 2**25


class Rule(NamedTuple):
    """How many keys a query keeps, which always, and who wins a tie.

    Attributes:
        num_keys: kept per query; or None, for
        keep_ratio: the share of the keys that a query sees, rounded up, at least
        min_keys.
        num_recent: the nearest visible keys up to the query's own position, itself included (and
            as many behind it less one, where those are visible), which are always kept.
        num_sinks: first visible keys that are always kept.
        ties: "nearest" to the query's position, before it first; "lowest" position.
    """

    num_keys: int | None
    keep_ratio: float
    min_keys: int
    num_recent: int = 1
    num_sinks: int = 0
    ties: TieRule = "nearest"

    def num_kept(self, num_visible: Tensor) -> Tensor:
        """Return how many of so many visible keys are kept, int64 of the same shape."""
        if self.num_keys is not None:
            return torch.full_like(num_visible, self.num_keys, dtype=torch.int64)
        # In float64, less what a ratio such as 0.1 is above its decimal.
        share = (num_visible.double() * self.keep_ratio - 1e-9).ceil().long()
        return share.clamp(min=self.min_keys)

    def limit(self, num_keys: int) -> int:
        """Return the most that a query of ``num_keys`` keys can keep."""
        return min(num_keys, int(self.num_kept(torch.tensor(num_keys))))


class View(NamedTuple):
    """What queries see.

    Attributes:
        place: "causal": a query's own key is the last that it sees; "self": bidirectional over one
            sequence, query i stands at key m - n + i; "cross": keys of another sequence.
        mask: bool, True where visible, (b or 1, h or 1, n or 1, m); None for everything, or, where
            causal and n = m > 1, for keys up to the query's own.
    """

    place: Place
    mask: Tensor | None

    def rows(self, like: Tensor, batch: slice, rows: slice, stop: int) -> Tensor:
        """Return what some of the queries of ``like`` (b, h, n, .) see of the first ``stop`` keys:
        (b' or 1, h or 1, r, stop)."""
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
        """Whether keys behind the query are hidden without a mask that says so."""
        return self.place == "causal" and self.mask is None and n > 1


class Features(Protocol):
    """Whole numbers whose products are the scores."""

    def queries(self, batch: slice, rows: slice) -> Tensor:
        """Return (b', h, r, f) float32."""
        ...

    def keys(self, batch: slice) -> Tensor:
        """Return (b', hk, m, f) float32."""
        ...


@torch.no_grad()
def choose(
    features: Features,
    q: Tensor,
    num_keys: int,
    rule: Rule,
    view: View,
    *,
    in_bits: bool = False,
) -> Tensor:
    """Choose the best visible keys of each query, exactly and always the same ones.

    What is always kept comes first, then the highest score; equal scores go by ``rule.ties``,
    where queries have no position ("cross") to the last key. Invisible keys have no influence:
    padding on either side changes no choice but its numbering, and since a query's own visible
    keys set how many it keeps, neither do later tokens.

    Args:
        features: of the scores.
        q: (b, h, n, d); its shape and device alone.
        num_keys: m.
        in_bits: whether the answer must be in bits.

    Returns:
        The choice in bits or in indices, whichever is smaller; see :mod:`leantune.ops.sparse`.

    Source: arXiv 2312.10365 keeps the largest; the prototype's four coarse buckets per lane are
    not reproduced. What is always kept is an addition.
    """
    b, h, n, _ = q.shape
    limit = rule.limit(num_keys)
    kind = torch.int16 if num_keys < 2**15 else torch.int32
    is_bits = in_bits or num_keys <= 8 * limit * kind.itemsize
    if is_bits:
        out = torch.zeros(b, h, n, -(-num_keys // 8), dtype=torch.uint8, device=q.device)
    else:
        out = torch.full((b, h, n, limit), -1, dtype=kind, device=q.device)
    with autocast_off(q):
        for batch in _slices(b, _numbers(q) // (h * n * num_keys)):
            keys = features.keys(batch)
            for rows in _slices(n, _numbers(q) // (h * num_keys)):
                stop = rows.stop if view.hides_later(n) else num_keys
                scores = _scores(features.queries(batch, rows), keys[:, :, :stop])
                visible = view.rows(q, batch, rows, stop)
                own = torch.arange(rows.start, rows.stop, device=q.device) + num_keys - n
                rank, total = _rank(scores, visible, own[:, None], rule, view.place)
                kept = rule.num_kept(total)
                best = rank.topk(min(limit, stop))
                if is_bits:
                    last = (kept - 1).clamp(max=best.values.shape[-1] - 1)
                    least = best.values.gather(-1, last.expand(*rank.shape[:-1], 1))
                    packed = pack_bits((rank >= least) & visible)
                    out[batch, :, rows, : packed.shape[-1]] = packed
                else:
                    slot = torch.arange(best.values.shape[-1], device=q.device)
                    is_empty = (slot >= kept) | (best.values < 0)
                    index = best.indices.masked_fill(is_empty, num_keys).sort(-1).values
                    index = index.masked_fill_(index == num_keys, -1)
                    out[batch, :, rows, : index.shape[-1]] = index.to(kind)
    return out


def _numbers(x: Tensor) -> int:
    return _PART_NUMBERS_GPU if x.is_cuda else _PART_NUMBERS


def _slices(num: int, step: int) -> list[slice]:
    step = max(1, step)
    return [slice(start, min(start + step, num)) for start in range(0, num, step)]


def _scores(q_features: Tensor, k_features: Tensor) -> Tensor:
    """Return (b', h, r, stop), whole numbers below 2**24."""
    b, h, r, _ = q_features.shape
    hk = k_features.shape[1]
    grouped = q_features.unflatten(1, (hk, h // hk)).flatten(2, 3)
    return (grouped @ k_features.mT).view(b, h, r, -1)


def _rank(
    scores: Tensor, visible: Tensor, own: Tensor, rule: Rule, place: Place
) -> tuple[Tensor, Tensor]:
    """Return the rank of each key, all different and negative where invisible, int64; and how
    many are visible, (b' or 1, h or 1, r, 1)."""
    stop = scores.shape[-1]
    position = torch.arange(stop, device=scores.device)
    count = visible.cumsum(-1, dtype=torch.int32)
    total = count[..., -1:]
    always = count <= rule.num_sinks
    if place == "causal":
        always = always | (total - count < rule.num_recent)
    elif place == "self":
        own_count = (visible & (position <= own)).sum(-1, keepdim=True)
        always = always | ((count - own_count).abs() < rule.num_recent)
    rank = scores.long().masked_fill_(always, _ALWAYS).add_(_ALWAYS)
    rank <<= 32
    rank |= _order(position, own, rule.ties, place)
    return rank.masked_fill_(~visible, -1), total


def _order(position: Tensor, own: Tensor, ties: TieRule, place: Place) -> Tensor:
    """Return numbers that grow towards the key that wins a tie, below 2**32, all different."""
    num = position.shape[0]
    if ties == "lowest":
        return num - 1 - position
    if place == "self":
        # Twice the distance, and one more behind the query.
        return 2**31 - 2 * (own - position).abs() - (position > own).long()
    return position


@torch.no_grad()
def choose_blocks(
    features: Features, q: Tensor, num_keys: int, rule: Rule, view: View, block_size: int
) -> Tensor:
    """Choose blocks of keys for blocks of queries: the pairs of tokens vote by their scores.

    In a bidirectional sequence all queries of a block vote. Elsewhere those would tell the first
    query about later ones, so a block's first query votes, and the ``block_size - 1`` before it.
    Where the queries are the last of more keys (a cache), each is a block of its own. The block of
    the query itself, those of recent keys and of sinks are always kept. As many blocks are kept
    as hold the keys that a query would keep.

    Args: as for :func:`choose`; ``block_size`` in tokens.

    Returns:
        (b, h, query blocks, key blocks) bool.
    """
    b, h, n, _ = q.shape
    size = query_block(view, n, num_keys, block_size)
    num_rows, num_blocks = -(-n // size), -(-num_keys // block_size)
    visible = _visible_blocks(view, q, num_keys, size, block_size)
    first = torch.arange(num_rows, device=q.device)[:, None] * size
    if view.place != "cross":
        first = first + num_keys - n
    last = (first + size - 1).clamp(max=num_keys - 1)
    block = torch.arange(num_blocks, device=q.device)
    always = visible & (visible.cumsum(-1) <= -(-rule.num_sinks // block_size))
    if view.place != "cross" and rule.num_recent > 0:
        reach = rule.num_recent - 1
        near = (block >= (first - reach) // block_size) & (block <= (last + reach) // block_size)
        always = always | (visible & near)
    kept = rule.num_kept(visible.sum(-1, keepdim=True) * block_size)
    kept = torch.maximum((kept + block_size - 1) // block_size, always.sum(-1, keepdim=True))
    preferred = _order(block, first // block_size, rule.ties, view.place)
    preferred = preferred.expand(num_rows, -1).argsort(-1, descending=True)
    out = torch.empty(b, h, num_rows, num_blocks, dtype=torch.bool, device=q.device)
    with autocast_off(q):
        for i in range(b):
            part = slice(i, i + 1)
            scores = _votes(features, q, num_keys, view, size, block_size, part)
            here = part if visible.shape[0] > 1 else slice(None)
            scores = scores.masked_fill_(always[here], torch.inf)
            scores = scores.masked_fill_(~visible[here], -torch.inf)
            by = preferred.expand_as(scores)
            best = scores.gather(-1, by).argsort(dim=-1, descending=True, stable=True)
            is_kept = (block < kept[here if kept.shape[0] > 1 else slice(None)]).expand_as(scores)
            out[part] = torch.zeros_like(out[part]).scatter_(-1, by.gather(-1, best), is_kept)
    return out & visible


def query_block(view: View, n: int, num_keys: int, block_size: int) -> int:
    """Return how many neighbouring queries share a choice of blocks."""
    return 1 if view.place != "cross" and n != num_keys else block_size


def _visible_blocks(view: View, q: Tensor, num_keys: int, size: int, block_size: int) -> Tensor:
    """Return (b or 1, h or 1, query blocks, key blocks): whether any pair of tokens is visible."""
    n = q.shape[2]
    num_rows, num_blocks = -(-n // size), -(-num_keys // block_size)
    if view.mask is None:
        if not view.hides_later(n):
            return torch.ones(1, 1, num_rows, num_blocks, dtype=torch.bool, device=q.device)
        return torch.ones(num_rows, num_blocks, dtype=torch.bool, device=q.device).tril()[
            None, None
        ]
    mask = view.mask
    height = size if mask.shape[2] > 1 else 1
    pad = (0, -mask.shape[3] % block_size, 0, -mask.shape[2] % height)
    mask = torch.nn.functional.pad(mask, pad)
    mask = mask.unflatten(3, (-1, block_size)).unflatten(2, (-1, height))
    return mask.any(-1).any(3).expand(-1, -1, num_rows, -1)


def _votes(
    features: Features,
    q: Tensor,
    num_keys: int,
    view: View,
    size: int,
    block_size: int,
    part: slice,
) -> Tensor:
    """Return the sum of the scores of all voting pairs, (1, h, query blocks, key blocks) float64:
    whole numbers, so that the order of summation does not matter."""
    n = q.shape[2]
    keys = features.keys(part).double()
    is_real = None
    if view.mask is not None:
        is_real = view.mask[part if view.mask.shape[0] > 1 else slice(None)].any(1).any(1)
        keys = keys * is_real[:, None, :, None]
    keys = torch.nn.functional.pad(keys, (0, 0, 0, -num_keys % block_size))
    keys = keys.unflatten(2, (-1, block_size)).sum(3)
    num_rows = -(-n // size)
    votes = keys.new_zeros(1, q.shape[1], num_rows + 1, keys.shape[-1])
    for rows in _slices(n, _numbers(q) // (q.shape[1] * keys.shape[-1])):
        voters = features.queries(part, rows).double()
        if is_real is not None and view.place == "self" and n == num_keys:
            voters = voters * is_real[:, None, rows, None]
        row = torch.arange(rows.start, rows.stop, device=q.device)
        if view.place != "self":
            row = row + size - 1
        votes.index_add_(2, row // size, voters)
    return _scores(votes[:, :, :num_rows], keys)


@torch.no_grad()
def expand_blocks(blocks: Tensor, q: Tensor, num_keys: int, view: View, block_size: int) -> Tensor:
    """Return the visible pairs of chosen blocks in bits, (b, h, n, ceil(m / 8)) uint8."""
    b, h, n, _ = q.shape
    size = query_block(view, n, num_keys, block_size)
    out = torch.zeros(b, h, n, -(-num_keys // 8), dtype=torch.uint8, device=q.device)
    for batch in _slices(b, _numbers(q) // (h * n * num_keys)):
        for rows in _slices(n, _numbers(q) // (h * num_keys)):
            stop = rows.stop if view.hides_later(n) else num_keys
            row = torch.arange(rows.start, rows.stop, device=q.device) // size
            column = torch.arange(stop, device=q.device) // block_size
            keep = blocks[batch][:, :, row][..., column] & view.rows(q, batch, rows, stop)
            packed = pack_bits(keep)
            out[batch, :, rows, : packed.shape[-1]] = packed
    return out
