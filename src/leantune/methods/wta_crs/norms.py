"""Where the gradient norms of a forward draw come from; any guess leaves the draw unbiased.

Legend: b samples, t token positions, n = b * t rows.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torch.compiler import is_compiling

from leantune.errors import ConfigError

_NUM_POSITIONS = 2048
"""Positions that there is room for from the start: 8 KiB for each linear."""


class RunningNorms:
    """Running norms are a mean over steps of the squared gradient norm, by linear and position.

    Norms are relative to their batch's mean, so that a loss scale cancels. The mean shows, without
    any plumbing, that in the last block of a classifier only the first token has a gradient.

    Args:
        names: of the linears; a linear's column is its place in this list.
        decay: weight of the past, in [0, 1).
        devices: of the linears.

    Attributes:
        ids: (b,) the samples of the current batch, where the norms are kept by sample.
    """

    ids: Tensor | None = None

    def __init__(self, names: Sequence[str], decay: float, devices: Sequence[torch.device]) -> None:
        self._names = list(names)
        self._decay = decay
        # A position that was never seen stands at the mean.
        self._means = [torch.ones(_NUM_POSITIONS, device=device) for device in devices]
        self._is_known = [False] * len(names)

    def predict(self, shape: torch.Size, columns: Sequence[int]) -> Tensor | None:
        """Return (n,) float32 relative norms for an input of ``shape`` (b, t, d), or None.

        ``columns`` are the linears that read the input: their squared norms add up, each relative
        to its own mean, so that no linear drowns the others.
        """
        if len(shape) < 3:
            return None
        t = shape[-2]
        known: list[Tensor] = []
        for column in columns:
            if self._is_known[column]:
                if len(self._means[column]) < t:
                    self._make_room(column, t, self._means[column].device)
                known.append(self._means[column][:t])
        if not known:
            return None
        total = torch.stack(known).sum(0)  # (t,)
        return total.sqrt().expand(shape[:-1]).reshape(-1)

    def expect(self, column: int, shape: torch.Size, device: torch.device) -> None:
        """Make room in forward for what backward writes: values alone, which a compiler follows."""
        if len(shape) < 3:
            return
        means = self._means[column]
        if len(means) < shape[-2] or means.device != device:
            self._make_room(column, shape[-2], device)
        self._is_known[column] = True

    def _make_room(self, column: int, num_positions: int, device: torch.device) -> None:
        """Put a linear's means on ``device``, with room for at least ``num_positions``."""
        if is_compiling():
            # A graph cannot write in its backward to what it made itself.
            torch._dynamo.graph_break()
        old = self._means[column]
        new = torch.ones(max(len(old), 2 * num_positions), device=device)
        new[: len(old)] = old
        self._means[column] = new

    def update(
        self,
        column: int,
        grad_norms: Tensor,
        mask: Tensor | None,
        shape: torch.Size,
        ids: Tensor | None,
    ) -> None:
        """Take note of the exact norms (n,) that the backward of one linear met.

        Args:
            column: of the linear.
            grad_norms: (n,) float32.
            mask: (n,) bool, real rows; None for all.
            shape: (b, t, d) of the input; others are ignored.
            ids: (b,) the samples, or None.
        """
        if len(shape) < 3:
            return
        squares = grad_norms.square().view(-1, shape[-2])  # (b, t)
        real = torch.ones_like(squares) if mask is None else mask.view_as(squares).float()
        count = real.sum(0)  # (t,)
        mean = (squares * real).sum() / real.sum().clamp(min=1)
        by_position = (squares * real).sum(0) / count.clamp(min=1) / mean
        old_here = self._means[column][: shape[-2]]
        new = torch.lerp(by_position, old_here, self._decay)
        # An overflowed step under mixed precision, or a position without a real row, says nothing.
        is_known = torch.isfinite(new) & torch.isfinite(mean) & (count > 0)
        old_here.copy_(torch.where(is_known, new, old_here))

    def state_dict(self) -> dict[str, Tensor]:
        """Return the means by the linear's name, up to the last position that was seen."""
        known = [column for column, is_known in enumerate(self._is_known) if is_known]
        return {self._names[column]: _without_ones(self._means[column]) for column in known}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take saved means on.

        Raises:
            ConfigError: means of other linears, or not finite ones.
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
            self._means[column].fill_(1.0)
            if name in state:
                values = state[name]
                if len(values) > len(self._means[column]):
                    self._make_room(column, len(values), self._means[column].device)
                self._means[column][: len(values)] = values


def _without_ones(means: Tensor) -> Tensor:
    """Return the means up to the last that is not 1."""
    return means[: int((means != 1).nonzero().max()) + 1] if bool((means != 1).any()) else means[:0]
