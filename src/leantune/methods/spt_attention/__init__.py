"""SPT: sparse attention over keys that product quantisation chooses.

Source: Gui, Yan, Yin, Yang and Cheng, "SPT: Fine-Tuning Transformer-based Language Models
Efficiently with Sparsification", arXiv 2312.10365. See docs/methods/spt_attention.md.
"""

from leantune.core.registry import MethodSpec, register
from leantune.methods.spt_attention.config import SPTAttention
from leantune.methods.spt_attention.conversion import SPTConversion, check

register(
    MethodSpec(
        config=SPTAttention,
        axis="evaluated",
        roles=("attention",),
        summary="attention over the keys that product quantisation finds nearest to each query",
        source="Gui et al., SIGMOD 2024, arXiv 2312.10365, section on sparse attention",
        convert=SPTConversion,
        check=check,
        identity_options={"keep_ratio": 1.0},
        test_options={"keep_ratio": 0.25, "min_keys": 3, "subspace_width": 2, "num_codewords": 4},
    )
)

__all__ = ["SPTAttention"]
