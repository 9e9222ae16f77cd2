"""SparseGrad: train MLP weights through about 1 % of their gradient, in a basis where it is sparse.

Source: Chekalina et al., "SparseGrad: A Selective Method for Efficient Fine-tuning of MLP Layers",
EMNLP 2024, arXiv 2410.07383. Equations beside names: docs/methods/sparse_grad.md.
"""

from dataclasses import dataclass
from typing import ClassVar, Literal

from leantune.core.adapters import is_factor
from leantune.core.config import MethodConfig, option
from leantune.core.registry import MethodSpec, register
from leantune.core.sites import Site
from leantune.methods.sparse_grad.conversion import SparseGradConversion


@dataclass(frozen=True, kw_only=True)
class SparseGrad(MethodConfig):
    """SparseGrad trains ``density`` of each MLP weight's entries, where the gradient is sparse.

    The entries of a linear are one ordinary parameter, so that gradients and optimiser state have
    the size of that parameter; forward and input gradient stay the plain linear's. Entries count in
    bases that are found from the gradients of a few batches, which ``session.calibrate`` or the
    trainer callback shows; no weight moves meanwhile. Everything else trains as it did before.
    """

    method: ClassVar[str] = "sparse_grad"

    selection: Literal["block", "step", "fixed"] = option(
        "block",
        help="which entries train: the leading block (which shrinks what backward keeps, too), the "
        "largest of every step, as a sparse gradient (the paper's), or those of the largest mean "
        "square in calibration",
    )
    density: float = option(0.01, gt=0, le=1, help="share of each weight's entries that trains")
    basis: Literal["layer_type", "layer"] = option(
        "layer_type",
        help="who shares a basis: all linears of one part and shape (the paper's), or nobody",
    )
    num_calibration_batches: int = option(30, ge=1, help="batches that the bases are found from")


def _is_mlp(site: Site, config: SparseGrad) -> bool:
    return site.part in ("mlp.up", "mlp.gate", "mlp.down") and not is_factor(site.name)


def _check(site: Site, config: SparseGrad) -> str | None:
    if getattr(site.module, "subspace", None) is not None:
        return "the weight must be trained directly, got one that another method stands in for"
    return None


register(
    MethodSpec(
        config=SparseGrad,
        axis="trained",
        roles=("linear",),
        summary="train about 1 % of each MLP weight, in a basis where its gradient is sparse",
        source="Chekalina et al., EMNLP 2024, arXiv 2410.07383",
        convert=SparseGradConversion,
        default_sites=_is_mlp,
        check=_check,
        identity_options={"density": 1.0},
        test_options={"density": 0.1, "num_calibration_batches": 2},
    )
)
