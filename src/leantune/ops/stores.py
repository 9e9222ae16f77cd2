"""What a linear's backward keeps of its input: the store protocol, and the exact store.

Legend: n rows (all leading dimensions flattened), d_in, d_out.
"""

from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor


class Draw(NamedTuple):
    """One draw of random numbers: a pure function of these, never of a generator's state.

    Args:
        seed: the session's seed, with the rank folded in.
        number: 0-d int64 on the input's device; counts the training forwards of the model.
    """

    seed: int
    number: Tensor


class Packed(NamedTuple):
    """What a store keeps: tensors for ``save_for_backward`` and plain metadata."""

    tensors: tuple[Tensor, ...]
    meta: Any = None


class ActivationStore(Protocol):
    """Decides what one linear keeps of its input, and how its weight gradient is formed of it."""

    def pack(self, x: Tensor, draw: Draw | None, origin: Tensor) -> Packed:
        """Choose what to keep of ``x`` (..., d_in), already in the dtype of the product.

        ``origin`` is the tensor that the caller passed, before any cast: its identity tells
        which linears read one input.
        """
        ...

    def grad_weight(self, packed: Packed, grad_output: Tensor) -> Tensor:
        """Form (d_out, d_in) from what was kept and ``grad_output`` (..., d_out)."""
        ...

    def saved_bytes(self, shape: torch.Size, dtype: torch.dtype) -> int:
        """Bytes kept of an input of ``shape``; equal to what the ledger measures."""
        ...


class ExactStore:
    """Keeps the whole input: the plain linear's behaviour."""

    def pack(self, x: Tensor, draw: Draw | None, origin: Tensor) -> Packed:
        return Packed((x,))

    def grad_weight(self, packed: Packed, grad_output: Tensor) -> Tensor:
        return exact_grad_weight(packed.tensors[0], grad_output)

    def saved_bytes(self, shape: torch.Size, dtype: torch.dtype) -> int:
        return shape.numel() * dtype.itemsize


def exact_grad_weight(x: Tensor, grad_output: Tensor) -> Tensor:
    """Return ``grad_output^T x`` over all rows, (d_out, d_in), as the plain linear forms it."""
    return grad_output.reshape(-1, grad_output.shape[-1]).t() @ x.reshape(-1, x.shape[-1])
