"""Gradient checkpointing of blocks: keep a block's input, run it again in backward.

Source: Chen, Xu, Zhang and Guestrin, "Training Deep Nets with Sublinear Memory Cost", 2016; the
work is done by ``torch.utils.checkpoint`` in its non-reentrant form.
"""

from dataclasses import dataclass
from functools import partial
from typing import ClassVar

from torch import nn
from torch.utils.checkpoint import checkpoint

from leantune.core.config import MethodConfig
from leantune.core.registry import MethodSpec, register
from leantune.core.session import Session
from leantune.core.sites import Site

_FLAGS = ("gradient_checkpointing", "_gradient_checkpointing_func")


@dataclass(frozen=True, kw_only=True)
class Checkpoint(MethodConfig):
    """Recompute chosen blocks in backward; exact, at the cost of one more forward of each."""

    method: ClassVar[str] = "checkpoint"


@dataclass
class _Switched:
    """Modules whose checkpointing was switched on, and how it stood before."""

    modules: list[tuple[nn.Module, dict]]

    def undo(self) -> None:
        for block, before in self.modules:
            for name in _FLAGS:
                block.__dict__.pop(name, None)
                if name in before:
                    block.__dict__[name] = before[name]

    def merge(self) -> None:
        self.undo()


def _attach(model: nn.Module, sites: list[Site], config: Checkpoint, session: Session) -> _Switched:
    """Switch on transformers' own per-block checkpointing, block by block."""
    modules = [site.module for site in sites] + _holders(model, sites)
    before = [(m, {k: v for k, v in vars(m).items() if k in _FLAGS}) for m in modules]
    for module in modules:
        module._gradient_checkpointing_func = partial(checkpoint, use_reentrant=False)  # type: ignore[assignment]
        module.gradient_checkpointing = True  # type: ignore[assignment]
    return _Switched(before)


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
        axis="saved",
        roles=("block",),
        summary="gradient checkpointing: keep each block's input, recompute the rest",
        source="Chen et al., arXiv 1604.06174",
        attach=_attach,
        check=_check,
        neutral={},
    )
)
