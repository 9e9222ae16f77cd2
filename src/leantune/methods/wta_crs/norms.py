"""Where the gradient norms of a forward draw come from; any guess leaves the draw unbiased.

Legend: b samples, t token positions, n = b * t rows.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torch.compiler import is_compiling

from leantune.errors import ConfigError
from leantune.ops.backend import row_functions

_NUM_POSITIONS = 2048
"""Positions that there is room for from the start: 8 KiB for each linear."""


_NUM_WARM_UP, _EVERY = 16, 8
"""Steps that look at every gradient, and how seldom later ones do."""


class RunningNorms:
    """Running norms guess a gradient's row norms by position, from those that past steps met.

    Norms are relative to their batch's root mean square, so that a loss scale cancels, and their
    squares are averaged over steps. They show, without any plumbing, that in the last block of a
    classifier only the first token has a gradient. Linears that read one sample share one guess:
    each adds its own norms to that of the linear that drew.

    Args:
        names: of the linears; a linear's column is its place in this list.
        decay: weight of the past, in [0, 1).
        devices: of the linears.

    Attributes:
        ids: (b,) the samples of the current batch, where the norms are kept by sample.
        by_reader: whether each reader of a sample has norms of its own.
    """

    ids: Tensor | None = None
    by_reader = False

    def __init__(self, names: Sequence[str], decay: float, devices: Sequence[torch.device]) -> None:
        self._names = list(names)
        self._decay = decay
        # A position that was never seen stands at the mean.
        self._norms = [torch.ones(_NUM_POSITIONS, device=device) for device in devices]
        self._is_known = [False] * len(names)

    def observes(self, step: int) -> bool:
        """Return whether the backwards of an optimiser step are looked at.

        After a while a few do: nothing that is drawn depends on it but the variance. A compiled
        graph always looks, since it is the same for every step.
        """
        return is_compiling() or step < _NUM_WARM_UP or step % _EVERY == 0

    def predict(self, shape: torch.Size, columns: Sequence[int]) -> Tensor | None:
        """Return (t,) float32 relative norms for an input of ``shape`` (b, t, d), or None."""
        (column,) = columns
        if len(shape) < 3 or not self._is_known[column]:
            return None
        if self._norms[column].shape[0] < shape[-2]:
            self._make_room(column, shape[-2], self._norms[column].device)
        return self._norms[column].narrow(0, 0, shape[-2])

    def expect(self, column: int, shape: torch.Size, device: torch.device) -> None:
        """Make room in forward for what backward writes: values alone, which a compiler follows."""
        if len(shape) < 3:
            return
        norms = self._norms[column]
        if norms.shape[0] < shape[-2] or norms.device != device:
            self._make_room(column, shape[-2], device)
        self._is_known[column] = True

    def _make_room(self, column: int, num_positions: int, device: torch.device) -> None:
        """Put a linear's norms on ``device``, with room for at least ``num_positions``."""
        if is_compiling():
            # A graph cannot write in its backward to what it made itself.
            torch._dynamo.graph_break()
        old = self._norms[column]
        new = torch.ones(max(len(old), 2 * num_positions), device=device)
        new[: len(old)] = old
        self._norms[column] = new

    def update(
        self,
        column: int,
        grad_norms: Tensor,
        real: Tensor | None,
        shape: torch.Size,
        ids: Tensor | None,
    ) -> None:
        """Take note of the exact norms that the backward of one linear met.

        Args:
            column: of the linear that drew the sample.
            grad_norms: (n,) float32.
            real: (n,) bool, real rows; None for all.
            shape: (b, t, d) of the input; others are ignored.
            ids: (b,) the samples, or None.
        """
        if len(shape) > 2:
            update_norms = row_functions(grad_norms).update_norms
            update_norms(self._norms[column][: shape[-2]], grad_norms, self._decay, real)

    def state_dict(self) -> dict[str, Tensor]:
        """Return the norms by the linear's name, up to the last position that was seen."""
        known = [column for column, is_known in enumerate(self._is_known) if is_known]
        return {self._names[column]: _without_ones(self._norms[column]) for column in known}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take saved norms on.

        Raises:
            ConfigError: norms of other linears, or not finite ones.
        """
        for name, value in state.items():
            if name not in self._names:
                raise ConfigError(
                    f"WTACRS: running norms must belong to this model's linears, got {name!r}; "
                    "load the session with the recipe and model it was saved with"
                )
            is_right = value.ndim == 1 and value.is_floating_point()
            if not (is_right and bool(torch.isfinite(value.float()).all())):
                raise ConfigError(
                    f"WTACRS: running norms of {name} must be a row of finite numbers, got "
                    f"{tuple(value.shape)} of {value.dtype}, or nan or inf, in the saved state; "
                    "take an earlier checkpoint"
                )
        self._is_known = [name in state for name in self._names]
        for column, name in enumerate(self._names):
            self._norms[column].fill_(1.0)
            if name in state:
                values = state[name]
                if len(values) > len(self._norms[column]):
                    self._make_room(column, len(values), self._norms[column].device)
                self._norms[column][: len(values)] = values


def _without_ones(norms: Tensor) -> Tensor:
    """Return the norms up to the last that is not 1."""
    return norms[: int((norms != 1).nonzero().max()) + 1] if bool((norms != 1).any()) else norms[:0]
