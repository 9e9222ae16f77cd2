"""How the kept rows are divided among linears: more where they lower the variance most.

Legend: c linears, n rows of w features that a linear reads, k of them kept; pi the probability of a
row to be kept, h and g its input and its output's gradient.
"""

from collections.abc import Mapping, Sequence
from math import sqrt

import torch
from torch import Tensor

from leantune.core.distributed import sum_over_ranks
from leantune.errors import ConfigError
from leantune.methods.wta_crs.sharing import SamplePool
from leantune.ops.backend import row_functions
from leantune.ops.rows import KeptRows, OuterProduct

NUM_STEPS = 16
"""Steps that are looked at; in the first half the guesses of gradient norms become good."""
_LEAST = 0.5
"""No linear keeps less than this share of what an even division gives it."""


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

    def expect(self, column: int, shape: torch.Size, device: torch.device) -> None:
        """Take note in forward of what a linear draws from: backward changes values alone.

        Args:
            column: of the linear that draws.
            shape: (..., w) of its input.
            device: of the input.
        """
        if self._is_learning:
            self._inputs[column] = shape[:-1].numel(), shape[-1]
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
