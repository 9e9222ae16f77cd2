"""Routed FFN: of the groups that an FFN's hidden units fall into, compute a few for each token.

Source: Gui et al., "SPT: Fine-Tuning Transformer-based Language Models Efficiently with
Sparsification", arXiv 2312.10365. Equations beside names: docs/methods/routed_ffn.md.
"""

from leantune.core.registry import MethodSpec, register
from leantune.methods.routed_ffn.config import RoutedFFN
from leantune.methods.routed_ffn.conversion import convert, refusal
from leantune.methods.routed_ffn.layers import choose_layers

__all__ = ["RoutedFFN", "choose_layers"]

register(
    MethodSpec(
        config=RoutedFFN,
        axis="evaluated",
        roles=("mlp",),
        summary="a router chooses, for each token, a few groups of the FFN's hidden units",
        source="Gui et al., SIGMOD 2024, arXiv 2312.10365",
        convert=convert,
        check=refusal,
        identity_options={"num_active": 4},
        # Reentrant checkpointing cannot carry an auxiliary loss, and tests run under it.
        test_options={"num_groups": 4, "num_active": 2, "balance_weight": 0.0},
    )
)
