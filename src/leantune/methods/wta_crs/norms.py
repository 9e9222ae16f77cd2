"""Where the gradient norms of a forward draw come from; any guess leaves the draw unbiased.

Legend: b samples, t token positions, n = b * t rows.
"""

from collections.abc import Mapping, Sequence
from typing import Protocol

import torch
from torch import Tensor

from leantune.errors import ConfigError


class NormSource(Protocol):
    """A norm source guesses the gradient norm of each row before the gradient is known.

    Attributes:
        ids: (b,) the samples of the current batch, where the source wants to know them.
    """

    ids: Tensor | None

    def predict(self, shape: torch.Size, columns: Sequence[int]) -> Tensor | None:
        """Return (n,) float32 relative norms for an input of ``shape`` (b, t, d), or None.

        ``columns`` are the linears that read the input: their squared norms add up, each relative
        to its own mean, so that no linear drowns the others.
        """
        ...

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
        ...

    def state_dict(self) -> dict[str, Tensor]:
        """Return everything that later guesses depend on."""
        ...

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take a saved state on; a wrong shape or a non-finite value is an error."""
        ...


class RunningNorms:
    """Running norms are a mean over steps of the squared gradient norm, by linear and position.

    Norms are relative to their batch's mean, so that a loss scale cancels. The mean shows, without
    any plumbing, that in the last block of a classifier only the first token has a gradient.

    Args:
        names: of the linears; a linear's column is its place in this list.
        decay: weight of the past, in [0, 1).
    """

    ids: Tensor | None = None

    def __init__(self, names: Sequence[str], decay: float) -> None:
        self._names = list(names)
        self._decay = decay
        self._means: dict[int, Tensor] = {}

    def predict(self, shape: torch.Size, columns: Sequence[int]) -> Tensor | None:
        """Return (n,) relative norms, the same for every sample; see :class:`NormSource`."""
        if len(shape) < 3:
            return None
        t = shape[-2]
        known = [self._padded(c, t)[:t] for c in columns if c in self._means]
        if not known:
            return None
        total = torch.stack(known).sum(0)  # (t,)
        return total.sqrt().expand(shape[:-1]).reshape(-1)

    def update(
        self,
        column: int,
        grad_norms: Tensor,
        mask: Tensor | None,
        shape: torch.Size,
        ids: Tensor | None,
    ) -> None:
        """Take note of the exact norms (n,) that the backward of one linear met."""
        if len(shape) < 3:
            return
        squares = grad_norms.square().view(-1, shape[-2])  # (b, t)
        real = torch.ones_like(squares) if mask is None else mask.view_as(squares).float()
        count = real.sum(0)  # (t,)
        if column not in self._means:
            self._means[column] = squares.new_ones(shape[-2])
        mean = (squares * real).sum() / real.sum().clamp(min=1)
        by_position = (squares * real).sum(0) / count.clamp(min=1) / mean
        if self._means[column].device != squares.device:
            # A resumed run reads its state on the CPU.
            self._means[column] = self._means[column].to(squares.device)
        old_here = self._padded(column, shape[-2])[: shape[-2]]
        new = torch.lerp(by_position, old_here, self._decay)
        # An overflowed step under mixed precision, or a position without a real row, says nothing.
        is_known = torch.isfinite(new) & torch.isfinite(mean) & (count > 0)
        old_here.copy_(torch.where(is_known, new, old_here))

    def _padded(self, column: int, num_positions: int) -> Tensor:
        """Return the (>= num_positions,) means of a linear; new positions start at the mean."""
        means = self._means[column]
        if len(means) < num_positions:
            means = torch.cat([means, means.new_ones(num_positions - len(means))])
            self._means[column] = means
        return means

    def state_dict(self) -> dict[str, Tensor]:
        """Return the means by the linear's name."""
        return {self._names[c]: means for c, means in self._means.items()}

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
            if not bool(torch.isfinite(value.float()).all()):
                raise ConfigError(
                    f"WTACRS: running norms of {name} must be finite, got nan or inf in the saved "
                    "state; take an earlier checkpoint"
                )
        self._means = {self._names.index(name): means.clone() for name, means in state.items()}
