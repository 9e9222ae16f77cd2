"""meProp: back-propagate only the largest entries of each linear's output gradient.

Legend: n rows (all leading dimensions flattened), d_out, d_in, k = keep_ratio d_out units.

    "example":  S = each row of G, all but its k largest entries set to zero
    "unified":  S = the k columns of G with the largest sum of magnitudes over the rows
    dW = S^T X,  dX = S W,  db = column sums of S
    "weight":   dX = G W and db as ever, dW = the keep_ratio d_out d_in largest entries of G^T X

Source: Sun, Ren, Ma and Wang, "meProp: Sparsified Back Propagation for Accelerated Deep Learning
with Reduced Overfitting", ICML 2017, arXiv 1706.06197 ("example" and, there called unified top-k,
"unified"). "weight" is what the SparseGrad paper, arXiv 2410.07383, compares with under this name.
Every variant is biased, and nothing of what is dropped is kept for later steps.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from leantune.core.config import MethodConfig, option
from leantune.core.registry import MethodSpec, register
from leantune.core.session import Session
from leantune.core.sites import Site
from leantune.core.swap import with_cut, with_rule
from leantune.ops.stores import Cut, Factors, grad_weight


@dataclass(frozen=True, kw_only=True)
class MeProp(MethodConfig):
    """Keep ``keep_ratio`` of each linear's output gradient, by magnitude; forward is exact.

    Weight, bias and input gradient all come from what is kept, so lower layers see a thinner
    gradient, too. Any optimiser steps the dense, mostly zero gradients. Trainable linears inside
    the model's blocks are taken by default; the head stays exact, as in the paper.
    """

    method: ClassVar[str] = "meprop"

    keep_ratio: float = option(0.04, gt=0, le=1, help="share of output units (or entries) kept")
    variant: Literal["example", "unified", "weight"] = option(
        "unified",
        help="what is kept: of each row its own largest units, one set of units for the batch "
        "(which also saves the arithmetic), or the largest entries of the weight's gradient",
    )


@dataclass(frozen=True)
class KeepExample:
    """Keeps each row's own largest entries."""

    keep_ratio: float

    def __call__(self, rows: Tensor) -> Cut:
        """Return ``rows`` (n, d_out) with all but the k largest of each row set to zero."""
        k = count(self.keep_ratio, rows.shape[1])
        if k == rows.shape[1]:
            return Cut(rows)
        kept = rows.abs().topk(k, dim=1, sorted=False).indices
        return Cut(torch.zeros_like(rows).scatter(1, kept, rows.gather(1, kept)))


@dataclass(frozen=True)
class KeepUnits:
    """Keeps one set of output units for the whole batch."""

    keep_ratio: float

    def __call__(self, rows: Tensor) -> Cut:
        """Return the k columns of ``rows`` (n, d_out) with the largest sums, and which they are."""
        k = count(self.keep_ratio, rows.shape[1])
        if k == rows.shape[1]:
            return Cut(rows)
        sums = rows.abs().sum(0, dtype=torch.promote_types(rows.dtype, torch.float32))
        units = sums.topk(k, sorted=False).indices.sort().values
        return Cut(rows.index_select(1, units), units)


@dataclass
class KeepEntries:
    """The rule that keeps the largest entries of a weight's gradient; the rest is zero."""

    keep_ratio: float
    width: int | None = None

    def project(self, rows: Tensor) -> Tensor:
        """Return the rows: all of the gradient is formed before it is thinned out."""
        return rows

    def grad(self, factors: Sequence[Factors]) -> Tensor:
        """Return the gradient (d_out, d_in), dense in memory, ``keep_ratio`` of it not zero."""
        grad = grad_weight(factors)
        flat = grad.flatten()
        k = count(self.keep_ratio, flat.numel())
        if k == flat.numel():
            return grad
        kept = flat.abs().topk(k, sorted=False).indices
        return torch.zeros_like(flat).scatter(0, kept, flat[kept]).view(grad.shape)


def count(keep_ratio: float, total: int) -> int:
    """Return how many of ``total`` are kept: at least one."""
    return max(1, round(keep_ratio * total))


def _build(site: Site, config: MeProp, session: Session) -> nn.Module:
    if config.variant == "weight":
        return with_rule(site.module, None, KeepEntries(config.keep_ratio), session)
    keep = KeepExample if config.variant == "example" else KeepUnits
    return with_cut(site.module, keep(config.keep_ratio), session)


def _check(site: Site, config: MeProp) -> str | None:
    if not site.module.weight.requires_grad:  # type: ignore[union-attr]
        return "the weight must train, got a frozen one; leave it out with sites="
    return None


def _selects(site: Site, config: MeProp) -> bool:
    return site.block is not None and site.module.weight.requires_grad  # type: ignore[union-attr]


register(
    MethodSpec(
        config=MeProp,
        axis="weights",
        roles=("linear",),
        summary="back-propagate only the largest entries of each linear's output gradient",
        source="Sun et al., ICML 2017, arXiv 1706.06197",
        selects=_selects,
        build=_build,
        check=_check,
        neutral={"keep_ratio": 1.0},
        example={"keep_ratio": 0.25},
    )
)
