"""How attention over chosen keys is cut into parts: the two forms of a choice, bits and indices.

Legend: b batch, h query heads, hk key heads, n queries, m keys, l kept keys per query, d width;
x queries and y keys of one part, p times. A layout lays queries (b, h, n, d) and keys
(b, hk, m, d) out once, then takes, puts and adds parts of them.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

# Numbers in a transient tensor of one part; a GPU wants larger products.
_PART_NUMBERS = 2**19
_PART_NUMBERS_GPU = 2**26


def pack_bits(keep: Tensor) -> Tensor:
    """Return one bit per entry of ``keep`` (..., m) bool: (..., ceil(m / 8)) uint8."""
    num_bytes = -(-keep.shape[-1] // 8)
    padded = torch.nn.functional.pad(keep, (0, 8 * num_bytes - keep.shape[-1])).contiguous()
    if num_bytes == 0:
        return padded.to(torch.uint8)
    words = padded.view(torch.int64)
    # The product brings byte i of a word to bit 56 + i; no two of its terms share a bit.
    return ((words * 0x0102040810204080) >> 56).bitwise_and_(0xFF).to(torch.uint8)


def unpack_bits(bits: Tensor, num_keys: int) -> Tensor:
    """Return the (..., num_keys) bool that ``bits`` (..., >= num_keys / 8) uint8 hold."""
    if num_keys == 0:
        return bits[..., :0].to(torch.bool)
    words = bits[..., : -(-num_keys // 8)].to(torch.int64) * 0x0101010101010101
    words &= 0x8040201008040201 - 2**64
    return (words.view(torch.uint8) != 0)[..., :num_keys]


def add_rows_(target: Tensor, index: Tensor, rows: Tensor) -> None:
    """Add ``rows`` to the rows of ``target`` that ``index`` names, in an order that never changes.

    Args:
        target: (n, d).
        index: (k,) int64, in [0, n), repeats possible.
        rows: (k, d).
    """
    if target.is_cuda:
        # Sorts by index, while index_add_ and scatter_add_ use atomics there.
        target.index_put_((index,), rows, accumulate=True)
    else:
        # One thread after the other on the CPU, where it is index_put_ that races.
        target.index_add_(0, index, rows)


class How(NamedTuple):
    """The plain arguments."""

    scale: float
    dropout: tuple[float, int, int] | None
    is_causal: bool
    block_size: int | None


class Part(NamedTuple):
    """Some queries and the keys they read, as (p, x) and (p, y)."""

    queries: Any  # index of the queries
    keys: Any  # index of the keys
    keep: Tensor  # (p, x, y) bool
    columns: Tensor  # numbers of the keys, int64, broadcast to (p, x, y)


class Gathered:
    """Indices: every query reads keys of its own; p rows of all batches and heads, x = 1, y = l."""

    def __init__(self, q: Tensor, k: Tensor, choice: Tensor, how: How) -> None:
        self.shape = q.shape
        self.num_keys = k.shape[2]
        self.heads_per_key_head = q.shape[1] // k.shape[1]
        self.indices = choice.flatten(0, 2)
        self.width = q.shape[-1]

    def parts(self) -> Iterator[Part]:
        num_rows, num_kept = self.indices.shape
        if num_kept == 0 or self.num_keys == 0:
            return
        step = max(1, _numbers(self.indices) // (num_kept * self.width))
        for start in range(0, num_rows, step):
            rows = slice(start, min(start + step, num_rows))
            index = self.indices[rows].long()
            row = torch.arange(start, rows.stop, device=index.device)
            # Batches and heads are numbered together, so one division leads to the key head.
            base = row // (self.shape[2] * self.heads_per_key_head) * self.num_keys
            keep = index >= 0
            keep[:, 1:] &= index[:, 1:] != index[:, :-1]
            # An empty slot reads another key of its own row.
            index = torch.where(keep, index, index.amax(1, keepdim=True).clamp(min=0))
            yield Part(rows, (index + base[:, None]).view(-1), keep[:, None], index[:, None])

    def lay_queries(self, x: Tensor) -> Tensor:
        return x.reshape(-1, 1, x.shape[-1])

    def lay_keys(self, x: Tensor) -> Tensor:
        return x.reshape(-1, x.shape[-1])

    def take(self, laid: Tensor, part: Part) -> Tensor:
        return laid[part.queries]

    def put_(self, laid: Tensor, part: Part, value: Tensor) -> None:
        laid[part.queries] = value.to(laid.dtype)

    def read(self, laid: Tensor, part: Part) -> Tensor:
        return laid.index_select(0, part.keys).view(*part.keep.shape[::2], -1)

    def add_(self, laid: Tensor, part: Part, value: Tensor) -> None:
        add_rows_(laid, part.keys, value.flatten(0, 1))

    def row_numbers(self, part: Part) -> Tensor:
        rows: slice = part.queries
        return torch.arange(rows.start, rows.stop, device=self.indices.device)[:, None, None]


class Masked:
    """Bits: p = batches and key heads, x = the query heads of one and some rows, y = keys."""

    def __init__(self, q: Tensor, k: Tensor, choice: Tensor, how: How) -> None:
        self.shape = q.shape
        self.num_keys = k.shape[2]
        self.group = q.shape[1] // k.shape[1]
        self.bits = choice
        self.how = how

    def parts(self) -> Iterator[Part]:
        b, h, n, _ = self.shape
        if self.num_keys == 0:
            return
        numbers = _numbers(self.bits)
        per_row = h * self.num_keys
        if self.how.block_size is not None:
            steps = (1, self.group, self.how.block_size)
        else:
            steps = (max(1, numbers // (per_row * n)), h, max(1, numbers // per_row))
        for batch in _slices(b, steps[0]):
            for heads in _slices(h, steps[1]):
                for rows in _slices(n, steps[2]):
                    yield self._part(batch, heads, rows)

    def _part(self, batch: slice, heads: slice, rows: slice) -> Part:
        stop = self.num_keys
        if self.how.is_causal:
            stop = min(stop, stop - self.shape[2] + rows.stop)
        keep = unpack_bits(self.bits[batch, heads, rows], stop)
        keys: Any = slice(0, stop)
        columns = torch.arange(stop, device=keep.device)
        if self.how.block_size is not None:
            keys = columns = keep.flatten(0, -2).any(0).nonzero()[:, 0]
            keep = keep[..., keys]
        # One slice of key heads serves its query heads.
        key_heads = slice(heads.start // self.group, heads.stop // self.group)
        return Part((batch, heads, rows), (batch, key_heads, keys), self._fold(keep), columns)

    def _fold(self, x: Tensor) -> Tensor:
        """Lay (b', h', x', y) out as (p, x, y)."""
        return x.unflatten(1, (-1, self.group)).flatten(0, 1).flatten(1, 2)

    def _unfold(self, x: Tensor, part: Part) -> Tensor:
        batch, heads, rows = part.queries
        shape = (batch.stop - batch.start, heads.stop - heads.start, rows.stop - rows.start)
        return x.reshape(*shape, x.shape[-1])

    def lay_queries(self, x: Tensor) -> Tensor:
        return x

    def lay_keys(self, x: Tensor) -> Tensor:
        return x

    def take(self, laid: Tensor, part: Part) -> Tensor:
        return self._fold(laid[part.queries])

    def put_(self, laid: Tensor, part: Part, value: Tensor) -> None:
        laid[part.queries] = self._unfold(value, part).to(laid.dtype)

    def read(self, laid: Tensor, part: Part) -> Tensor:
        return laid[part.keys[:2]][:, :, part.keys[2]].flatten(0, 1)

    def add_(self, laid: Tensor, part: Part, value: Tensor) -> None:
        target = laid[part.keys[:2]]
        value = value.view(*target.shape[:2], *value.shape[1:])
        if isinstance(part.keys[2], slice):
            target[:, :, part.keys[2]] += value
        else:
            target.index_add_(2, part.keys[2], value)

    def row_numbers(self, part: Part) -> Tensor:
        b, h, n, _ = self.shape
        numbers = torch.arange(b * h * n, device=self.bits.device).view(b, h, n, 1)
        return self._fold(numbers[part.queries])

    def bias(self, bias: Tensor, part: Part) -> Tensor:
        """Return a part (p, x, y) of the bias (b or 1, h or 1, n or 1, m)."""
        shape = self._unfold(part.keep, part).shape
        return self._fold(bias[_where(bias, part)][..., part.keys[2]].expand(shape))

    def add_bias_(self, target: Tensor, part: Part, value: Tensor) -> None:
        """Sum what came of a part over the axes that the bias does not have, and add it."""
        value = self._unfold(value, part)
        repeated = [i for i in range(3) if target.shape[i] == 1 and value.shape[i] > 1]
        value = value.sum(repeated, keepdim=True) if repeated else value
        target[_where(target, part)][..., part.keys[2]] += value


def _where(bias: Tensor, part: Part) -> tuple[slice, ...]:
    return tuple(
        s if size > 1 else slice(0, 1) for s, size in zip(part.queries, bias.shape, strict=False)
    )


def _slices(num: int, step: int) -> list[slice]:
    return [slice(start, min(start + step, num)) for start in range(0, num, step)]


def _numbers(x: Tensor) -> int:
    return _PART_NUMBERS_GPU if x.is_cuda else _PART_NUMBERS
