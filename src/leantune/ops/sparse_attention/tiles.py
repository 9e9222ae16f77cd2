"""How attention over chosen keys is cut into tiles, so that transient memory stays bounded.

Legend: b batch, h query heads, hk key heads, n queries, m keys, d width; a tile holds p pairs of a
batch and a key head, x queries (the query heads of one key head times some rows) and y keys.

The chosen keys are a plain tensor of bits, (b, h, n, ceil(m / 8)) uint8: bit j % 8 of byte j // 8
is set where key j is chosen.
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
    """Return one bit per entry of ``keep`` (..., m) bool: (..., ceil(m / 8)) uint8."""
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


class Tile(NamedTuple):
    """Some queries and the keys that these queries read.

    Attributes:
        queries: which queries, in the words of who made the tile.
        keys: which keys.
        columns: the numbers of the keys, int64, (y,) or (p, 1, y).
        num_open: so many of the first keys are hidden from no query.
        hidden: (p, x or 1, y - num_open) bool: whether one of the others is.
    """

    queries: tuple[slice, ...]
    keys: Any
    columns: Tensor
    num_open: int
    hidden: Tensor


class BitmaskTiles:
    """The tiles of one attention call whose chosen keys are bits.

    Queries are tensors (b, h, n, any), keys (b, hk, m, any). A tile of either is (p, x, any) or
    (p, y, any), which is what batched products read.
    """

    def __init__(self, q: Tensor, k: Tensor, bits: Tensor, *, is_causal: bool) -> None:
        self.shape = q.shape[:3]
        self.num_keys = k.shape[2]
        self.group = q.shape[1] // k.shape[1]
        self.bits = bits
        self.is_causal = is_causal

    def __iter__(self) -> Iterator[Tile]:
        b, h, n = self.shape
        if self.num_keys == 0:
            return
        numbers, per_row = tile_numbers(self.bits), h * self.num_keys
        for batch in slices(b, numbers // (per_row * n)):
            for rows in slices(n, numbers // per_row):
                yield self._tile(batch, rows)

    def _tile(self, batch: slice, rows: slice) -> Tile:
        stop = self.num_keys
        if self.is_causal:
            stop = min(stop, stop - self.shape[2] + rows.stop)
        hidden = self._flatten(unpack_bits(self.bits[batch, :, rows], stop).logical_not_())
        columns = torch.arange(stop, device=hidden.device)
        return Tile(
            (batch, slice(None), rows), (batch, slice(None), slice(stop)), columns, 0, hidden
        )

    def _flatten(self, x: Tensor) -> Tensor:
        """Return (b', h, x', y) as (p, x, y): the query heads of one key head stand together."""
        return x.unflatten(1, (-1, self.group)).flatten(0, 1).flatten(1, 2)

    def _unflatten(self, x: Tensor) -> Tensor:
        return x.view(-1, self.shape[1], x.shape[1] // self.group, x.shape[2])

    def load_queries(self, x: Tensor, tile: Tile) -> Tensor:
        """Return a tile's part (p, x, any) of ``x`` (b, h, n, any)."""
        return self._flatten(x[tile.queries])

    def store_queries_(self, target: Tensor, tile: Tile, values: Tensor) -> None:
        """Write values (p, x, any) to a tile's part of ``target`` (b, h, n, any)."""
        target[tile.queries] = self._unflatten(values).to(target.dtype)

    def load_keys(self, x: Tensor, tile: Tile) -> Tensor:
        """Return a tile's part (p, y, any) of ``x`` (b, hk, m, any)."""
        return x[tile.keys].flatten(0, 1)

    def add_keys_(self, target: Tensor, tile: Tile, values: Tensor) -> None:
        """Add values (p, y, any) to a tile's part of ``target`` (b, hk, m, any)."""
        part = target[tile.keys]
        part += values.view(part.shape)

    def row_numbers(self, tile: Tile) -> Tensor:
        """Return the number of each query among all of the call, (p, x, 1) int64."""
        numbers = torch.arange(self.shape.numel(), device=self.bits.device)
        return self._flatten(numbers.view(*self.shape, 1)[tile.queries])

    def load_bias(self, bias: Tensor, tile: Tile) -> Tensor:
        """Return a tile's part (p, x, y) of the bias (b or 1, h or 1, n or 1, m)."""
        shape = self._unflatten(tile.hidden).shape
        part = bias[_present(bias, tile)][..., tile.keys[2]]
        return self._flatten(part.expand(shape))

    def add_bias_(self, target: Tensor, tile: Tile, values: Tensor) -> None:
        """Add values (p, x, y) to the bias, summed over the axes that the bias does not have."""
        part = target[_present(target, tile)]
        sums = self._unflatten(values).sum_to_size(*part.shape[:3], values.shape[-1])
        part[..., tile.keys[2]] += sums


def _present(bias: Tensor, tile: Tile) -> tuple[slice, ...]:
    """Return the slices of a tile's queries along the axes that a bias has."""
    sizes = bias.shape[:3]
    return tuple(s if n > 1 else slice(0, 1) for s, n in zip(tile.queries, sizes, strict=True))
