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
        kept: the counts of all lists of each row, where no mask decides on them.
    """

    indices: Tensor
    counts: Tensor
    query_size: int
    block_size: int
    kept: list[int] | None = None

    def bounds(self) -> tuple[list[int], list[int]]:
        """Return the fewest and the most blocks in the lists of each row.

        Where a mask decides on them, this waits for a GPU.
        """
        if self.kept is not None:
            return self.kept, self.kept
        fewest, most = self.counts.flatten(0, 1).aminmax(dim=0)
        return fewest.tolist(), most.tolist()


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
    n, m, mask = q.shape[2], k.shape[2], visibility.mask
    size = 1 if visibility.kind != "cross" and n != m else block_size
    num_lists = num_lists or q.shape[1]
    rule = _Rule.of(n, m, size, block_size, visibility, budget.always_keep)
    num_rows, num_blocks = len(rule.own), rule.num_blocks
    in_blocks = KeyBudget(budget.keep_ratio, -(-budget.floor // block_size))
    kept = rule.num_kept(in_blocks)
    limit = int(kept.max())
    if mask is not None:
        # The first real tokens may lie in one block more.
        limit = max(in_blocks.limit(num_blocks), rule.num_first + rule.num_recent + 1)
    limit = min(limit, num_blocks)
    # What is known beforehand goes to the device at once.
    numbers = torch.cat([num_blocks - 1 - rule.own, kept, torch.arange(limit)]).to(torch.int32)
    start, counts, slot = _send(numbers, q.device).split([num_rows, num_rows, limit])
    lift = rule.lift(start)
    if mask is not None:
        lift = lift.masked_fill(_first_blocks(mask, budget.always_keep, block_size), torch.inf)
        visible = _visible_blocks(mask, size, num_rows, block_size, num_lists)
        lift = lift.masked_fill(~visible, -torch.inf)
        num_visible, num_always = visible.sum(-1), (lift == torch.inf).sum(-1)
        counts = torch.maximum(in_blocks.num_kept(num_visible), num_always)
        counts = torch.minimum(counts, num_visible).to(torch.int32)
    with autocast_off(q):
        scores = _scores(q, k, visibility, size, block_size, num_lists)
    scores += lift
    counts = counts.expand(scores.shape[:3])
    best = scores.topk(limit).indices
    best = best.masked_fill_(slot >= counts[..., None], num_blocks).sort().values
    host_counts = kept.tolist() if mask is None else None
    return BlockList(best.to(torch.int32), counts, size, block_size, host_counts)


class _Rule(NamedTuple):
    """What of a choice is known before any score.

    Attributes:
        own: (r,) int64 on the host, the key block of each query block's first query; 0 where
            queries have no position.
        num_blocks: j.
        num_first, num_recent: so many of the first blocks, and of those up to the own one, are
            always kept.
        hides_later: whether blocks behind the own one are hidden without a mask.
    """

    own: Tensor
    num_blocks: int
    num_first: int
    num_recent: int
    hides_later: bool

    @classmethod
    def of(
        cls, n: int, m: int, size: int, block_size: int, visibility: Visibility, always_keep: int
    ) -> Self:
        num_rows, num_blocks = -(-n // size), -(-m // block_size)
        num_first = min(num_blocks, -(-always_keep // block_size))
        if visibility.kind == "cross":
            return cls(torch.zeros(num_rows).long(), num_blocks, num_first, 0, False)
        own = (torch.arange(num_rows) * size + m - n) // block_size
        num_recent = min(num_blocks, 1 + max(0, -(-(always_keep - 1) // block_size)))
        return cls(own, num_blocks, num_first, num_recent, visibility.hides_later(n))

    def num_kept(self, budget: KeyBudget) -> Tensor:
        """Return how many blocks each query block keeps of those it sees without a mask, (r,)."""
        behind = self.own + 1
        num_visible = behind if self.hides_later else torch.full_like(behind, self.num_blocks)
        recent = (behind - self.num_recent).clamp(min=0)
        first = num_visible.clamp(max=self.num_first)
        always = behind - recent + torch.minimum(first, recent) + (first - behind).clamp(min=0)
        return torch.minimum(torch.maximum(budget.num_kept(num_visible), always), num_visible)

    def lift(self, start: Tensor) -> Tensor:
        """Return what lifts the blocks that are always kept, and hides later ones: (r, j).

        Args:
            start: ``j - 1 - own``, on the device of the scores.
        """
        # By how far a block lies behind the own one; each row of the result is a window of it.
        line = torch.zeros(2 * self.num_blocks - 1)
        line[self.num_blocks - self.num_recent : self.num_blocks] = torch.inf
        if self.hides_later:
            line[self.num_blocks :] = -torch.inf
        lift = _send(line, start.device).unfold(0, self.num_blocks, 1)[start]
        # In a decoder the rows before keep all that they see.
        row = int((self.own < self.num_first).sum()) if self.hides_later else 0
        lift[row:, : self.num_first].fill_(torch.inf)
        return lift


def _send(x: Tensor, device: torch.device) -> Tensor:
    """Return ``x`` on a device, without waiting for it."""
    is_far = on_gpu(device) and not on_gpu(x)
    return x.pin_memory().to(device, non_blocking=True) if is_far else x.to(device)


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


def _visible_blocks(
    mask: Tensor, size: int, num_rows: int, block_size: int, num_lists: int
) -> Tensor:
    """Return (b or 1, hl or 1, r, j): whether any pair of tokens is visible."""
    height = size if mask.shape[2] > 1 else 1
    mask = F.pad(mask, (0, -mask.shape[3] % block_size, 0, -mask.shape[2] % height))
    mask = mask.unflatten(3, (-1, block_size)).unflatten(2, (-1, height)).any(-1).any(3)
    if mask.shape[1] > num_lists:
        mask = mask.unflatten(1, (num_lists, -1)).any(2)
    return mask.expand(-1, -1, num_rows, -1)


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
