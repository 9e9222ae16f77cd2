"""Linears that read one tensor share one sample of it, so that the tensor is really released."""

from collections.abc import Mapping, MutableMapping
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.compiler import is_compiling
from torch.utils.weak import WeakTensorKeyDictionary

from leantune.errors import ConfigError
from leantune.methods.wta_crs.masks import RowMask
from leantune.ops.rows import KeptRows


class Drawn(NamedTuple):
    """A drawn sample: who drew it, what is kept, and the mask whose rows were left out, or None."""

    column: int
    rows: KeptRows
    used: RowMask | None


_Samples = MutableMapping[Tensor, dict[tuple[int, torch.dtype], Drawn]]


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
        # By tensor, for as long as it lives at most, then by its version and the dtype of the rows.
        self._samples: _Samples = WeakTensorKeyDictionary()

    def take(self, column: int, source: Tensor, dtype: torch.dtype) -> Drawn | None:
        """Return the sample that another reader made of this very tensor, or None.

        A tensor that was written to since is another one: its old rows would give a wrong gradient.
        Under autocast one tensor can be read in two dtypes.
        """
        drawn = self._samples.get(source, {}).get((source._version, dtype))
        if drawn is not None and column not in self.readers[drawn.column]:
            self.readers[drawn.column] = tuple(sorted((*self.readers[drawn.column], column)))
        return drawn

    def offer(self, source: Tensor, dtype: torch.dtype, drawn: Drawn) -> None:
        """Keep a sample for the other readers of its source."""
        self._samples.setdefault(source, {})[source._version, dtype] = drawn

    def forget(self) -> None:
        """Drop every sample: graphs alone hold them, and the next forward draws anew."""
        if not is_compiling():  # nothing is shared there
            self._samples.clear()

    def __reduce__(self) -> tuple[Any, ...]:
        """Leave samples out of a copy: they belong to tensors of the original."""
        return SamplePool, (len(self.readers),), {"readers": self.readers}

    def state_dict(self) -> dict[str, Tensor]:
        """Return the pairs (column that drew, column that read), (m, 2) int64."""
        pairs = [(c, reader) for c, readers in enumerate(self.readers) for reader in readers]
        return {"readers": torch.tensor(pairs)}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take on who read with whom; without an entry it is noted anew.

        Raises:
            ConfigError: the pairs are of another model.
        """
        num_linears = len(self.readers)
        pairs = state.get("readers", torch.zeros(0, 2, dtype=torch.int64))
        is_whole = pairs.dtype == torch.int64 and pairs.shape[1:] == (2,)
        if not is_whole or bool(((pairs < 0) | (pairs >= num_linears)).any()):
            raise ConfigError(
                f"WTACRS: readers must be pairs of this model's {num_linears} linears, got "
                f"{pairs.dtype} of shape {tuple(pairs.shape)}; load the session with the recipe "
                "and model it was saved with"
            )
        read = [{column} for column in range(num_linears)]
        for column, reader in pairs.tolist():
            read[column].add(reader)
        self.readers = [tuple(sorted(columns)) for columns in read]
