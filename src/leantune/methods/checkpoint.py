"""Gradient checkpointing of blocks: keep a block's input, run it again in backward.

Source: Chen, Xu, Zhang and Guestrin, "Training Deep Nets with Sublinear Memory Cost", 2016; the
work is done by ``torch.utils.checkpoint`` in its non-reentrant form.
"""

from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

from torch import nn
from torch.utils.checkpoint import checkpoint

from leantune.core.config import MethodConfig
from leantune.core.conversion import Conversion
from leantune.core.registry import MethodSpec, register
from leantune.core.runtime import Runtime
from leantune.core.sites import Site

_FLAGS = ("gradient_checkpointing", "_gradient_checkpointing_func")


@dataclass(frozen=True, kw_only=True)
class Checkpoint(MethodConfig):
    """Checkpointing recomputes chosen blocks in backward; exact, for one more forward of each."""

    method: ClassVar[str] = "checkpoint"


class CheckpointedBlocks(Conversion):
    """Blocks whose own checkpointing was switched on, and how it stood before."""

    def __init__(self, modules: list[nn.Module]) -> None:
        self._before = [(m, {k: v for k, v in vars(m).items() if k in _FLAGS}) for m in modules]
        for module in modules:
            settings: dict[str, Any] = vars(module)
            settings["_gradient_checkpointing_func"] = partial(checkpoint, use_reentrant=False)
            settings["gradient_checkpointing"] = True

    def undo(self) -> None:
        """Put the flags back as they were."""
        for module, before in self._before:
            for name in _FLAGS:
                vars(module).pop(name, None)
            vars(module).update(before)


def _convert(
    model: nn.Module, sites: list[Site], config: Checkpoint, runtime: Runtime
) -> CheckpointedBlocks:
    """Switch on transformers' own per-block checkpointing, block by block."""
    return CheckpointedBlocks([site.module for site in sites] + _holders(model, sites))


def _holders(model: nn.Module, sites: list[Site]) -> list[nn.Module]:
    """Return the stacks around the blocks: they hand a block no cache if they know.

    A recomputed block would write its keys into the cache a second time.
    """
    names = [site.name for site in sites]
    return [
        module
        for name, module in model.named_modules()
        if "gradient_checkpointing" in vars(module)
        and any(n.startswith(f"{name}." if name else "") and n != name for n in names)
    ]


def _check(site: Site, config: Checkpoint) -> str | None:
    if not hasattr(site.module, "gradient_checkpointing"):
        kind = type(site.module).__name__
        return f"module must be a transformers checkpointing layer, got {kind}"
    return None


register(
    MethodSpec(
        config=Checkpoint,
        axis="recompute",
        roles=("block",),
        summary="gradient checkpointing: keep each block's input, recompute the rest",
        source="Chen et al., arXiv 1604.06174",
        convert=_convert,
        check=_check,
        identity_options={},
    )
)
