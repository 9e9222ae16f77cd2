"""In how many bits a kept tensor is kept: the seam for linears, norms and activations alike."""

from typing import Protocol

import torch
from torch import Tensor


class Codec(Protocol):
    """A codec turns a tensor into what backward keeps of it, and back.

    Which rows are kept is decided before, by a row policy: a tenth of the rows in eight bits needs
    no code of its own.
    """

    def encode(self, x: Tensor) -> tuple[Tensor, ...]:
        """Return what to keep of ``x``, (..., d)."""
        ...

    def decode(self, saved: tuple[Tensor, ...]) -> Tensor:
        """Return the tensor that :meth:`encode` got, or its approximation."""
        ...

    def nbytes(self, shape: torch.Size, dtype: torch.dtype) -> int:
        """Return the bytes that :meth:`encode` keeps of such a tensor."""
        ...


class Exact:
    """The exact codec keeps the tensor itself, as plain autograd does."""

    def encode(self, x: Tensor) -> tuple[Tensor, ...]:
        """Return the tensor alone."""
        return (x,)

    def decode(self, saved: tuple[Tensor, ...]) -> Tensor:
        """Return the tensor."""
        return saved[0]

    def nbytes(self, shape: torch.Size, dtype: torch.dtype) -> int:
        """Return the tensor's size."""
        return shape.numel() * dtype.itemsize


EXACT = Exact()
