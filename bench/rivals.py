"""What others train a matrix with at a small price in state: GaLore, APOLLO and PEFT's SHiRA.

GaLore and APOLLO are in ``apollo-torch``, which asks for ``bitsandbytes``; both are no dependencies
(``make bench-sparse-grad`` fetches them).
"""

import re
from typing import Any

import torch
from torch import nn

PROJECTED: dict[str, dict[str, Any]] = {
    # As GaLore's own recipe for GLUE has them, but for fewer steps between two projections.
    "GaLore": {"proj_type": "std", "scale": 4.0},
    "APOLLO": {"proj_type": "std", "scale": 1.0, "proj": "random", "scale_type": "channel"},
}
"""Optimiser -> its options for matrices whose moments it keeps in few dimensions."""


def projected(
    kind: str, model: nn.Module, matrices: str, *, rank: int, num_steps: int = 50, **options: Any
) -> torch.optim.Optimizer:
    """Return an AdamW that keeps the moments of some matrices in ``rank`` dimensions.

    Args:
        kind: of ``PROJECTED``.
        matrices: a regular expression; parameters in whose names it is found are projected.
        num_steps: between two choices of the projection.
        options: of the optimiser.

    Source: Zhao et al., "GaLore", arXiv 2403.03507; Zhu et al., "APOLLO", arXiv 2412.05270.
    """
    import apollo_torch  # type: ignore[import-not-found]

    groups: dict[bool, list[nn.Parameter]] = {True: [], False: []}
    for name, p in model.named_parameters():
        if p.requires_grad:
            groups[bool(re.search(matrices, name))].append(p)
    how = {**PROJECTED[kind], "rank": rank, "update_proj_gap": num_steps}
    made = getattr(apollo_torch, f"{kind}AdamW")
    return made([{"params": groups[False]}, {"params": groups[True], **how}], **options)


def shira(model: nn.Module, matrices: str, *, rank: int, seed: int = 0) -> None:
    """Let PEFT train a random sparse change of some matrices, and freeze these alone.

    Args:
        matrices: as for :func:`projected`.
        rank: a matrix (d_out, d_in) gets ``rank (d_out + d_in)`` trained entries, as LoRA's has.

    Source: Bhardwaj et al., "Sparse High Rank Adapters", arXiv 2406.13175.
    """
    from peft import ShiraConfig, inject_adapter_in_model

    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    targets = [n.removesuffix(".weight") for n in trained if re.search(matrices, n)]
    inject_adapter_in_model(ShiraConfig(r=rank, target_modules=targets, random_seed=seed), model)
    for name, p in model.named_parameters():
        if name in trained:
            p.requires_grad_(True)
