"""meProp: back-propagate only the largest entries of each linear's output gradient.

Legend: n rows (all leading dimensions flattened), d_out, d_in, k = keep_ratio d_out units.

    "unified":  S = G, all but the k columns with the largest sum of magnitudes set to zero
    dW = S^T X,  dX = S W,  db = column sums of S
    "weight":   dX = G W and db as ever, dW = the keep_ratio d_out d_in largest entries of G^T X

Source: Sun, Ren, Ma and Wang, "meProp: Sparsified Back Propagation for Accelerated Deep Learning
with Reduced Overfitting", ICML 2017, arXiv 1706.06197 (there called unified top-k). "weight" is
what the SparseGrad paper, arXiv 2410.07383, compares with under this name. Both are biased, and
nothing of what is dropped is kept for later steps. The products run over the zeros, too: this is a
baseline for quality, which saves no arithmetic.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from leantune.core.config import MethodConfig, option
from leantune.core.conversion import SwapConversion
from leantune.core.linear import Swap, converted, is_conv1d, swap_all
from leantune.core.registry import MethodSpec, register
from leantune.core.runtime import Runtime
from leantune.core.sites import Site
from leantune.ops.rows import OuterProduct


@dataclass(frozen=True, kw_only=True)
class MeProp(MethodConfig):
    """meProp keeps ``keep_ratio`` of each linear's output gradient, by magnitude; forward is exact.

    Weight, bias and input gradient all come from what is kept, so lower layers see a thinner
    gradient, too. Any optimiser steps the dense, mostly zero gradients. Trainable linears inside
    the model's blocks are taken by default; the head stays exact, as in the paper.
    """

    method: ClassVar[str] = "meprop"

    keep_ratio: float = option(0.04, gt=0, le=1, help="share of output units (or entries) kept")
    variant: Literal["unified", "weight"] = option(
        "unified",
        help="what is kept: one set of units for the batch (the paper's), or the largest entries "
        "of the weight's gradient (the comparison of the SparseGrad paper)",
    )


def keep_units(grad: Tensor, keep_ratio: float) -> Tensor:
    """Return ``grad`` (..., d_out) with all but the k largest columns, summed, set to zero."""
    k = _count(keep_ratio, grad.shape[-1])
    wide = torch.promote_types(grad.dtype, torch.float32)
    sums = grad.abs().flatten(0, -2).sum(0, dtype=wide)
    is_kept = torch.zeros_like(sums, dtype=torch.bool)
    is_kept[sums.topk(k, sorted=False).indices] = True
    return torch.where(is_kept, grad, 0.0)


def keep_entries(grad: Tensor, keep_ratio: float) -> Tensor:
    """Return ``grad`` of any shape with all but its ``keep_ratio`` largest entries set to zero."""
    flat = grad.flatten()
    kept = flat.abs().topk(_count(keep_ratio, flat.numel()), sorted=False).indices
    return torch.zeros_like(flat).scatter(0, kept, flat[kept]).view(grad.shape)


def _count(keep_ratio: float, total: int) -> int:
    return max(1, round(keep_ratio * total))


def _thin_out(
    keep_ratio: float, runtime: Runtime, module: nn.Module, args: Any, output: Tensor
) -> None:
    """Let backward see the kept units of a module's output gradient alone; a forward hook."""
    if module.training and not runtime.is_exact and output.requires_grad:
        output.register_hook(partial(keep_units, keep_ratio=keep_ratio))


@dataclass(frozen=True)
class LargestEntries:
    """The largest entries of a weight's gradient train the weight; the rest is zero."""

    layer: nn.Module
    keep_ratio: float

    @property
    def parameter(self) -> Tensor:
        """The layer's own weight."""
        return self.layer.get_parameter("weight")

    def effective(self, base: Tensor, trained: Tensor) -> Tensor:
        """Return the layer's own weight."""
        return base

    def project(self, rows: Tensor) -> Tensor:
        """Return the rows: all of the gradient is formed before it is thinned out."""
        return rows

    def grad(self, outer: OuterProduct) -> Tensor:
        """Return the gradient in the weight's shape, dense in memory, mostly zero."""
        grad = keep_entries(outer.dense(), self.keep_ratio)
        return grad.t() if is_conv1d(self.layer) else grad


class ThinnedLinears(SwapConversion):
    """Linears whose gradients are thinned out, by hooks or in a module that stands for each."""

    def __init__(self, swaps: Sequence[Swap], handles: Sequence[RemovableHandle]) -> None:
        super().__init__(swaps)
        self._handles = list(handles)

    def undo(self) -> None:
        """Take hooks and modules out again."""
        while self._handles:
            self._handles.pop().remove()
        super().undo()


def _convert(
    model: nn.Module, sites: list[Site], config: MeProp, runtime: Runtime
) -> ThinnedLinears:
    if config.variant != "weight":
        thin = partial(_thin_out, config.keep_ratio, runtime)
        return ThinnedLinears([], [site.module.register_forward_hook(thin) for site in sites])
    entries = [LargestEntries(site.module, config.keep_ratio) for site in sites]
    twins = [converted(e.layer, runtime, subspace=e) for e in entries]
    names = [site.name for site in sites]
    return ThinnedLinears(swap_all(model, zip(names, twins, strict=True)), [])


register(
    MethodSpec(
        config=MeProp,
        axis="trained",
        roles=("linear",),
        summary="back-propagate only the largest entries of each linear's output gradient",
        source="Sun et al., ICML 2017, arXiv 1706.06197",
        convert=_convert,
        default_sites=lambda site, config: site.block is not None,
        trains_weight=True,
        identity_options={"keep_ratio": 1.0},
        test_options={"keep_ratio": 0.25},
    )
)
