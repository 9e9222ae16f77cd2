"""How attention over lists of key blocks is cut into tiles: many pairs of blocks in one product.

Legend: b batch, h query heads, hk key heads, hl choosers, n queries, m keys, r query blocks, j key
blocks; a tile holds p query blocks of some lists, each with x queries (those of all heads that
share the list) and y keys (those of its blocks).
"""

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import functional as F

from leantune.ops.backend import on_gpu
from leantune.ops.sparse_attention.tiles import At, Tile, Tiles, slices, tile_numbers


class BlockTiles(Tiles):
    """Tiles of query blocks whose chosen keys are lists of blocks.

    Args:
        q, k: in whole blocks.
        indices: (b, hl, r, l), ascending; j in empty slots.
        mask: which keys are visible, (b or 1, h or 1, n or 1, m) bool, or None.
        shape: n and m.
        sizes: queries and keys in a block.
        bounds: the fewest and the most blocks in the lists of each row.
        is_causal: whether a query sees no later key, where there is no mask.
    """

    def __init__(
        self,
        q: Tensor,
        k: Tensor,
        indices: Tensor,
        mask: Tensor | None,
        *,
        shape: tuple[int, int],
        sizes: tuple[int, int],
        bounds: tuple[list[int], list[int]],
        is_causal: bool,
    ) -> None:
        self._set_blocks(q, indices.shape[1], sizes[0])
        self.num_queries, self.num_keys = shape
        self.block_size, self.num_blocks = sizes[1], k.shape[2] // sizes[1]
        self.indices, self.bounds = indices.flatten(0, 1), bounds
        self.mask, self.is_causal = self.whole(mask), is_causal

    def __iter__(self) -> Iterator[Tile]:
        num_all, num_rows, _ = self.indices.shape
        fewest, most = self.bounds
        per_row = self.group * self.blocks[3] * self.block_size * max(1, *most)
        numbers = tile_numbers(self.indices)
        for rows in slices(num_rows, numbers // (per_row * num_all)):
            num_slots = max(most[rows])
            # Blocks ascend, so all but the last of the shortest list lie before the queries.
            num_full = 0 if self.mask is not None else max(0, min(fewest[rows]) - 1)
            for lists in slices(num_all, numbers // (per_row * (rows.stop - rows.start))):
                if num_slots:
                    yield self._list_tile((lists, rows, slice(None)), num_slots, num_full)

    def _list_tile(self, at: At, num_slots: int, num_full: int) -> Tile:
        blocks = self.indices[at[0], at[1], :num_slots].flatten(0, 1).long()
        inside = torch.arange(self.block_size, device=blocks.device)
        columns = (blocks[..., None] * self.block_size + inside).flatten(1)[:, None]
        num_open = num_full * self.block_size
        tile = Tile(at, blocks, columns, num_open, columns, None)
        columns = columns[..., num_open:]
        if self.mask is not None:
            hidden = ~self.load_bias(self.mask, tile) | (columns >= self.num_keys)
        elif self.is_causal:
            hidden = columns > self.places(at, blocks.device)[1]
        else:
            hidden = columns >= self.num_keys
        is_empty = hidden.all(-1, keepdim=True) if num_open == 0 else None
        return tile._replace(hidden=hidden, is_empty=is_empty)

    def load_keys(self, x: Tensor, tile: Tile) -> Tensor:
        flat = x.view(-1, self.block_size * x.shape[-1])
        found = flat.index_select(0, self._flat_blocks(x, tile))
        return found.view(len(tile.keys), -1, x.shape[-1])

    def add_keys_(self, target: Tensor, tile: Tile, values: Tensor) -> None:
        flat = target.view(-1, self.block_size * target.shape[-1])
        blocks, values = self._flat_blocks(target, tile), values.view(-1, flat.shape[1])
        # In a fixed order: index_add_ uses atomics on a GPU.
        if on_gpu(flat):
            flat.index_put_((blocks,), values, accumulate=True)
        else:
            flat.index_add_(0, blocks, values)

    def _flat_blocks(self, x: Tensor, tile: Tile) -> Tensor:
        """Return the numbers of a tile's blocks among those of all heads.

        An empty slot has the last block, of which all is hidden.
        """
        head = self.places(tile.queries, x.device)[0][:, 0] // (self.num_heads // x.shape[1])
        return (head * self.num_blocks + tile.keys.clamp(max=self.num_blocks - 1)).flatten()

    def whole(self, bias: Tensor | None) -> Tensor | None:
        if bias is None:
            return None
        missing = -bias.shape[2] % self.blocks[3] if bias.shape[2] > 1 else 0
        return F.pad(bias, (0, -bias.shape[3] % self.block_size, 0, missing))

    def load_bias(self, bias: Tensor, tile: Tile) -> Tensor:
        blocks, at = self._pairs(bias, tile)
        part = blocks[at].transpose(2, 3).flatten(3)  # (p, group or 1, queries or 1, y)
        if part.shape[1] == part.shape[2] == 1:
            return part[:, 0]
        return part.expand(-1, self.group, self.blocks[3], -1).flatten(1, 2)

    def add_bias_(self, target: Tensor, tile: Tile, values: Tensor) -> None:
        blocks, at = self._pairs(target, tile)
        values = values.view(len(values), *self.blocks[1::2], -1, self.block_size).transpose(2, 3)
        shape = (len(values), at[1].shape[1], values.shape[2], *blocks.shape[4:])
        blocks.index_put_(at, values.sum_to_size(shape), accumulate=True)

    def _pairs(self, x: Tensor, tile: Tile) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Return ``x`` (b or 1, h or 1, n or 1, m) in blocks, and which are a tile's.

        They are (b or 1, h or 1, r or 1, j, queries or 1, keys), by indices (p, group or 1, slots).
        """
        size = self.blocks[3] if x.shape[2] > 1 else 1
        blocks = x.unflatten(3, (-1, self.block_size)).unflatten(2, (-1, size)).transpose(3, 4)
        places = self.places(tile.queries, x.device)
        head, query = (i[:, :: self.blocks[3]] for i in places)  # the first query of each head
        at = (head // self.num_heads, head % self.num_heads, query // size)
        if x.shape[1] == 1:
            at = tuple(i[:, :1] for i in at)
        at = tuple(i if s > 1 else torch.zeros_like(i) for i, s in zip(at, x.shape, strict=False))
        return blocks, (*at, tile.keys.clamp(max=self.num_blocks - 1)[:, None])
