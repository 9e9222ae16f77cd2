"""What linears share: one sample of a tensor that several read, and the rows that all keep.

Legend: c linears, n rows of w features that a linear reads, k of them kept; pi the probability of a
row to be kept, h and g its input and its output's gradient.
"""

from collections.abc import Mapping, MutableMapping, Sequence
from math import sqrt
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.compiler import is_compiling
from torch.utils.weak import WeakTensorKeyDictionary

from leantune.core.distributed import sum_over_ranks
from leantune.errors import ConfigError
from leantune.methods.wta_crs.masks import RowMask
from leantune.ops.backend import row_functions
from leantune.ops.rows import KeptRows, OuterProduct

NUM_STEPS = 16
"""Steps that are looked at; in the first half the guesses of gradient norms become good."""
_LEAST = 0.5
"""No linear keeps less than this share of what an even division gives it."""


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


class Allocation:
    """An allocation gives each linear its share of rows, an even one until it has seen some steps.

    Sampling k rows adds a variance of about ``S / k`` to a weight gradient, relative to its own
    size, which is what an optimiser such as AdamW sees. The sum over linears is least, among all
    divisions that keep the same bytes, where k goes with ``sqrt(S / w)``. Kept rows show S by
    themselves: over them the sum of ``(1 - pi) / pi^2 |g|^2 |h|^2`` has the variance as its mean,
    and that of ``|g|^2 |h|^2 / pi`` the size, both without what rows have to do with each other.

    Args:
        keep_ratio: share of the bytes of all inputs that is kept.
        devices: of the linears; a linear's column is its place in this list.
        groups: columns of linears that are known to read one input; each is in one group.
        pool: who else has turned out to share a sample.

    Attributes:
        ratios: share of its rows that each linear keeps.
    """

    def __init__(
        self,
        keep_ratio: float,
        devices: Sequence[torch.device],
        groups: Sequence[Sequence[int]],
        pool: SamplePool,
    ) -> None:
        self._keep_ratio = keep_ratio
        self._groups = {column: group for group in groups for column in group}
        self._pool = pool
        self.ratios = [keep_ratio] * len(devices)
        # A tensor each, as LearnedMasks has it.
        self._met = [torch.zeros((), device=device) for device in devices]
        self._costs = torch.zeros(len(devices), dtype=torch.float64)
        self._inputs: dict[int, tuple[int, int]] = {}
        self._num_steps, self._is_learning = 0, True

    def expect(self, column: int, drawer: int, shape: torch.Size, device: torch.device) -> None:
        """Take note in forward of what a sample is drawn from: backward changes values alone.

        Args:
            column: of a reader.
            drawer: column of the linear that draws.
            shape: (..., w) of the input.
            device: of the input.
        """
        if self._is_learning:
            self._inputs[drawer] = shape[:-1].numel(), shape[-1]
            if self._met[column].device != device:  # the model has moved
                self._met[column] = self._met[column].to(device)

    def observe(self, column: int, kept: KeptRows, product: OuterProduct) -> None:
        """Take note of the variance that a sample leaves to one of its readers.

        Args:
            column: of the reader.
            kept: the sample.
            product: the reader's factors.
        """
        if not self._is_learning:
            return
        assert kept.weights is not None
        norms, weights = row_functions(kept.rows).row_norms, kept.weights
        # Rows of the gradient are g / pi here; a loss scale cancels.
        terms = (norms(product.grad_rows) * norms(product.input_rows)).square()
        variance = (terms * (1 - 1 / weights)).sum() / (terms / weights).sum()
        self._met[column] += len(weights) * variance

    def on_step(self) -> None:
        """Add up what a step showed; after the last one divide the rows anew."""
        if not self._is_learning:
            return
        self._num_steps += 1
        met = torch.stack([value.to(self._met[0].device) for value in self._met]).double()
        for value in self._met:
            value.zero_()
        if self._num_steps > NUM_STEPS // 2:
            # What overflowed, or had no gradient, says nothing.
            self._costs = self._costs.to(met) + met.nan_to_num(0, 0, 0)
        self._is_learning = self._num_steps < NUM_STEPS
        if not self._is_learning:
            self._divide(sum_over_ranks(self._costs).tolist())

    def state_dict(self) -> dict[str, Tensor]:
        """Return the ratios and what was added up, (c,) float64 each, and the number of steps."""
        ratios = torch.tensor(self.ratios, dtype=torch.float64)
        num_steps = torch.tensor(self._num_steps)
        return {"ratios": ratios, "costs": self._costs, "num_steps": num_steps}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take a saved state on; without one the division is even, and learned anew.

        Raises:
            ConfigError: it is of another model or recipe.
        """
        even = torch.full_like(self._costs, self._keep_ratio)
        ratios, costs = state.get("ratios", even), state.get("costs", torch.zeros_like(even))
        is_right = ratios.shape == costs.shape == even.shape and bool(costs.isfinite().all())
        if not (is_right and bool(((ratios > 0) & (ratios <= 1)).all())):
            raise ConfigError(
                f"WTACRS: allocation must hold a ratio in (0, 1] for each of {len(even)} linears, "
                f"got {ratios.tolist()[:3]} of shape {tuple(ratios.shape)}; load the session with "
                "the recipe and model it was saved with"
            )
        self.ratios, self._costs = ratios.tolist(), costs.to(even)
        self._num_steps = int(state.get("num_steps", 0))
        self._is_learning = self._num_steps < NUM_STEPS

    def _divide(self, costs: Sequence[float]) -> None:
        readers = {c: {*self._groups[c], *self._pool.readers[c]} for c in self._inputs}
        costs_of = {c: sum(costs[reader] for reader in readers[c]) for c in readers}
        # Of linears that draw: their rows n, those rows' bytes by n w, and what they want.
        drawers = {
            c: (n, n * w, sqrt(costs_of[c] / w))
            for c, (n, w) in self._inputs.items()
            if costs_of[c] > 0
        }
        total = self._keep_ratio * sum(size for _, size, _ in drawers.values())
        least = _LEAST * self._keep_ratio

        def divided(factor: float) -> dict[int, float]:
            return {c: min(1.0, max(least, factor * k / n)) for c, (n, _, k) in drawers.items()}

        low, high = 0.0, max((n / k for n, _, k in drawers.values()), default=0.0)
        for _ in range(100):
            middle = (low + high) / 2
            kept = sum(ratio * drawers[c][1] for c, ratio in divided(middle).items())
            low, high = (middle, high) if kept <= total else (low, middle)
        for column, ratio in divided(low).items():
            for reader in readers[column]:
                self.ratios[reader] = ratio
