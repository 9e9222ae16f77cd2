"""Attention over lists of blocks by torch's FlexAttention, on a GPU.

Legend: b batch, h query heads, hk key heads, n queries, m keys, d width, dv width of values, r
query blocks, j key blocks, l slots of a list.
"""

from functools import cache
from typing import Any

import torch
from torch import Tensor

from leantune.ops.backend import on_gpu
from leantune.ops.sparse_attention.blocks import BlockList, readers
from leantune.ops.sparse_attention.top_keys import Visibility


def serves(chosen: BlockList, q: Tensor, v: Tensor) -> bool:
    """Return whether FlexAttention has kernels for these blocks, widths and this device.

    A block must be whole tiles of its kernels, of up to 128 x 128 pairs.
    """
    is_whole = chosen.query_size == chosen.block_size and chosen.block_size % 128 == 0
    is_wide = min(q.shape[-1], v.shape[-1]) >= 16 and q.dtype != torch.float64
    return on_gpu(q) and is_whole and is_wide


def flex_attention(
    q: Tensor, k: Tensor, v: Tensor, chosen: BlockList, visibility: Visibility, scale: float
) -> Tensor:
    """Return attention over the visible keys of chosen blocks, (b, h, n, dv).

    Args: as for :func:`leantune.ops.sparse_attention.attention.sparse_attention`.
    """
    how: dict[str, Any] = {"block_mask": block_mask(chosen, visibility, q, k), "scale": scale}
    # The kernel for few queries is another one, and "auto" would take it.
    how["kernel_options"] = {"BACKEND": "TRITON"}
    return _compiled()(q, k, v, enable_gqa=q.shape[1] != k.shape[1], **how)  # type: ignore[no-any-return]


def block_mask(chosen: BlockList, visibility: Visibility, q: Tensor, k: Tensor) -> Any:
    """Return torch's ``BlockMask`` of a list, its transpose included.

    In a decoder without a mask only the block of the query itself is partial. Full and partial
    blocks have tensors of equal shapes: torch 2.11 reads both by the strides of one.
    """
    # Late: importing it takes most of a second.
    from torch.nn.attention.flex_attention import BlockMask

    n, num_keys, size = q.shape[2], k.shape[2], chosen.block_size
    num_blocks = -(-num_keys // size)
    share = q.shape[1] // chosen.indices.shape[1]
    indices, counts = (x.repeat_interleave(share, 1) for x in chosen[:2])
    blocks: dict[str, Any] = {}
    names = ("kv_num_blocks", "kv_indices", "q_num_blocks", "q_indices")
    full = tuple(f"full_{name}" for name in names)
    if visibility.hides_later(n):
        own = torch.arange(num_blocks, device=q.device, dtype=torch.int32)[:, None]
        indices, counts = indices.masked_fill(indices == own, num_blocks), counts - 1
        ones, square = torch.ones_like(counts), (*counts.shape, num_blocks)
        own_lists = (ones, own.expand_as(indices), ones, own.expand(square))
        blocks |= {name: x.contiguous() for name, x in zip(names, own_lists, strict=True)}
        names = full
    else:
        blocks |= dict.fromkeys(full)
    # An empty slot is never read, but may be fetched.
    lists = (counts.contiguous(), indices.clamp(max=num_blocks - 1), *readers(indices, num_blocks))
    blocks |= dict(zip(names, lists, strict=True))
    return BlockMask(
        seq_lengths=(n, num_keys),
        BLOCK_SIZE=(size, size),
        mask_mod=_mask_mod(visibility, (*q.shape[:3], num_keys)),
        **blocks,
    )


def _mask_mod(visibility: Visibility, shape: tuple[int, ...]) -> Any:
    hides_later = visibility.hides_later(shape[2])
    mask = None if visibility.mask is None else visibility.mask.expand(shape)

    def visible(i: Tensor, j: Tensor, query: Tensor, key: Tensor) -> Tensor:
        if mask is not None:
            return mask[i, j, query, key]
        return query >= key if hides_later else query >= 0

    return visible


@cache
def _compiled() -> Any:
    from torch.nn.attention.flex_attention import flex_attention

    # The first length has kernels of its own, later ones share theirs: with kernels for each the
    # ninth would run uncompiled, where torch reads the mask alone and no list. An error is better.
    return torch.compile(flex_attention, fullgraph=True)
