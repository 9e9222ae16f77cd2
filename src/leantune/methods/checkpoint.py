"""Gradient checkpointing of blocks or their parts: keep the input, run them again in backward.

Source: Chen, Xu, Zhang and Guestrin, "Training Deep Nets with Sublinear Memory Cost", 2016; the
work is done by ``torch.utils.checkpoint`` in its non-reentrant form.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.autograd.graph import save_on_cpu
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint

from leantune.core.config import MethodConfig, option
from leantune.core.conversion import Conversion
from leantune.core.discovery import checkpoints_itself
from leantune.core.linear import Ownership
from leantune.core.registry import MethodSpec, register
from leantune.core.runtime import Runtime
from leantune.core.sites import Site, is_nested
from leantune.errors import ConfigError, UnsupportedError, shown

_FLAGS = ("gradient_checkpointing", "_gradient_checkpointing_func")
_BLOCK = ("block",)
_CHOICES = (_BLOCK, ("mlp",), ("attention",), ("mlp", "attention"), ("attention", "mlp"))


@dataclass(frozen=True, kw_only=True)
class Checkpoint(MethodConfig):
    """Checkpointing recomputes chosen blocks, or parts of them, in backward; exact, for more time.

    What is recomputed keeps its input alone, and does without its last product the second time.
    ``sites`` chooses blocks, ``parts`` what of them.
    """

    method: ClassVar[str] = "checkpoint"
    own_rules: ClassVar[Mapping[str, str]] = {
        **MethodConfig.own_rules,
        "parts": "'block', 'mlp', 'attention' or a list of the latter two",
    }

    parts: tuple[str, ...] = option(
        _BLOCK,
        help="what of each block is recomputed: all of it, its MLP, its attention, or both of "
        "these, each by itself",
    )
    offload: bool = option(
        False, help="whether kept inputs that are on a GPU wait in host memory for backward"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        given: Any = (self.parts,) if isinstance(self.parts, str) else self.parts
        names = tuple(given) if isinstance(given, Sequence) else ()
        if names not in _CHOICES:
            raise ConfigError(
                f"Checkpoint: parts must be {self.own_rules['parts']}, got {shown(self.parts)}; "
                "leave it out to recompute whole blocks"
            )
        object.__setattr__(self, "parts", names)


class CheckpointedBlocks(Conversion):
    """Blocks, or parts of them, that are recomputed from now on, and how they stood before."""

    def __init__(self, config: Checkpoint, runtime: Runtime) -> None:
        self._run = _run_offloaded if config.offload else _run
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
        self._replace_forward(block, partial(_forward_of_block, name, block, _forward(block)))

    def recompute(self, block: Site, site: Site) -> None:
        """Recompute an attention or an FFN wherever its block is not recomputed as a whole."""
        first, *others = _modules(block, site)
        forwards = list(map(_forward, (first, *others)))
        part = _Part(site.whole, first, block.module, forwards, self._run, self._runtime)
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


@dataclass(eq=False)
class _Part:
    """The forward of a part's first module computes the whole part, now and again in backward.

    Args:
        name: of the first module.
        module: the first module.
        block: around it; its flag says that all of it is recomputed anyway.
        forwards: of the first module and of those that the block calls after it.
        run: runs a function now and again in backward.
        runtime: says whether the part is recomputed still.
        made: what the whole part returned, until the last of its modules has handed it on.
    """

    name: str
    module: nn.Module
    block: nn.Module
    forwards: Sequence[Callable[..., Any]]
    run: Callable[..., Any]
    runtime: Runtime
    made: Any = None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self.made = None
        is_on = self.name in self.runtime.recomputed and _trains(self.module)
        if not is_on or getattr(self.block, "gradient_checkpointing", False):
            return self.forwards[0](*args, **kwargs)
        output = _run_by_place(self.run, self.name, self._compute, args, kwargs)
        self.made = output if len(self.forwards) > 1 else None
        return output

    def _compute(self, *args: Any, **kwargs: Any) -> Any:
        output = self.forwards[0](*args, **kwargs)
        for forward in self.forwards[1:]:
            output = forward(output)
        return output

    def hand_on(self, place: int, x: Tensor) -> Tensor:
        """Return what is computed already, as the forward of the module at a place after 0."""
        if self.made is None:
            return self.forwards[place](x)
        if x is not self.made:
            raise UnsupportedError(
                f"Checkpoint: {self.name} must be followed by the rest of its MLP, got another "
                "operation in between; recompute the whole block with parts='block'"
            )
        if place == len(self.forwards) - 1:
            self.made = None
        return x


def _convert(
    model: nn.Module, sites: list[Site], config: Checkpoint, runtime: Runtime
) -> CheckpointedBlocks:
    """Switch on transformers' own checkpointing block by block, and give others the same."""
    blocks = CheckpointedBlocks(config, runtime)
    if config.parts != _BLOCK:
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


_run = partial(checkpoint, use_reentrant=False)


def _run_offloaded(function: Callable[..., Any], *args: Any) -> Any:
    """Run a function now and again in backward; on a GPU its inputs wait in host memory."""
    device = next((arg.device.type for arg in args if isinstance(arg, Tensor)), "cpu")
    if device == "cpu":
        return _run(function, *args)
    with save_on_cpu(pin_memory=True, device_type=device):
        return _run(function, *args)


def _forward(module: nn.Module) -> Callable[..., Any]:
    """Return a module's forward as it is now; unpickled, a bound method would be the one after."""
    return vars(module).get("forward") or partial(type(module).forward, module)


def _forward_of_block(
    name: str, block: nn.Module, forward: Callable[..., Any], *args: Any, **kwargs: Any
) -> Any:
    """Run a block's forward, to be run once more in backward while its flag is set."""
    if not (getattr(block, "gradient_checkpointing", False) and _trains(block)):
        return forward(*args, **kwargs)
    run: Callable[..., Any] = block._gradient_checkpointing_func  # type: ignore[assignment]
    return _run_by_place(run, name, forward, args, kwargs)


def _trains(module: nn.Module) -> bool:
    return module.training and torch.is_grad_enabled()


def _run_by_place(
    run: Callable[..., Any],
    name: str,
    forward: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
) -> Any:
    """Run a forward twice, all its arguments by place: by name none would be saved for backward."""

    def by_name(*values: Any) -> Any:
        return forward(*values[len(kwargs) :], **dict(zip(kwargs, values, strict=False)))

    # A second run would write into a cache again. One that is empty changes no output.
    values = [_without_cache(name, value) for value in (*kwargs.values(), *args)]
    return run(by_name, *values)


def _without_cache(name: str, value: Any) -> Any:
    """Return an argument as it is, and None for an empty cache of keys and values."""
    if not hasattr(value, "get_seq_length"):
        return value
    length = value.get_seq_length()
    if length:
        raise UnsupportedError(
            f"Checkpoint: {name} must be called without a cache of keys while it trains, "
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


def _check(site: Site, config: Checkpoint) -> str | None:
    if config.parts == _BLOCK:
        return None if checkpoints_itself(site.module) else _why_not([site.module])
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
        needs_parts=lambda config: config.parts != _BLOCK,
    )
)
