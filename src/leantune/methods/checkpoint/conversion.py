"""A model whose blocks, or parts of them, are recomputed."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from leantune.core.adapters import not_repeatable
from leantune.core.conversion import Conversion
from leantune.core.discovery import checkpoints_itself
from leantune.core.linear import Ownership
from leantune.core.runtime import Runtime
from leantune.core.sites import Site, is_nested
from leantune.methods.checkpoint.config import BLOCK, Checkpoint
from leantune.methods.checkpoint.recompute import (
    Part,
    forward_of,
    forward_of_block,
    run,
    run_offloaded,
)

_FLAGS = ("gradient_checkpointing", "_gradient_checkpointing_func")


class CheckpointedBlocks(Conversion):
    """Blocks, or parts of them, that are recomputed from now on, and how they stood before."""

    def __init__(self, config: Checkpoint, runtime: Runtime) -> None:
        self._run = run_offloaded if config.offload else run
        self._runtime = runtime
        self._parts: set[str] = set()
        self._before: list[tuple[nn.Module, dict[str, Any]]] = []
        self._forwards: list[tuple[nn.Module, Any, Any]] = []

    def switch_on(self, module: nn.Module) -> None:
        """Set the flags with which transformers checkpoints a block."""
        settings: dict[str, Any] = vars(module)
        self._before.append((module, {k: v for k, v in settings.items() if k in _FLAGS}))
        settings["_gradient_checkpointing_func"] = self._run
        settings["gradient_checkpointing"] = True

    def follow_flags(self, name: str, block: nn.Module) -> None:
        """Make a block of any class follow these flags."""
        self._replace_forward(block, partial(forward_of_block, name, block, forward_of(block)))

    def recompute(self, block: Site, site: Site) -> None:
        """Recompute an attention or an FFN wherever its block is not recomputed as a whole."""
        first, *others = _modules(block, site)
        forwards = list(map(forward_of, (first, *others)))
        part = Part(site.whole, first, block.module, forwards, self._run, self._runtime)
        self._replace_forward(first, part)
        for place, module in enumerate(others, start=1):
            self._replace_forward(module, partial(part.hand_on, place))
        self._parts.add(site.whole)
        self._runtime.recomputed.add(site.whole)

    def _replace_forward(self, module: nn.Module, ours: Callable[..., Any]) -> None:
        self._forwards.append((module, vars(module).get("forward"), ours))
        vars(module)["forward"] = ours

    def not_ours(self, owned: Ownership) -> list[str]:
        """Return none: what others have wrapped since stays."""
        for module, _, ours in self._forwards:
            if vars(module).get("forward") is ours:
                owned.restore_forward(module)
        return []

    def undo(self) -> None:
        """Put flags and forwards back; inside what others have wrapped since, ours does nothing."""
        self._runtime.recomputed -= self._parts
        for module, before in self._before:
            for name in _FLAGS:
                vars(module).pop(name, None)
            vars(module).update(before)
        for module, before, ours in self._forwards:
            if vars(module).get("forward") is ours:
                del module.forward
                vars(module).update({} if before is None else {"forward": before})


def convert(
    model: nn.Module, sites: list[Site], config: Checkpoint, runtime: Runtime
) -> CheckpointedBlocks:
    """Switch on transformers' own checkpointing block by block, and give others the same."""
    blocks = CheckpointedBlocks(config, runtime)
    if config.parts != BLOCK:
        for site in sites:
            for part in site.parts:
                if part.role in config.parts:
                    blocks.recompute(site, part)
        return blocks
    for module in [*(site.module for site in sites), *_holders(model, sites)]:
        blocks.switch_on(module)
    for site in sites:
        if not checkpoints_itself(site.module):
            blocks.follow_flags(site.name, site.module)
    return blocks


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


_AFTER_FIRST = ("activation", "hidden_dropout", "down", "output_dropout")
"""What a block may call after the first linear of an MLP that is no module, in this order."""


def _outside(part: Site) -> set[str]:
    """Return the keys of those of a part's modules that its block calls after the first."""
    return {key for key, c in part.children.items() if not is_nested(c.name, part.whole)}


def _modules(block: Site, part: Site) -> list[nn.Module]:
    """Return the module that computes a part, or those that its block calls in turn."""
    first = block.module.get_submodule(part.whole.removeprefix(f"{block.name}."))
    outside = _outside(part)
    return [first, *(part.children[key].module for key in _AFTER_FIRST if key in outside)]


def _is_apart(block: Site, part: Site) -> bool:
    """Return whether some modules compute all of a part, one after the other, and nothing else."""
    outside = _outside(part)
    if outside and not ("activation" in part.children and outside <= {*_AFTER_FIRST}):
        return False
    if any(other.role != part.role and is_nested(other.whole, part.whole) for other in block.parts):
        return False
    # What the table knows of a mixture is the expert that all tokens share.
    names = (name for name, _ in block.module.named_modules())
    return part.role != "mlp" or not any(f".{name}".endswith(".experts") for name in names)


def check(site: Site, config: Checkpoint) -> str | None:
    """Say why a block, or the parts of it that are asked for, cannot be recomputed, or None."""
    if config.parts == BLOCK:
        is_checked = checkpoints_itself(site.module)
        return _adapted(site.module) if is_checked else _why_not([site.module])
    for role in config.parts:
        parts = [part for part in site.parts if part.role == role]
        if not (parts and all(_is_apart(site, part) for part in parts)):
            return (
                f"its {role} must be told from the rest, got {type(site.module).__name__}, where "
                "it cannot; take parts='block' there, or leave it out with sites="
            )
        reasons = (_why_not(_modules(site, part)) for part in parts)
        reason = next((reason for reason in reasons if reason), None)
        if reason is not None:
            return reason
    return None


def _why_not(modules: Sequence[nn.Module]) -> str | None:
    """Say why a module, or several in turn, cannot be recomputed, or None."""
    for module in (inner for outer in modules for inner in outer.modules()):
        if isinstance(module, _BatchNorm) and module.track_running_stats:
            kind = type(module).__name__
            return f"block must have no running statistics, got {kind}, which would count twice"
    before, after = [m._forward_pre_hooks for m in modules], [m._forward_hooks for m in modules]
    if any(before[1:]) or any(after[:-1]):
        return (
            "modules that its block calls in turn must have no hooks, got some, which would see "
            "what they have computed together; take parts='block', or leave it out with sites="
        )
    return next(filter(None, map(_adapted, modules)), None)


def _adapted(module: nn.Module) -> str | None:
    """Say why an adapter in a module keeps it from being recomputed, or None."""
    return next(filter(None, map(not_repeatable, module.modules())), None)
