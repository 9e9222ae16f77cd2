"""Attention over chosen blocks by torch's FlexAttention, which skips the others on a GPU.

Legend: b batch, h query heads, hk key heads, n queries, m keys, d width.
"""

from functools import cache
from typing import Any

import torch
from torch import Tensor

from leantune.ops.choice import View


def flex_blocks(
    q: Tensor, k: Tensor, v: Tensor, blocks: Tensor, view: View, block_size: int, scale: float
) -> Tensor:
    """Return attention over the visible keys of chosen blocks, (b, h, n, dv).

    Args:
        q: (b, h, n, d); k and v: (b, hk, m, d).
        blocks: (b, h, query blocks, key blocks) bool.
        view: what is visible inside the blocks.
        block_size: of queries and of keys.
        scale: factor of the products.
    """
    mask = block_mask(blocks, view, block_size, q.shape[2], k.shape[2])
    is_grouped = q.shape[1] != k.shape[1]
    return _compiled()(q, k, v, block_mask=mask, scale=scale, enable_gqa=is_grouped)


def block_mask(blocks: Tensor, view: View, block_size: int, n: int, num_keys: int) -> Any:
    """Return torch's ``BlockMask`` of chosen blocks (b, h, query blocks, key blocks)."""
    # Late: importing it takes most of a second.
    from torch.nn.attention.flex_attention import BlockMask

    order = blocks.to(torch.uint8).argsort(dim=-1, descending=True, stable=True)
    return BlockMask.from_kv_blocks(
        blocks.sum(-1, dtype=torch.int32),
        order.to(torch.int32),
        BLOCK_SIZE=block_size,
        mask_mod=_mask_mod(view, n),
        seq_lengths=(n, num_keys),
    )


def _mask_mod(view: View, n: int) -> Any:
    mask = view.mask
    if mask is not None:
        b, h, rows = mask.shape[:3]

        def visible(i: Tensor, j: Tensor, query: Tensor, key: Tensor) -> Tensor:
            at = (i if b > 1 else 0, j if h > 1 else 0, query if rows > 1 else 0)
            return mask[(*at, key)]

        return visible
    if view.hides_later(n):
        return lambda i, j, query, key: query >= key
    return lambda i, j, query, key: query == query


@cache
def _compiled() -> Any:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention)
