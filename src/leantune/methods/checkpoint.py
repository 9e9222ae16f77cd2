"""Gradient checkpointing of blocks: keep a block's input, run it again in backward.

Source: Chen, Xu, Zhang and Guestrin, "Training Deep Nets with Sublinear Memory Cost", 2016; the
work is done by ``torch.utils.checkpoint`` in its non-reentrant form.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint

from leantune.core.config import MethodConfig
from leantune.core.conversion import Conversion
from leantune.core.discovery import checkpoints_itself
from leantune.core.registry import MethodSpec, register
from leantune.core.runtime import Runtime
from leantune.core.sites import Site
from leantune.errors import UnsupportedError

_FLAGS = ("gradient_checkpointing", "_gradient_checkpointing_func")


@dataclass(frozen=True, kw_only=True)
class Checkpoint(MethodConfig):
    """Checkpointing recomputes chosen blocks in backward; exact, for one more forward of each."""

    method: ClassVar[str] = "checkpoint"


class CheckpointedBlocks(Conversion):
    """Blocks that are recomputed from now on, and how they stood before."""

    def __init__(self) -> None:
        self._before: list[tuple[nn.Module, dict[str, Any]]] = []
        self._forwards: list[tuple[nn.Module, Any, Any]] = []

    def switch_on(self, module: nn.Module) -> None:
        """Set the flags with which transformers checkpoints a block."""
        settings: dict[str, Any] = vars(module)
        self._before.append((module, {k: v for k, v in settings.items() if k in _FLAGS}))
        settings["_gradient_checkpointing_func"] = partial(checkpoint, use_reentrant=False)
        settings["gradient_checkpointing"] = True

    def replace_forward(self, name: str, block: nn.Module) -> None:
        """Make a block of any class follow these flags."""
        before = vars(block).get("forward")
        vars(block)["forward"] = ours = partial(_recomputed, name, block, block.forward)
        self._forwards.append((block, before, ours))

    def undo(self) -> None:
        """Put flags and forwards back as they were; what others wrapped since obeys the flags."""
        for module, before in self._before:
            for name in _FLAGS:
                vars(module).pop(name, None)
            vars(module).update(before)
        for block, before, ours in self._forwards:
            if vars(block).get("forward") is ours:
                del block.forward
                vars(block).update({} if before is None else {"forward": before})


def _convert(
    model: nn.Module, sites: list[Site], config: Checkpoint, runtime: Runtime
) -> CheckpointedBlocks:
    """Switch on transformers' own checkpointing block by block, and give others the same."""
    blocks = CheckpointedBlocks()
    for module in [*(site.module for site in sites), *_holders(model, sites)]:
        blocks.switch_on(module)
    for site in sites:
        if not checkpoints_itself(site.module):
            blocks.replace_forward(site.name, site.module)
    return blocks


def _recomputed(
    name: str, block: nn.Module, forward: Callable[..., Any], *args: Any, **kwargs: Any
) -> Any:
    """Run a block's forward, to be run once more in backward while its flag is set."""
    is_on = getattr(block, "gradient_checkpointing", False)
    if not (is_on and block.training and torch.is_grad_enabled()):
        return forward(*args, **kwargs)
    # A recomputed block would write into a cache twice. One that is empty changes no output.
    args = tuple(_without_cache(name, value) for value in args)
    kwargs = {key: _without_cache(name, value) for key, value in kwargs.items()}
    run: Callable[..., Any] = block._gradient_checkpointing_func  # type: ignore[assignment]
    return run(partial(forward, **kwargs), *args)


def _without_cache(name: str, value: Any) -> Any:
    """Return an argument as it is, and None for an empty cache of keys and values."""
    if not hasattr(value, "get_seq_length"):
        return value
    length = value.get_seq_length()
    if length:
        raise UnsupportedError(
            f"Checkpoint: block {name} must be called without a cache of keys while it trains, "
            f"got one that holds {length} tokens; call the model with use_cache=False"
        )
    return None


def _holders(model: nn.Module, sites: list[Site]) -> list[nn.Module]:
    """Return the stacks around transformers' blocks: they hand a block no cache if they know.

    A recomputed block would write its keys into the cache a second time.
    """
    names = [site.name for site in sites if checkpoints_itself(site.module)]
    return [
        module
        for name, module in model.named_modules()
        if "gradient_checkpointing" in vars(module)
        and any(n.startswith(f"{name}." if name else "") and n != name for n in names)
    ]


def _check(site: Site, config: Checkpoint) -> str | None:
    if checkpoints_itself(site.module):
        return None
    for module in site.module.modules():
        if isinstance(module, _BatchNorm) and module.track_running_stats:
            kind = type(module).__name__
            return f"block must have no running statistics, got {kind}, which would count twice"
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
