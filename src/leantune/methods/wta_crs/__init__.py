"""WTA-CRS: keep a few rows of each linear's input, chosen so that the weight gradient is unbiased.

Source: Liu et al., "Winner-Take-All Column Row Sampling for Memory Efficient Adaptation of
Language Model", arXiv 2305.15265.
"""

from leantune.core.adapters import is_second_factor
from leantune.core.registry import MethodSpec, register
from leantune.core.sites import Site
from leantune.methods.wta_crs.config import WTACRS
from leantune.methods.wta_crs.conversion import convert

__all__ = ["WTACRS"]


def _default_sites(site: Site, config: WTACRS) -> bool:
    # The paper keeps LoRA's second factor exact: its input is only `rank` wide.
    is_head = site.is_head_or_embedding
    return site.is_trainable and not is_head and not is_second_factor(site.name)


register(
    MethodSpec(
        config=WTACRS,
        axis="rows",
        roles=("linear",),
        summary="keep a few input rows of each trained linear; the weight gradient stays unbiased",
        source="Liu et al., NeurIPS 2023, arXiv 2305.15265",
        convert=convert,
        default_sites=_default_sites,
        identity_options={"keep_ratio": 1.0},
        test_options={"keep_ratio": 0.3, "min_rows": 2},
    )
)
