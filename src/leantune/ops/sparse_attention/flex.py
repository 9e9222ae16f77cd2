"""Attention over chosen blocks: torch's FlexAttention on a GPU, products of tiles elsewhere.

Legend: b batch, h query heads, hk key heads, n queries, m keys, d width, dv width of values, r
query blocks, j key blocks, l slots of a list.
"""

from functools import cache
from typing import Any

import torch
from torch import Tensor

from leantune.ops.backend import on_gpu
from leantune.ops.random import RandomKey
from leantune.ops.sparse_attention.attention import list_attention
from leantune.ops.sparse_attention.blocks import BlockList, readers
from leantune.ops.sparse_attention.top_keys import Visibility


def block_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    chosen: BlockList,
    visibility: Visibility,
    *,
    scale: float,
    bias: Tensor | None = None,
    dropout: float = 0.0,
    key: RandomKey | None = None,
) -> Tensor:
    """Return attention over the visible keys of chosen blocks, (b, h, n, dv).

    FlexAttention skips the other blocks on a GPU; it knows neither our dropout nor a bias.

    Args: as for :func:`leantune.ops.sparse_attention.attention.list_attention`.
    """
    is_aligned = chosen.query_size == chosen.block_size
    if on_gpu(q) and is_aligned and bias is None and dropout == 0:
        mask = block_mask(chosen, visibility, q, k)
        is_grouped = q.shape[1] != k.shape[1]
        return _compiled()(q, k, v, block_mask=mask, scale=scale, enable_gqa=is_grouped)  # type: ignore[no-any-return]
    how: dict[str, Any] = {"scale": scale, "bias": bias, "dropout": dropout, "key": key}
    return list_attention(q, k, v, chosen, visibility, **how)


def block_mask(chosen: BlockList, visibility: Visibility, q: Tensor, k: Tensor) -> Any:
    """Return torch's ``BlockMask`` of a list, its transpose included.

    In a decoder without a mask only the block of the query itself is partial. Full and partial
    blocks have tensors of equal shapes: the kernels read both by the strides of one.
    """
    # Late: importing it takes most of a second.
    from torch.nn.attention.flex_attention import BlockMask

    n, num_keys, size = q.shape[2], k.shape[2], chosen.block_size
    num_blocks = -(-num_keys // size)
    share = q.shape[1] // chosen.indices.shape[1]
    indices, counts = (x.repeat_interleave(share, 1) for x in chosen[:2])
    blocks: dict[str, Any] = {}
    if visibility.hides_later(n):
        own = torch.arange(num_blocks, device=q.device, dtype=torch.int32)[:, None]
        indices = indices.masked_fill(indices == own, num_blocks)
        readers_of, read_by = readers(indices, num_blocks)
        ones = torch.ones_like(counts)
        blocks |= {"kv_num_blocks": ones, "kv_indices": own.expand_as(indices).contiguous()}
        blocks |= {"q_num_blocks": ones, "q_indices": own.expand_as(read_by).contiguous()}
        names = ("full_kv_num_blocks", "full_kv_indices", "full_q_num_blocks", "full_q_indices")
        counts = counts - 1
    else:
        readers_of, read_by = readers(indices, num_blocks)
        names = ("kv_num_blocks", "kv_indices", "q_num_blocks", "q_indices")
        blocks |= dict.fromkeys(f"full_{name}" for name in names)
    indices = indices.clamp(max=num_blocks - 1)  # an empty slot is never read, but may be fetched
    blocks |= dict(zip(names, (counts.contiguous(), indices, readers_of, read_by), strict=True))
    return BlockMask(
        seq_lengths=(n, num_keys),
        BLOCK_SIZE=(size, size),
        mask_mod=_mask_mod(visibility, n),
        **blocks,
    )


def _mask_mod(visibility: Visibility, n: int) -> Any:
    mask, hides_later = visibility.mask, visibility.hides_later(n)
    b, h, rows = (1, 1, 1) if mask is None else mask.shape[:3]

    def visible(i: Tensor, j: Tensor, query: Tensor, key: Tensor) -> Tensor:
        if mask is None:
            return query >= key if hides_later else query >= 0
        return mask[i if b > 1 else 0, j if h > 1 else 0, query if rows > 1 else 0, key]

    return visible


@cache
def _compiled() -> Any:
    from torch.nn.attention.flex_attention import flex_attention

    # Kernels for one shape each: blocks of an unknown number cost some of their speed.
    return torch.compile(flex_attention, dynamic=False)
