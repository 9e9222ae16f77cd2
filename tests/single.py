"""The smallest model with a sampled linear, a batch for it, and what a forward draws."""

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn


class Single(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


def classifier_like() -> tuple[Tensor, Tensor]:
    """Inputs (b, t, d), and a gradient that only the first token has much of."""
    x = torch.randn(4, 10, 6) + 0.3
    grad_output = torch.randn(4, 10, 5)
    grad_output[:, 1:] *= 0.05
    return x, grad_output


def saved_by(run: Callable[[], Any]) -> list[Tensor]:
    """Return what autograd saves, in order."""
    saved: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        saved.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        run()
    return saved


def samples(run: Callable[[], Any]) -> list[tuple[Tensor, Tensor]]:
    """Return (indices, weights) of every draw in forward; linears that share one count once."""
    saved = saved_by(run)
    pairs = {
        t.data_ptr(): (t.long(), weights)
        for t, weights in pairwise(saved)
        if t.dtype == torch.int32
    }
    return list(pairs.values())
