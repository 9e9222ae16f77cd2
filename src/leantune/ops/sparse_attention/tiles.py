"""How attention over chosen keys is cut into tiles, so that transient memory stays bounded.

Legend: b batch, h query heads, hk key heads, hl choosers (heads that read the same keys choose them
once: h, or hk for the query heads of one key head), n queries, m keys, r query blocks; a tile holds
p query blocks of some choosers, each with x queries and y keys.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from leantune.ops.backend import by_device

# Numbers in one transient tensor; a GPU wants larger products.
_TILE_NUMBERS = 2**19
_TILE_NUMBERS_GPU = 2**24


def accumulator(x: Tensor) -> torch.dtype:
    """Return the dtype in which products of ``x`` are summed."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def tile_numbers(x: Tensor) -> int:
    """Return how many numbers a transient tensor may hold on the device of ``x``."""
    return by_device(x, cpu=_TILE_NUMBERS, gpu=_TILE_NUMBERS_GPU)


def slices(num: int, step: int) -> list[slice]:
    """Cut ``num`` items into slices of ``step`` items, of one item where step is below 1."""
    step = max(1, step)
    return [slice(start, min(start + step, num)) for start in range(0, num, step)]


def pack_bits(keep: Tensor) -> Tensor:
    """Return one bit per entry of ``keep`` (..., m) bool: (..., ceil(m / 8)) uint8.

    Bit j % 8 of byte j // 8 is set where entry j is.
    """
    padded = F.pad(keep, (0, -keep.shape[-1] % 8)).contiguous()
    if padded.shape[-1] == 0:
        return padded.to(torch.uint8)
    words = padded.view(torch.int64)
    # The product brings byte i of a word to bit 56 + i; no two of its terms share a bit.
    return ((words * 0x0102040810204080) >> 56).bitwise_and_(0xFF).to(torch.uint8)


def unpack_bits(bits: Tensor, num_keys: int) -> Tensor:
    """Return the (..., num_keys) bool that ``bits`` (..., >= num_keys / 8) uint8 hold."""
    words = bits[..., : -(-num_keys // 8)].to(torch.int64) * 0x0101010101010101
    words &= 0x8040201008040201 - 2**64
    return (words.view(torch.uint8) != 0)[..., :num_keys]


At = tuple[slice, slice, slice]
"""Slices of the b x hl choosers, of their query blocks, and of the queries in each."""


class Tile(NamedTuple):
    """Some queries and the keys that these queries read.

    Attributes:
        queries: which queries.
        keys: which keys, in the words of who made the tile.
        columns: the numbers of the keys, int64, (y,) or (p, 1, y).
        num_open: so many of the first keys are hidden from no query.
        hidden: (p, x or 1, y - num_open) bool: whether one of the others is.
        is_empty: (p, x or 1, 1) bool: whether a query has no key; None where all have one.
    """

    queries: At
    keys: Any
    columns: Tensor
    num_open: int
    hidden: Tensor
    is_empty: Tensor | None


class Tiles:
    """The tiles of an attention call whose chosen keys are bits: some rows of some batches.

    Queries are tensors (b, h, r x query_size, any), keys (b, hk, m, any), contiguous. A tile of
    either is (p, x, any) or (p, y, any), which is what batched products read.
    """

    def __init__(self, q: Tensor, k: Tensor, bits: Tensor, *, is_causal: bool) -> None:
        self._set_blocks(q, k.shape[1], q.shape[2])
        self.num_queries, self.num_keys = q.shape[2], k.shape[2]
        assert bits.dtype == torch.uint8 and bits.shape == (*q.shape[:3], -(-k.shape[2] // 8))
        self.bits, self.is_causal = bits, is_causal

    def _set_blocks(self, q: Tensor, num_choosers: int, query_size: int) -> None:
        b, self.num_heads, num_rows, _ = q.shape
        self.num_choosers, self.group = num_choosers, self.num_heads // num_choosers
        self.blocks = (b * num_choosers, self.group, num_rows // query_size, query_size)

    def __iter__(self) -> Iterator[Tile]:
        numbers, per_row = tile_numbers(self.bits), max(1, self.num_heads * self.num_keys)
        for batch in slices(len(self.bits), numbers // (per_row * self.num_queries)):
            choosers = slice(batch.start * self.num_choosers, batch.stop * self.num_choosers)
            for rows in slices(self.num_queries, numbers // per_row):
                yield self._row_tile((choosers, slice(None), rows))

    def _row_tile(self, at: At) -> Tile:
        stop = self.num_keys
        if self.is_causal:
            stop = min(stop, stop - self.num_queries + at[2].stop)
        bits = self.load_queries(self.bits, at)
        hidden = unpack_bits(bits, stop).logical_not_()
        is_empty = (bits == 0).all(-1, keepdim=True)
        columns = torch.arange(stop, device=bits.device)
        return Tile(at, (at[0], slice(stop)), columns, 0, hidden, is_empty)

    def load_queries(self, x: Tensor, at: At) -> Tensor:
        """Return a tile's part (p, x, any) of ``x`` (b, h, n, any)."""
        return self._view(x, at).flatten(2, 3).flatten(0, 1)

    def store_queries_(self, target: Tensor, at: At, values: Tensor) -> None:
        """Write values (p, x, any) to a tile's part of ``target`` (b, h, n, any)."""
        part = self._view(target, at)
        part.copy_(values.view(part.shape))

    def _view(self, x: Tensor, at: At) -> Tensor:
        """Return a part of ``x`` (b, h, n, any) as (choosers, blocks, group, queries, any)."""
        choosers, rows, inside = at
        return x.view(*self.blocks, x.shape[-1])[choosers, :, rows, inside].transpose(1, 2)

    def places(self, at: At, device: torch.device) -> tuple[Tensor, Tensor]:
        """Return each query's head among b x h, and its number in its sequence, (p, x, 1)."""
        choosers, rows, inside = at
        num, group, num_rows, size = self.blocks
        head = torch.arange(num * group, device=device).view(num, 1, group, 1)[choosers]
        query = torch.arange(num_rows * size, device=device).view(num_rows, 1, size)
        both = torch.broadcast_tensors(head, query[rows, :, inside])
        head, query = (x.flatten(2, 3).flatten(0, 1)[..., None] for x in both)
        return head, query

    def load_keys(self, x: Tensor, tile: Tile) -> Tensor:
        """Return a tile's part (p, y, any) of ``x`` (b, hk, m, any)."""
        return x.flatten(0, 1)[tile.keys]

    def add_keys_(self, target: Tensor, tile: Tile, values: Tensor) -> None:
        """Add values (p, y, any) to a tile's part of ``target`` (b, hk, m, any)."""
        part = target.flatten(0, 1)[tile.keys]
        part += values

    def whole(self, bias: Tensor | None) -> Tensor | None:
        """Return a bias or a mask, if there is one, with its queries and keys in whole blocks."""
        return bias

    def load_bias(self, bias: Tensor, tile: Tile) -> Tensor:
        """Return a tile's part (p, x or 1, y) of a whole bias (b or 1, h or 1, n or 1, m)."""
        part = self._bias(bias, tile)
        return part.expand(self._in_batches(tile.hidden)).reshape(tile.hidden.shape)

    def add_bias_(self, target: Tensor, tile: Tile, values: Tensor) -> None:
        """Add values (p, x, y) to the bias, summed over the axes that the bias does not have."""
        part = self._bias(target, tile)
        part += values.view(self._in_batches(values)).sum_to_size(part.shape)

    def _bias(self, bias: Tensor, tile: Tile) -> Tensor:
        choosers, _, rows = tile.queries
        batch = slice(choosers.start // self.num_choosers, choosers.stop // self.num_choosers)
        at = zip((batch, slice(None), rows), bias.shape, strict=False)
        return bias[tuple(s if n > 1 else slice(None) for s, n in at)][..., tile.keys[1]]

    def _in_batches(self, x: Tensor) -> tuple[int, ...]:
        """Return the shape of a tile's pairs (p, x, y) as (b', h, n', y)."""
        return len(x) // self.num_choosers, self.num_heads, x.shape[1] // self.group, x.shape[2]
