"""Attention over chosen blocks: torch's FlexAttention on a GPU, products of tiles elsewhere.

Legend: b batch, h query heads, hk key heads, n queries, m keys, d width, dv width of values.
"""

from functools import cache
from typing import Any

import torch
from torch import Tensor

from leantune.ops.backend import on_gpu
from leantune.ops.sparse_attention.attention import sparse_attention
from leantune.ops.sparse_attention.top_keys import Visibility, expand_blocks, query_block


def block_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    blocks: Tensor,
    visibility: Visibility,
    block_size: int,
    *,
    scale: float,
    bias: Tensor | None = None,
    dropout: float = 0.0,
    **how: Any,
) -> Tensor:
    """Return attention over the visible keys of chosen blocks, (b, h, n, dv).

    FlexAttention skips the other blocks on a GPU; it knows neither our dropout nor a bias.

    Args:
        blocks: (b, h, query blocks, key blocks) bool.
        visibility: of the keys inside the blocks.
        block_size: of queries and of keys.

    The others are those of :func:`leantune.ops.sparse_attention.attention.sparse_attention`.
    """
    n, num_keys = q.shape[2], k.shape[2]
    is_aligned = query_block(visibility, n, num_keys, block_size) == block_size
    if on_gpu(q) and is_aligned and bias is None and dropout == 0:
        mask = block_mask(blocks, visibility, block_size, n, num_keys)
        is_grouped = q.shape[1] != k.shape[1]
        return _compiled()(q, k, v, block_mask=mask, scale=scale, enable_gqa=is_grouped)  # type: ignore[no-any-return]
    bits = expand_blocks(blocks, q, num_keys, visibility, block_size)
    how |= {"scale": scale, "bias": bias, "dropout": dropout}
    return sparse_attention(q, k, v, bits, block_size=block_size if is_aligned else None, **how)


def block_mask(
    blocks: Tensor, visibility: Visibility, block_size: int, n: int, num_keys: int
) -> Any:
    """Return torch's ``BlockMask`` of chosen blocks (b, h, query blocks, key blocks)."""
    # Late: importing it takes most of a second.
    from torch.nn.attention.flex_attention import BlockMask

    order = blocks.to(torch.uint8).argsort(dim=-1, descending=True, stable=True)
    return BlockMask.from_kv_blocks(
        blocks.sum(-1, dtype=torch.int32),
        order.to(torch.int32),
        BLOCK_SIZE=block_size,
        mask_mod=_mask_mod(visibility, n),
        seq_lengths=(n, num_keys),
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

    return torch.compile(flex_attention)
