"""SparseGrad: train MLP weights through about 1 % of their gradient, in a basis where it is sparse.

Source: Chekalina et al., "SparseGrad: A Selective Method for Efficient Fine-tuning of MLP Layers",
EMNLP 2024, arXiv 2410.07383. Equations beside names: docs/methods/sparse_grad.md.
"""

from leantune.core.adapters import is_factor
from leantune.core.registry import MethodSpec, register
from leantune.core.sites import Site
from leantune.methods.sparse_grad.config import SparseGrad
from leantune.methods.sparse_grad.conversion import SparseGradConversion
from leantune.ops import entries as maths

__all__ = ["SparseGrad"]


def _is_mlp(site: Site, config: SparseGrad) -> bool:
    is_mlp = site.part in ("mlp.up", "mlp.gate", "mlp.down")
    return is_mlp and site.tied_to is None and not is_factor(site.name)


def _check(site: Site, config: SparseGrad) -> str | None:
    if getattr(site.module, "subspace", None) is not None:
        return "the weight must be trained directly, got one that another method stands in for"
    d_out, d_in = site.module.get_parameter("weight").shape
    if not maths.num_entries((d_out, d_in), config.density):
        return (
            f"density must leave at least one entry of a {d_out} x {d_in} weight, got "
            f"{config.density}; raise it, or leave the layer out with sites="
        )
    return site.sharing


register(
    MethodSpec(
        config=SparseGrad,
        axis="trained",
        roles=("linear",),
        summary="train about 1 % of each MLP weight, in a basis where its gradient is sparse",
        source="Chekalina et al., EMNLP 2024, arXiv 2410.07383",
        convert=SparseGradConversion,
        default_sites=_is_mlp,
        trains_weight=True,
        check=_check,
        needs_parts=lambda config: True,
        identity_options={"density": 1.0},
        test_options={"density": 0.1, "num_calibration_batches": 2},
    )
)
