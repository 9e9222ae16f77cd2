"""Forwards that run once more in backward: a block's, and a part's of it."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import save_on_cpu
from torch.utils.checkpoint import checkpoint

from leantune.core.runtime import Runtime
from leantune.errors import UnsupportedError

run = partial(checkpoint, use_reentrant=False)


def run_offloaded(function: Callable[..., Any], *args: Any) -> Any:
    """Run a function now and again in backward; on a GPU its inputs wait in host memory."""
    device = next((arg.device.type for arg in args if isinstance(arg, Tensor)), "cpu")
    if device == "cpu":
        return run(function, *args)
    with save_on_cpu(pin_memory=True, device_type=device):
        return run(function, *args)


@dataclass(eq=False)
class Part:
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


def forward_of(module: nn.Module) -> Callable[..., Any]:
    """Return a module's forward as it is now; unpickled, a bound method would be the one after."""
    return vars(module).get("forward") or partial(type(module).forward, module)


def forward_of_block(
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
