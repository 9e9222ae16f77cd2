"""The choice of blocks of keys for blocks of queries: means of queries times means of keys.

Legend: b batch, h query heads, hk key heads, hl heads with a list of their own (h, or hk where the
query heads of one key head share it), n queries, m keys, d width, r query blocks, j key blocks,
l slots of a list.
"""

from typing import NamedTuple, Self

import torch
from torch import Tensor
from torch.nn import functional as F

from leantune.ops.autocast import autocast_off
from leantune.ops.backend import on_gpu
from leantune.ops.sparse_attention.tiles import accumulator
from leantune.ops.sparse_attention.top_keys import KeyBudget, Visibility


class BlockList(NamedTuple):
    """Which blocks of keys each block of queries reads.

    Attributes:
        indices: (b, hl, r, l) int32, ascending; j in the slots behind the count.
        counts: (b, hl, r) int32.
        query_size: queries in a block.
        block_size: keys in a block.
    """

    indices: Tensor
    counts: Tensor
    query_size: int
    block_size: int


@torch.no_grad()
def choose_blocks(
    q: Tensor,
    k: Tensor,
    budget: KeyBudget,
    visibility: Visibility,
    block_size: int,
    *,
    num_lists: int | None = None,
) -> BlockList:
    """Choose the key blocks whose mean key has the largest product with a query block's mean query.

    In a bidirectional sequence all queries of a block vote. Elsewhere those would tell the first
    query about later ones, so a block's first query votes, and the ``block_size - 1`` before it.
    Where the queries are the last of more keys (a cache), each is a block of its own. Invisible
    tokens are in no mean. The block of the query itself is always kept, and what
    ``budget.always_keep`` names. As many blocks are kept as hold the keys that a query would keep.

    Without a mask it takes at most 15 launches at any length, and no synchronisation.

    Args:
        q: (b, h, n, d).
        k: (b, hk, m, d).
        budget: of each query.
        visibility: of the keys.
        block_size: in tokens.
        num_lists: h by default; hk lets the query heads of one key head vote together.
    """
    fixed = _Fixed.of(q, k, budget.always_keep, visibility, block_size)
    size, num_blocks = fixed.query_size, fixed.num_blocks
    in_blocks = KeyBudget(budget.keep_ratio, -(-budget.floor // block_size))
    starts, kept = fixed.starts, []
    if visibility.mask is None:
        kept = fixed.num_kept(in_blocks)
        limit = max(kept)
    else:
        limit = max(in_blocks.limit(num_blocks), fixed.num_first + fixed.num_recent + 2)
        limit = min(limit, num_blocks)
    # What is known beforehand goes to the device at once.
    numbers = torch.tensor([*starts, *kept, *range(limit)], dtype=torch.int32)
    start, counts, slot = _send(numbers, q.device).split([len(starts), len(kept), limit])
    with autocast_off(q):
        scores = _scores(q, k, visibility, size, block_size, num_lists or q.shape[1])
    if starts:
        scores += fixed.bias(start)
    elif fixed.num_first:
        scores[..., : fixed.num_first].fill_(torch.inf)
    if visibility.mask is not None:
        if fixed.num_first:
            first = _first_blocks(visibility.mask, budget.always_keep, block_size)
            scores.masked_fill_(first, torch.inf)
        visible = _visible_blocks(visibility.mask, fixed, block_size, scores.shape[1])
        scores.masked_fill_(~visible, -torch.inf)
        num_visible = visible.sum(-1)
        most = torch.maximum(in_blocks.num_kept(num_visible), (scores == torch.inf).sum(-1))
        counts = torch.minimum(most, num_visible).to(torch.int32)
    counts = counts.expand(scores.shape[:3])
    best = scores.topk(limit).indices
    best = best.masked_fill_(slot >= counts[..., None], num_blocks).sort().values
    return BlockList(best.to(torch.int32), counts, size, block_size)


class _Fixed(NamedTuple):
    """What is known of a choice before any score.

    Attributes:
        query_size: queries in a block.
        num_rows: blocks of queries, r.
        num_blocks: blocks of keys, j.
        own: the key block of each query block's first query; None where queries have no position.
        hides_later: whether blocks behind the own one are hidden without a mask.
        num_first, num_recent: blocks of the keys that ``always_keep`` names, but the own.
    """

    query_size: int
    num_rows: int
    num_blocks: int
    own: list[int] | None
    hides_later: bool
    num_first: int
    num_recent: int

    @classmethod
    def of(
        cls, q: Tensor, k: Tensor, always_keep: int, visibility: Visibility, block_size: int
    ) -> Self:
        n, m = q.shape[2], k.shape[2]
        is_cross = visibility.kind == "cross"
        size = 1 if not is_cross and n != m else block_size
        num_rows, num_blocks = -(-n // size), -(-m // block_size)
        own = [max(0, m - n + row * size) // block_size for row in range(num_rows)]
        return cls(
            query_size=size,
            num_rows=num_rows,
            num_blocks=num_blocks,
            own=None if is_cross else own,
            hides_later=visibility.hides_later(n),
            num_first=min(num_blocks, -(-always_keep // block_size)),
            num_recent=min(num_blocks - 1, max(0, -(-(always_keep - 1) // block_size))),
        )

    @property
    def starts(self) -> list[int]:
        """Where the row of each query block begins in the line that :meth:`bias` makes."""
        return [self.num_blocks - 1 - block for block in self.own or ()]

    def bias(self, start: Tensor) -> Tensor:
        """Return what lifts the blocks that are always kept, and hides later ones: (r, j)."""
        assert self.own is not None
        # By how far a block lies behind the own one; each row of the result is a window of it.
        line = [0.0] * (self.num_blocks - 1 - self.num_recent)
        line += [torch.inf] * (self.num_recent + 1)
        line += [-torch.inf if self.hides_later else 0.0] * (self.num_blocks - 1)
        bias = _send(torch.tensor(line), start.device).unfold(0, self.num_blocks, 1)[start]
        if self.num_first:
            # In a decoder the rows before keep all that they see.
            row = sum(b < self.num_first for b in self.own) if self.hides_later else 0
            bias[row:, : self.num_first].fill_(torch.inf)
        return bias

    def num_kept(self, budget: KeyBudget) -> list[int]:
        """Return how many blocks each query block keeps of those that it sees without a mask."""
        if self.own is None:
            return [max(budget.limit(self.num_blocks), self.num_first)] * self.num_rows
        kept: list[int] = []
        for own in self.own:
            visible = own + 1 if self.hides_later else self.num_blocks
            recent = max(0, own - self.num_recent)
            before = min(self.num_first, recent)
            behind = max(0, min(self.num_first, visible) - own - 1)
            always = own + 1 - recent + before + behind
            kept.append(max(budget.limit(visible), always))
        return kept


def _send(x: Tensor, device: torch.device) -> Tensor:
    """Return ``x`` on a device, without waiting for it."""
    return x.pin_memory().to(device, non_blocking=True) if on_gpu(device) else x.to(device)


def _scores(
    q: Tensor, k: Tensor, visibility: Visibility, size: int, block_size: int, num_lists: int
) -> Tensor:
    """Return the products of means, (b, hl, r, j); a row of them has a scale of its own."""
    b, h, n, d = q.shape
    num_rows, num_key_heads = -(-n // size), k.shape[1]
    is_real = None
    if visibility.mask is not None:
        is_real = visibility.mask.any(1).any(1)[:, None, :, None]
        if n == k.shape[2] and visibility.kind != "cross":
            q = q * is_real
    is_ahead = visibility.kind != "self" and size > 1
    if is_ahead:
        q = q[:, :, : (num_rows - 1) * size + 1]
    queries = _means(q, size, int(is_ahead), h // num_lists)
    if is_real is None:
        keys = _means(k, block_size)
    else:
        share = _means(is_real.to(queries.dtype), block_size)
        keys = _means(k * is_real, block_size) / share.clamp(min=torch.finfo(share.dtype).tiny)
    product = torch.bmm(queries.view(b * num_key_heads, -1, d), keys.flatten(0, 1).mT)
    return product.view(b, num_lists, num_rows, -1)


def _means(x: Tensor, size: int, num_first: int = 0, share: int = 1) -> Tensor:
    """Return the means of the first rows, then of ``size`` rows each, then of what is left.

    ``x`` is (b, h, n, d), of which ``share`` neighbouring heads go into one; the result is
    (b, h / share, blocks, d) in the accumulator's dtype.
    """
    x = x.unflatten(1, (-1, share))
    stop = x.shape[3] - (x.shape[3] - num_first) % size
    first, whole, last = x[:, :, :, :num_first], x[:, :, :, num_first:stop], x[:, :, :, stop:]
    parts = [first[:, :, :, None], whole.unflatten(3, (-1, size)), last[:, :, :, None]]
    parts = [part for part in parts if part.shape[3] * part.shape[4]]
    sizes = [part.shape[3] for part in parts]
    out = x.new_empty(*x.shape[:2], sum(sizes), x.shape[-1], dtype=accumulator(x))
    for part, to in zip(parts, out.split(sizes, 2), strict=True):
        torch.mean(part, (2, 4), dtype=out.dtype, out=to)
    return out


def _visible_blocks(mask: Tensor, fixed: _Fixed, block_size: int, num_lists: int) -> Tensor:
    """Return (b or 1, hl or 1, r, j): whether any pair of tokens is visible."""
    height = fixed.query_size if mask.shape[2] > 1 else 1
    mask = F.pad(mask, (0, -mask.shape[3] % block_size, 0, -mask.shape[2] % height))
    mask = mask.unflatten(3, (-1, block_size)).unflatten(2, (-1, height)).any(-1).any(3)
    if mask.shape[1] > num_lists:
        mask = mask.unflatten(1, (num_lists, -1)).any(2)
    return mask.expand(-1, -1, fixed.num_rows, -1)


def _first_blocks(mask: Tensor, num_keys: int, block_size: int) -> Tensor:
    """Return (b or 1, 1, 1, j): whether a block has one of the first real tokens."""
    is_real = mask.any(1).any(1)
    is_first = is_real & (is_real.cumsum(-1) <= num_keys)
    is_first = F.pad(is_first, (0, -is_first.shape[1] % block_size))
    return is_first.unflatten(1, (-1, block_size)).any(-1)[:, None, None]


def readers(indices: Tensor, num_blocks: int) -> tuple[Tensor, Tensor]:
    """Return which query blocks read each key block: the transpose of a list.

    Args:
        indices: (b, hl, r, l), blocks of keys, ``num_blocks`` in empty slots.
        num_blocks: j.

    Returns:
        counts (b, hl, j), and indices (b, hl, j, r), ascending, 0 behind the count; int32 both.
    """
    b, num_lists, num_rows, _ = indices.shape
    index = indices.long()
    reads = index.new_zeros(b, num_lists, num_rows, num_blocks + 1, dtype=torch.int32)
    reads.scatter_(3, index, 1)
    rank = reads.cumsum(2, dtype=torch.int32)
    place = index * num_rows + rank.gather(3, index) - 1
    row = torch.arange(num_rows, device=index.device, dtype=torch.int32)[:, None]
    out = reads.new_zeros(b, num_lists, (num_blocks + 1) * num_rows)
    out.scatter_(2, place.flatten(2), row.expand_as(index).flatten(2))
    out = out.view(b, num_lists, num_blocks + 1, num_rows)[:, :, :num_blocks]
    return rank[:, :, -1, :num_blocks].contiguous(), out.contiguous()
