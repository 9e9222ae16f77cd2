"""Running fidelity: what sampling does to the gradients of a training, measured while it trains."""

from math import log, sqrt
from typing import Any

import torch
from torch import Tensor, nn

from leantune.core.linear import Converted
from leantune.ops.linear import flatten
from leantune.ops.random import RandomKey
from leantune.ops.rows import KeptRows, OuterProduct, RowPolicy

MOST_VARIANCE = 100.0
"""Relative variance above which a site is bad: the noise is ten times as long as the gradient."""
_FEWEST = 10
"""Checks without which a mean says nothing."""


class RunningFidelity:
    """A running fidelity compares, site by site, the gradients of a training with the exact ones.

    In each step a share ``1 / every`` of the sampled linears is checked: these keep their whole
    input for the backward that runs anyway, form the exact weight gradient beside their own, and
    keep figures of both. Nothing is drawn for it, so that the training stays the same to the bit.

    Args:
        model: converted.
        every: steps in which each site is checked once.
        num_steps: of the training: how often it is judged settles when a bias is beyond chance.

    Attributes:
        sums: (s, 7) float64, for each site over its checks: their number, the sums of ``r``, of
            ``r^2``, of ``|g - dW|^2``, of ``|dW|^2`` and of the cosine, where ``r`` is the error
            along the exact gradient, ``<g - dW, dW> / |dW|^2``; and 1 for a bad site.
    """

    def __init__(self, model: nn.Module, every: int, num_steps: int) -> None:
        layers = [(n, m) for n, m in model.named_modules() if isinstance(m, Converted)]
        self._sites = {name: layer for name, layer in layers if layer.rows is not None}
        device = next((layer.weight.device for layer in self._sites.values()), None)
        self.sums = torch.zeros(len(self._sites), 7, dtype=torch.float64, device=device)
        self._every, self._checked = every, dict[Converted, RowPolicy]()
        num_tests = len(self._sites) * max(1, num_steps // every)
        # A self-normalised sum of errors of either sign exceeds x with at most 2 exp(-x^2 / 2).
        self._limit = sqrt(2 * log(2e6 * max(1, num_tests)))

    def begin_step(self, step: int) -> None:
        """Let the sites whose turn it is compare."""
        layers = list(self._sites.values())
        for at in range(step % self._every, len(layers), self._every):
            if (policy := layers[at].rows) is not None:
                self._checked[layers[at]] = policy
                layers[at].rows = _Compared(policy, self.sums[at])

    def end_step(self) -> None:
        """Let all sites be as they were."""
        while self._checked:
            layer, policy = self._checked.popitem()
            layer.rows = policy

    def figures(self) -> dict[str, dict[str, float]]:
        """Return for each checked site its relative variance, cosine and z-score so far."""
        return {
            name: {
                "relative_variance": error / exact,
                "cosine": cosine / num,
                "z_score": r / sqrt(square) if square else 0.0,
            }
            for name, (num, r, square, error, exact, cosine, _) in self._rows()
            if num
        }

    def judge(self) -> dict[str, str]:
        """Return the sites that have turned bad since the last call, and why."""
        found: dict[str, str] = {}
        figures = self.figures()
        for at, (name, (num, *_, is_bad)) in enumerate(self._rows()):
            if num < _FEWEST or is_bad:
                continue
            z, variance = figures[name]["z_score"], figures[name]["relative_variance"]
            if abs(z) > self._limit:
                found[name] = f"z-score of its bias {z:.1f}, by chance within {self._limit:.1f}"
            elif variance > MOST_VARIANCE:
                found[name] = f"relative variance {variance:.0f}, bound {MOST_VARIANCE:.0f}"
            self.sums[at, -1] = float(name in found)
        return found

    def make_exact(self) -> None:
        """Let bad sites keep every row from now on."""
        for layer, (_, (*_, is_bad)) in zip(self._sites.values(), self._rows(), strict=True):
            if is_bad:
                layer.rows = None

    def _rows(self) -> list[tuple[str, list[float]]]:
        return list(zip(self._sites, self.sums.tolist(), strict=True))


class _Compared:
    """A compared policy keeps and computes what another does, and adds up how exact that is."""

    def __init__(self, policy: RowPolicy, sums: Tensor) -> None:
        self._policy, self._sums = policy, sums

    def keep(self, x: Tensor, source: Tensor, key: RandomKey) -> tuple[KeptRows, Any]:
        kept, note = self._policy.keep(x, source, key)
        return kept, (note, None if kept.indices is None else x)

    def outer_product(self, kept: KeptRows, note: Any, grad_output: Tensor) -> OuterProduct:
        outer = self._policy.outer_product(kept, note[0], grad_output)
        rows = flatten(kept.rows if note[1] is None else note[1])
        drawn, exact = outer.dense().float(), OuterProduct(grad_output, rows).dense().float()
        error, square = drawn - exact, exact.square().sum(dtype=torch.float64)
        r = (error * exact).sum(dtype=torch.float64) / square
        cosine = torch.cosine_similarity(drawn.flatten(), exact.flatten(), dim=0)
        one = torch.ones_like(r)
        size = error.square().sum(dtype=torch.float64)
        figures = torch.stack([one, r, r * r, size, square, cosine.double(), one * 0])
        # A gradient that is zero or overflowed says nothing.
        figures = torch.where(figures.isfinite().all(), figures, 0.0)
        self._sums.add_(figures.to(self._sums.device))
        return outer

    def nbytes(self, shape: torch.Size, dtype: torch.dtype) -> int:
        return self._policy.nbytes(shape, dtype)
