"""How attention over lists of key blocks is cut into tiles: many pairs of blocks in one product.

Legend: b batch, h query heads, hk key heads, hl heads with a list of their own, n queries, m keys,
r query blocks, j key blocks; a tile holds p query blocks of some lists, each with x queries (those
of all heads that share the list) and y keys (those of its blocks).
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from leantune.ops.backend import on_gpu
from leantune.ops.sparse_attention.tiles import Tile, slices, tile_numbers


class BlockTiles:
    """The tiles of one attention call whose chosen keys are lists of blocks.

    Queries are tensors (b, h, r x query_size, any), keys (b, hk, j x block_size, any), contiguous:
    the caller pads them to whole blocks. The rest is as for
    :class:`leantune.ops.sparse_attention.tiles.BitmaskTiles`.
    """

    def __init__(
        self,
        q: Tensor,
        k: Tensor,
        indices: Tensor,
        counts: Tensor,
        mask: Tensor | None,
        *,
        shape: tuple[int, int],
        sizes: tuple[int, int],
        is_causal: bool,
    ) -> None:
        self.num_queries, self.num_keys = shape
        self.query_size, self.block_size = sizes
        self.num_heads, self.num_lists = q.shape[1], indices.shape[1]
        self.num_blocks = k.shape[2] // self.block_size
        self.indices, self.counts = indices.flatten(0, 1), counts.flatten(0, 1)
        self.mask = mask
        self.is_causal = is_causal

    def __iter__(self) -> Iterator[Tile]:
        num_all, num_rows, _ = self.indices.shape
        fewest, most = (x.tolist() for x in self.counts.aminmax(dim=0))
        per_row = self._group * self.query_size * self.block_size * max(1, *most)
        numbers = tile_numbers(self.indices)
        for rows in slices(num_rows, numbers // (per_row * num_all)):
            num_slots = max(most[rows])
            # Blocks ascend, so all but the last of the shortest list lie before the queries.
            num_full = 0 if self.mask is not None else max(0, min(fewest[rows]) - 1)
            for lists in slices(num_all, numbers // (per_row * (rows.stop - rows.start))):
                if num_slots:
                    yield self._tile(lists, rows, num_slots, num_full)

    @property
    def _group(self) -> int:
        return self.num_heads // self.num_lists

    def _tile(self, lists: slice, rows: slice, num_slots: int, num_full: int) -> Tile:
        device = self.indices.device
        blocks = self.indices[lists, rows, :num_slots].flatten(0, 1).long()
        inside = torch.arange(self.block_size, device=device)
        columns = (blocks[..., None] * self.block_size + inside).flatten(1)[:, None]
        num_open = num_full * self.block_size
        tile = Tile((lists, rows), blocks, columns, num_open, columns)
        columns = columns[..., num_open:]
        if self.mask is not None:
            hidden = ~self.load_bias(self.mask, tile) | (columns >= self.num_keys)
        elif self.is_causal:
            hidden = columns > self._query_numbers(tile)
        else:
            hidden = columns >= self.num_keys
        return tile._replace(hidden=hidden)

    def _query_numbers(self, tile: Tile) -> Tensor:
        """Return the number of each query in its sequence, (p, x, 1)."""
        lists, rows = tile.queries
        size, device = self.query_size, self.indices.device
        number = torch.arange(rows.start * size, rows.stop * size, device=device)
        number = number.view(-1, 1, size).expand(lists.stop - lists.start, -1, self._group, -1)
        return number.reshape(len(tile.keys), -1, 1)

    def _head_numbers(self, tile: Tile) -> Tensor:
        """Return the number of each query's head among all b x h, (p, x, 1)."""
        lists, rows = tile.queries
        first, stop = lists.start * self._group, lists.stop * self._group
        number = torch.arange(first, stop, device=self.indices.device).view(-1, 1, self._group, 1)
        number = number.expand(-1, rows.stop - rows.start, -1, self.query_size)
        return number.reshape(len(tile.keys), -1, 1)

    def _places(self, x: Tensor, tile: Tile) -> tuple[Tensor, ...]:
        """Return where a tile's pairs (p, x or 1, y) stand in ``x`` (b or 1, h or 1, n or 1, m)."""
        head = self._head_numbers(tile)
        query = self._query_numbers(tile).clamp(max=self.num_queries - 1)
        at = (head // self.num_heads, head % self.num_heads, query)
        if x.shape[1] == x.shape[2] == 1:
            at = tuple(i[:, :1] for i in at)
        at = tuple(i if s > 1 else i.new_zeros(1, 1, 1) for i, s in zip(at, x.shape, strict=False))
        return *at, tile.columns.clamp(max=self.num_keys - 1)

    def load_queries(self, x: Tensor, tile: Tile) -> Tensor:
        """Return a tile's part (p, x, any) of ``x`` (b, h, n, any)."""
        return self._queries(x, tile).reshape(len(tile.keys), -1, x.shape[-1])

    def store_queries_(self, target: Tensor, tile: Tile, values: Tensor) -> None:
        """Write values (p, x, any) to a tile's part of ``target`` (b, h, n, any)."""
        part = self._queries(target, tile)
        part.copy_(values.view(part.shape))

    def _queries(self, x: Tensor, tile: Tile) -> Tensor:
        """Return a tile's part of ``x`` as a view (lists, rows, heads of a list, size, any)."""
        lists, rows = tile.queries
        x = x.view(len(self.indices), self._group, -1, self.query_size, x.shape[-1])
        return x[lists, :, rows].transpose(1, 2)

    def load_keys(self, x: Tensor, tile: Tile) -> Tensor:
        """Return a tile's part (p, y, any) of ``x`` (b, hk, m, any)."""
        flat = x.view(-1, self.block_size * x.shape[-1])
        return flat.index_select(0, self._flat_blocks(x, tile)).view(
            len(tile.keys), -1, x.shape[-1]
        )

    def add_keys_(self, target: Tensor, tile: Tile, values: Tensor) -> None:
        """Add values (p, y, any) to a tile's part of ``target`` (b, hk, m, any)."""
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
        lists, rows = tile.queries
        head = torch.arange(lists.start, lists.stop, device=x.device)
        head = (head // (self.num_lists // x.shape[1])).repeat_interleave(rows.stop - rows.start)
        blocks = tile.keys.clamp(max=self.num_blocks - 1)
        return (head[:, None] * self.num_blocks + blocks).flatten()

    def row_numbers(self, tile: Tile) -> Tensor:
        """Return the number of each query among all of the call, (p, x, 1) int64."""
        return self._head_numbers(tile) * self.num_queries + self._query_numbers(tile)

    def load_bias(self, bias: Tensor, tile: Tile) -> Tensor:
        """Return a tile's part (p, x or 1, y) of the bias (b or 1, h or 1, n or 1, m)."""
        return bias[self._places(bias, tile)]

    def add_bias_(self, target: Tensor, tile: Tile, values: Tensor) -> None:
        """Add values (p, x, y) to the bias, summed over the axes that the bias does not have."""
        places = self._places(target, tile)
        if target.shape[1] == target.shape[2] == 1:
            values = values.sum(1, keepdim=True)
        target.index_put_(places, values, accumulate=True)
