"""The row policy of WTA-CRS: rows chosen in forward or in backward, shared by linears of one input.

Legend: n rows (all leading dimensions flattened), k kept rows, w features of each row, d_out.
"""

import weakref
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.compiler import is_compiling

from leantune.core.runtime import BatchInfo, Runtime
from leantune.core.sites import Site
from leantune.errors import UnsupportedError
from leantune.methods.wta_crs import estimators
from leantune.methods.wta_crs.cache import CachedNorms
from leantune.methods.wta_crs.config import WTACRS
from leantune.methods.wta_crs.norms import RunningNorms
from leantune.ops.linear import flatten
from leantune.ops.random import RandomKey, stream_of
from leantune.ops.rows import KeptRows, OuterProduct, row_norms


class Note(NamedTuple):
    """What backward needs to know of a forward besides the rows: input shape, batch, samples."""

    shape: torch.Size
    batch: BatchInfo
    ids: Tensor | None


class SharedInput:
    """A shared input is what several linears read: they share one sample, so that it is released.

    Args:
        names: of the linears.
        columns: their numbers in the running norms.
    """

    def __init__(self, names: Sequence[str], columns: Sequence[int]) -> None:
        self.columns = columns
        self.stream = stream_of(names[0])
        self._num_readers = len(names)
        self.has_several_readers = len(names) > 1
        # Weak, so that an input whose readers turn out not to share it is released all the same.
        self._source: weakref.ref[Tensor] | None = None
        self._version = 0
        self._sample: KeptRows | None = None
        self._num_served = 0

    def sample_of(self, source: Tensor) -> KeptRows | None:
        """Return the sample that another reader made of this very tensor, or None.

        A tensor that was written to since is another one: its old rows would give a wrong gradient.
        """
        if self._source is None or self._source() is not source:
            return None
        if self._version != source._version:
            return None
        sample = self._sample
        self._num_served += 1
        if self._num_served >= self._num_readers:
            self.forget()
        return sample

    def share(self, source: Tensor, sample: KeptRows) -> None:
        """Offer a sample to the other readers of its source."""
        self._source, self._version = weakref.ref(source), source._version
        self._sample, self._num_served = sample, 1

    def forget(self) -> None:
        """Drop the sample: the graph alone holds it from now on."""
        self._source = self._sample = None


class SampledRows:
    """Sampled rows keep ``keep_ratio`` of one linear's input; see :class:`leantune.WTACRS`.

    Args:
        site: the linear.
        column: its number in ``norms``.
        shared: with the linears that read the same input.
        norms: what guesses gradient norms in forward; None for no guess.
        config: the options.
        runtime: of the session.
        block: the module around the linear whose flag says that it is checkpointed, or None.
    """

    def __init__(
        self,
        site: Site,
        column: int,
        shared: SharedInput,
        norms: RunningNorms | CachedNorms | None,
        config: WTACRS,
        runtime: Runtime,
        block: nn.Module | None,
    ) -> None:
        self.config = config
        self._column = column
        self._shared = shared
        self._norms = norms
        self._runtime = runtime
        self._mask_field = site.mask_field
        self._is_checked = False
        # Transformers sets this flag on the block itself, also after we were applied.
        self._block = block

    def keep(self, x: Tensor, source: Tensor, key: RandomKey) -> tuple[KeptRows, Note | None]:
        """Return the sampled rows, or all of them where they are drawn in backward."""
        num_rows = x.shape[:-1].numel()
        k = estimators.budget(num_rows, self.config.keep_ratio, self.config.min_rows)
        if k >= num_rows:
            return KeptRows(x), None
        ids = None if self._norms is None else self._norms.ids
        note = Note(source.shape, self._runtime.batch, ids)
        if self._draws_in_backward():
            return KeptRows(x), note
        # A compiler sees the same computation in every reader and does it once by itself.
        shares = self._shared.has_several_readers and not is_compiling()
        sample = self._shared.sample_of(source) if shares else None
        if sample is None:
            rows = x.reshape(-1, x.shape[-1])
            mask = note.batch.row_mask(self._mask_field, note.shape)
            scores = row_norms(rows)
            if self._norms is not None:
                guess = self._norms.predict(note.shape, self._shared.columns)
                scores = scores if guess is None else scores * guess.to(scores.device)
            p = estimators.probabilities(scores, mask, self.config.probability_floor)
            sample = self._sample(rows, p, k, key)
            if shares:
                self._shared.share(source, sample)
        if self._norms is not None:
            self._norms.expect(self._column, note.shape, x.device)
        return sample, note

    def outer_product(self, kept: KeptRows, note: Note | None, grad_output: Tensor) -> OuterProduct:
        """Return the estimate's factors from ``grad_output`` (n, d_out), exact without a note."""
        if note is None:
            return OuterProduct(grad_output, flatten(kept.rows))
        if kept.indices is not None:
            wants_check = not (self._is_checked or is_compiling())
            if self._norms is not None or wants_check:
                grad_norms = row_norms(grad_output)
                mask = note.batch.row_mask(self._mask_field, note.shape)
                if self._norms is not None:
                    self._norms.update(self._column, grad_norms, mask, note.shape, note.ids)
                if wants_check:
                    self._check(grad_norms, mask)
            return weighted(kept, grad_output)
        rows = flatten(kept.rows)
        # Exact norms: padding has none, and nothing else needs a floor.
        p = estimators.probabilities(row_norms(rows) * row_norms(grad_output), None, 0.0)
        k = estimators.budget(len(rows), self.config.keep_ratio, self.config.min_rows)
        key = self._runtime.key(rows.device)
        return weighted(self._sample(rows, p, k, key), grad_output)

    def _sample(self, rows: Tensor, p: Tensor, k: int, key: RandomKey) -> KeptRows:
        key = key._replace(stream=self._shared.stream)
        indices, weights = estimators.sample(p, k, self.config.estimator, key)
        return KeptRows(rows.index_select(0, indices), indices, weights)

    def _check(self, grad_norms: Tensor, mask: Tensor | None) -> None:
        """Check, once, that what is called padding has no gradient.

        Rows of padding are never drawn. A loss that counts them would make the estimate biased.
        """
        self._is_checked = True
        if mask is not None and bool((grad_norms.masked_fill(mask, 0.0) > 0).any()):
            raise UnsupportedError(
                f"WTACRS: {self._mask_field} must be 0 only on rows without a gradient, got a loss "
                "that counts padding, which would bias the weight gradient; give the labels to the "
                "model with -100 on padding, or draw_at='backward', which needs no mask"
            )

    def _draws_in_backward(self) -> bool:
        if self.config.draw_at == "auto":
            return bool(getattr(self._block, "gradient_checkpointing", False))
        return self.config.draw_at == "backward"

    def nbytes(self, shape: torch.Size, dtype: torch.dtype) -> int:
        """Return the bytes kept of an input of ``shape``; linears of one input share theirs."""
        num_rows, w = shape[:-1].numel(), shape[-1]
        k = estimators.budget(num_rows, self.config.keep_ratio, self.config.min_rows)
        if k >= num_rows or self._draws_in_backward():
            return num_rows * w * dtype.itemsize
        return k * (w * dtype.itemsize + torch.int32.itemsize + torch.float32.itemsize)


def weighted(kept: KeptRows, grad_output: Tensor) -> OuterProduct:
    """Return the factors of ``sum_t w_t g_t^T h_t``; ``grad_output`` is (n, d_out).

    Weights meet the gradient in float32. In float16 they are scaled into range first: a rare row
    can carry a weight of thousands.
    """
    assert kept.indices is not None and kept.weights is not None
    picked = grad_output.index_select(0, kept.indices).float()  # (k, d_out)
    weights, scale = kept.weights, None
    if kept.rows.dtype == torch.float16:
        scale = weights.abs().amax().clamp(min=1)
        weights = weights / scale
    return OuterProduct((picked * weights[:, None]).to(kept.rows.dtype), kept.rows, scale)
