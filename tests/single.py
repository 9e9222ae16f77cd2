"""The smallest model with a sampled linear, and a batch for it."""

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
