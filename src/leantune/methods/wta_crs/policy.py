"""The row policy of WTA-CRS: rows chosen in forward or in backward, shared by linears of one input.

Legend: n rows (all leading dimensions flattened), k kept rows, w features of each row, d_out.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.compiler import is_compiling

from leantune.core.runtime import Runtime
from leantune.methods.wta_crs.cache import CachedNorms
from leantune.methods.wta_crs.config import WTACRS
from leantune.methods.wta_crs.masks import LearnedMasks, RowMask
from leantune.methods.wta_crs.norms import RunningNorms
from leantune.methods.wta_crs.sharing import Allocation, Drawn, SamplePool
from leantune.ops.backend import row_functions
from leantune.ops.linear import flatten
from leantune.ops.random import RandomKey
from leantune.ops.rows import KeptRows, OuterProduct

_EXTRA_BYTES = torch.int32.itemsize + torch.float32.itemsize
"""What a sampled row takes besides its features: its number and its weight."""


def budget(n: int, keep_ratio: float, min_rows: int = 10) -> int:
    """Return how many rows to keep: ``min(max(floor(keep_ratio * n), min_rows, 1), n)``.

    Args:
        n: rows there are, >= 0.
        keep_ratio: in (0, 1].
        min_rows: never keep fewer than this, as long as there are as many.
    """
    # 0.29 * 100 is 28.999999999999996 in floating point; four units of rounding undo that.
    share = math.floor(keep_ratio * n * (1 + 2**-50))
    return min(max(share, min_rows, 1), n)


class Note(NamedTuple):
    """What backward needs to know of a forward besides the rows.

    Args:
        shape: of the input.
        ids: (b,) the samples, or None.
        column: of the norms that backward brings up to date; None where it draws.
        used: the mask whose rows were left out of the draw, or None.
        masks: those to check.
    """

    shape: torch.Size
    ids: Tensor | None = None
    column: int | None = None
    used: RowMask | None = None
    masks: Sequence[RowMask] = ()


class SampledRows:
    """Sampled rows keep ``keep_ratio`` of one linear's input; see :class:`leantune.WTACRS`.

    Args:
        column: the linear's number in ``norms``, ``pool`` and ``masks``.
        compiled_readers: columns of the linears that read the same input as far as that is known
            beforehand; they count inside compiled regions, where tensors have no identity.
        stream: of random numbers; the same for all of those.
        norms: what guesses gradient norms in forward; None for no guess.
        pool: where linears that read one tensor find its sample.
        masks: which rows of padding may be left out.
        allocation: what gives the linear its share of rows; None for the options' own.
        config: the options.
        runtime: of the session.
        block: the module around the linear whose flag says that it is checkpointed, or None.
        part: the name of what may be recomputed instead of the block (``Site.whole``).
    """

    def __init__(
        self,
        column: int,
        *,
        compiled_readers: Sequence[int],
        stream: int,
        norms: RunningNorms | CachedNorms | None,
        pool: SamplePool,
        masks: LearnedMasks,
        allocation: Allocation | None,
        config: WTACRS,
        runtime: Runtime,
        block: nn.Module | None,
        part: str,
    ) -> None:
        self.config = config
        self._column = column
        self._compiled_readers = compiled_readers
        self._stream = stream
        self._norms = norms
        self._pool = pool
        self._masks = masks
        self._allocation = allocation
        self._runtime = runtime
        # Transformers sets this flag on the block itself, also after we were applied.
        self._block = block
        self._part = part

    def keep(self, x: Tensor, source: Tensor, key: RandomKey) -> tuple[KeptRows, Note | None]:
        """Return the sampled rows, or all of them where they are drawn in backward."""
        k = self._num_kept(x.shape, x.dtype)
        if k is None:
            return KeptRows(x), None
        ids = None if self._norms is None else self._norms.ids
        if self._draws_in_backward():
            if self._allocation is not None:
                self._allocation.expect(self._column, self._column, source.shape, x.device)
            return KeptRows(x), Note(source.shape, ids)
        masks = self._masks.fitting(source.shape, x.device)
        # A compiler sees the same computation in every reader and does it once by itself.
        shares = not is_compiling()
        drawn = self._pool.take(self._column, source, x.dtype) if shares else None
        # Who read late may not have shown what the mask of the sample takes for granted.
        if drawn is None or not self._masks.allow(drawn.used, (self._column,)):
            drawn = self._draw(x, source, masks, k, key)
            if shares:
                self._pool.offer(source, x.dtype, drawn)
        column = drawn.column
        if self._allocation is not None:
            self._allocation.expect(self._column, column, source.shape, x.device)
        if self._norms is not None:
            column = self._column if self._norms.by_reader else column
            self._norms.expect(column, source.shape, x.device)
        if masks:
            self._masks.expect(self._column, x.device)
        return drawn.rows, Note(source.shape, ids, column, drawn.used, masks)

    def _draw(
        self, x: Tensor, source: Tensor, masks: Sequence[RowMask], k: int, key: RandomKey
    ) -> Drawn:
        """Draw for this linear and for those that are known to read the same tensor."""
        readers, drawer = self._pool.readers[self._column], self._column
        if is_compiling():
            readers, drawer = self._compiled_readers, self._compiled_readers[0]
        used: RowMask | None = None
        for mask in masks:
            if used is None and self._masks.allow(mask, readers):
                used = mask
        guess = None
        if self._norms is not None:
            columns = readers if self._norms.by_reader else (drawer,)
            guess = self._norms.predict(source.shape, columns)
            guess = None if guess is None else guess.to(x.device)  # the model may have moved
        rows = x.reshape(-1, x.shape[-1])
        real = None if used is None else used.real
        kept = self._sample(rows, guess, real, self.config.probability_floor, k, key)
        return Drawn(drawer, kept, used)

    def outer_product(self, kept: KeptRows, note: Note | None, grad_output: Tensor) -> OuterProduct:
        """Return the estimate's factors from ``grad_output`` (n, d_out), exact without a note."""
        if note is None:
            return OuterProduct(grad_output, flatten(kept.rows))
        if note.column is not None:
            looks = self._norms is not None and self._norms.observes(self._runtime.step)
            if looks or note.masks:
                self._observe(note, note.column, looks, grad_output)
        else:
            rows = flatten(kept.rows)
            # Exact norms: padding has none, and nothing else needs a floor.
            key, k = self._runtime.key(rows.device), self._budget(len(rows))
            kept = self._sample(rows, grad_output, None, 0.0, k, key)
        product = weighted(kept, grad_output)
        if self._allocation is not None:
            self._allocation.observe(self._column, kept, product)
        return product

    def _observe(self, note: Note, column: int, looks: bool, grad_output: Tensor) -> None:
        """Learn from a backward what the next forward draw may take for granted."""
        grad_norms = row_functions(grad_output).row_norms(grad_output)
        if looks:
            assert self._norms is not None
            real = None if note.used is None else note.used.real
            self._norms.update(column, grad_norms, real, note.shape, note.ids)
        for mask in note.masks:
            is_used = note.used is not None and note.used.field == mask.field
            self._masks.check(self._column, mask, is_used, grad_norms)

    def _sample(
        self,
        rows: Tensor,
        grad: Tensor | None,
        real: Tensor | None,
        floor: float,
        k: int,
        key: RandomKey,
    ) -> KeptRows:
        key = RandomKey(key.seed, key.counter, self._stream)
        draw_rows, estimator = row_functions(rows).draw_rows, self.config.estimator
        indices, weights = draw_rows(
            rows, k, key, grad=grad, real=real, floor=floor, estimator=estimator
        )
        return KeptRows(rows.index_select(0, indices), indices, weights)

    def _draws_in_backward(self) -> bool:
        if self.config.draw_at == "auto":
            is_on = getattr(self._block, "gradient_checkpointing", False)
            return bool(is_on or self._part in self._runtime.recomputed)
        return self.config.draw_at == "backward"

    def _num_kept(self, shape: torch.Size, dtype: torch.dtype) -> int | None:
        """Return how many rows are kept of an input, or None where that would keep no less."""
        num_rows, w = shape[:-1].numel(), shape[-1]
        k = self._budget(num_rows)
        row_bytes = w * dtype.itemsize
        return k if k * (row_bytes + _EXTRA_BYTES) < num_rows * row_bytes else None

    def _budget(self, num_rows: int) -> int:
        share = self._allocation
        ratio = self.config.keep_ratio if share is None else share.ratios[self._column]
        return budget(num_rows, ratio, self.config.min_rows)

    def nbytes(self, shape: torch.Size, dtype: torch.dtype) -> int:
        """Return the bytes kept of an input of ``shape``; linears of one input share theirs."""
        k = self._num_kept(shape, dtype)
        if k is None or self._draws_in_backward():
            return shape.numel() * dtype.itemsize
        return k * (shape[-1] * dtype.itemsize + _EXTRA_BYTES)


def weighted(kept: KeptRows, grad_output: Tensor) -> OuterProduct:
    """Return the factors of ``sum_t w_t g_t^T h_t``; ``grad_output`` is (n, d_out).

    Weights meet the gradient in float32. In float16 they are scaled into range first: a rare row
    can carry a weight of thousands.
    """
    assert kept.indices is not None and kept.weights is not None
    weights, scale = kept.weights, None
    if kept.rows.dtype == torch.float16:
        scale = weights.abs().amax().clamp(min=1)
        weights = weights / scale
    pick_rows = row_functions(grad_output).pick_rows
    picked = pick_rows(grad_output, kept.indices, weights, kept.rows.dtype)
    return OuterProduct(picked, kept.rows, scale)
