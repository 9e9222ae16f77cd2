"""What stands in for the groups that a token skips: a low-rank map of the input.

Legend: n tokens, s calibration tokens, d_model, G groups, r rank.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from leantune.methods.routed_ffn.maths import ridge_regression

_RIDGE = 1.0
"""Held-out error on MiniLM is flat from 0.1 to 1 and rises from there."""


class Compensation(nn.Module):
    """A compensation guesses the outputs of skipped groups; it does not train.

    Without skipped groups it adds exact zeros.

    Args:
        read: (G r, d_model), from the input to r numbers for each group.
        write: (G (1 + r), d_model), for each group its constant, then what those numbers add.
    """

    read: Tensor
    write: Tensor

    def __init__(self, read: Tensor, write: Tensor) -> None:
        super().__init__()
        # The session's state has them: a model that was not calibrated has no place for them.
        self.register_buffer("read", read, persistent=False)
        self.register_buffer("write", write, persistent=False)

    def forward(self, x: Tensor, skipped: Tensor) -> Tensor:
        """Return the sum of the guesses, (n, d_model).

        Args:
            x: (n, d_model).
            skipped: (n, G), 1 for the groups that a token skips, else 0.
        """
        x, skipped = x.to(self.write.dtype), skipped.to(self.write.dtype)[:, :, None]
        numbers = F.linear(x, self.read).view(len(x), skipped.shape[1], -1)
        return torch.cat([skipped, numbers * skipped], -1).flatten(1) @ self.write


def fit_compensation(
    x: Tensor, outputs: Tensor, skipped: Tensor, rank: int
) -> tuple[Tensor, Tensor]:
    """Fit a compensation to the tokens that skip each group, or to all where none does.

    Reduced-rank ridge regression of a group's output on the input: the ridge solution, projected on
    the leading principal directions of what it predicts.

    Args:
        x: (s, d_model) calibration inputs.
        outputs: (s, G, d_model), what each group adds to the FFN's output.
        skipped: (s, G) bool.
        rank: r.

    Returns:
        read (G r, d_model), write (G (1 + r), d_model), both float64.

    Source: Izenman, "Reduced-rank regression for the multivariate linear model", 1975.
    """
    reads: list[Tensor] = []
    writes: list[Tensor] = []
    for y, rows in zip(outputs.unbind(1), skipped.unbind(1), strict=True):
        rows = rows | ~rows.any()
        inputs, y = x[rows].double(), y[rows].double()
        constant, mean = y.mean(0), inputs.mean(0)
        weight, _ = ridge_regression(inputs, y, _RIDGE)
        fitted = (inputs - mean) @ weight.t()
        directions = y.new_zeros(rank, len(constant))
        width = min(rank, *fitted.shape)
        oversampled = min(width + 8, *fitted.shape)
        directions[:width] = torch.svd_lowrank(fitted, oversampled, niter=4)[2].t()[:width]
        reads.append(directions @ weight)
        constant = constant - directions.t() @ (reads[-1] @ mean)
        writes.append(torch.cat([constant[None], directions]))
    return torch.cat(reads), torch.cat(writes)
