"""Linears that read one tensor share one sample of it, so that the tensor is really released."""

import weakref
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from leantune.errors import ConfigError
from leantune.methods.wta_crs.masks import RowMask
from leantune.ops.rows import KeptRows


class Drawn(NamedTuple):
    """A drawn sample, and the row mask that it trusted.

    Args:
        rows: what is kept.
        used: the mask whose rows were left out, or None.
    """

    rows: KeptRows
    used: RowMask | None


class _Shared(NamedTuple):
    source: "weakref.ref[Tensor]"
    version: int
    column: int
    drawn: Drawn


class SamplePool:
    """A sample pool hands the sample of a tensor to whoever reads that very tensor next.

    Nobody says beforehand who reads together: query, key and value, the linears of a parallel
    block, all decoder blocks that read one encoder output, whatever the model does. Who did is
    noted, so that later draws count the gradient norms of all readers.

    Args:
        num_linears: that share the pool; a linear goes by its column.

    Attributes:
        readers: for each column the ascending columns that read what this linear drew, itself
            included.
    """

    def __init__(self, num_linears: int) -> None:
        self.readers: list[tuple[int, ...]] = [(column,) for column in range(num_linears)]
        self._shared: dict[tuple[int, torch.dtype], _Shared] = {}

    def take(self, column: int, source: Tensor, dtype: torch.dtype) -> Drawn | None:
        """Return the sample that another reader made of this very tensor, or None.

        A tensor that was written to since is another one: its old rows would give a wrong gradient.
        Under autocast one tensor can be read in two dtypes.
        """
        shared = self._shared.get((id(source), dtype))
        if shared is None or shared.version != source._version or shared.source() is not source:
            return None
        readers = self.readers[shared.column]
        if column not in readers:
            self.readers[shared.column] = tuple(sorted((*readers, column)))
        return shared.drawn

    def offer(self, column: int, source: Tensor, dtype: torch.dtype, drawn: Drawn) -> None:
        """Keep a sample for the other readers of its source, for as long as that lives at most."""
        key = (id(source), dtype)
        weak = weakref.ref(source, lambda _: self._shared.pop(key, None))
        self._shared[key] = _Shared(weak, source._version, column, drawn)

    def forget(self) -> None:
        """Drop every sample: graphs alone hold them from now on."""
        self._shared.clear()

    def __getstate__(self) -> dict[str, Any]:
        """Leave samples out of a copy: they belong to tensors of the original."""
        return {**self.__dict__, "_shared": {}}

    def state_dict(self) -> dict[str, Tensor]:
        """Return the pairs (column that drew, column that read), (m, 2) int64."""
        pairs = [(c, reader) for c, readers in enumerate(self.readers) for reader in readers]
        return {"readers": torch.tensor(pairs)}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take on who read with whom; without an entry it is noted anew.

        Raises:
            ConfigError: the pairs are of another model.
        """
        self.forget()
        num_linears = len(self.readers)
        self.readers = [(column,) for column in range(num_linears)]
        pairs = state.get("readers")
        if pairs is None:
            return
        is_whole = pairs.dtype == torch.int64 and pairs.ndim == 2 and pairs.shape[1] == 2
        if not is_whole or bool(((pairs < 0) | (pairs >= num_linears)).any()):
            raise ConfigError(
                f"WTACRS: readers must be pairs of this model's {num_linears} linears, got "
                f"{pairs.dtype} of shape {tuple(pairs.shape)}; load the session with the recipe "
                "and model it was saved with"
            )
        for column, reader in pairs.tolist():
            self.readers[column] = tuple(sorted({*self.readers[column], reader}))
