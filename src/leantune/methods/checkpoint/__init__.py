"""Gradient checkpointing of blocks or their parts: keep the input, run them again in backward.

Source: Chen, Xu, Zhang and Guestrin, "Training Deep Nets with Sublinear Memory Cost", 2016; the
work is done by ``torch.utils.checkpoint`` in its non-reentrant form.
"""

from leantune.core.registry import MethodSpec, register
from leantune.methods.checkpoint.config import BLOCK, Checkpoint
from leantune.methods.checkpoint.conversion import check, convert

__all__ = ["Checkpoint"]

register(
    MethodSpec(
        config=Checkpoint,
        axis="recompute",
        roles=("block",),
        summary="gradient checkpointing: keep each block's input, recompute the rest",
        source="Chen et al., arXiv 1604.06174",
        convert=convert,
        check=check,
        identity_options={},
        needs_parts=lambda config: config.parts != BLOCK,
    )
)
