"""A step is one training forward of a model on a batch, and the loss at its end."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, is_dataclass
from typing import Any

import torch
from torch import Tensor, nn

from leantune.core.restore import find_session, restored_afterwards
from leantune.core.tensors import iter_tensors
from leantune.errors import ConfigError, UnsupportedError

Batch = Mapping[str, Any] | Sequence[Any] | Tensor
LossFn = Callable[[Any], Tensor]


@dataclass(frozen=True)
class Step:
    """A step knows a model, the arguments of its forward, and how to read a loss off its output."""

    who: str
    model: nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    loss_fn: LossFn | None = None

    def tensors(self) -> list[Tensor]:
        """Return the tensors of the batch."""
        return list(iter_tensors([self.args, self.kwargs]))

    def forward(self) -> tuple[Any, Tensor]:
        """Run the model and return (output, scalar loss with a graph).

        The auxiliary losses of a converted model are part of the loss, as they are in training.
        """
        output = self.model(*self.args, **self.kwargs)
        loss = _find_loss(self.who, output) if self.loss_fn is None else self.loss_fn(output)
        if not isinstance(loss, Tensor) or not loss.requires_grad:
            raise ConfigError(
                f"{self.who}: loss must be a tensor with a gradient path to a parameter, got "
                f"{_describe(loss)}; unfreeze a parameter, pass labels in the batch, or return "
                f"a differentiable tensor from {type(self.model).__name__}"
            )
        loss = loss.sum()
        auxiliary = getattr(find_session(self.model), "auxiliary_loss", None)
        extra = auxiliary() if auxiliary is not None else None
        if isinstance(extra, Tensor) and extra.requires_grad:
            loss = loss + extra.to(loss.device)
        return output, loss


def make_step(who: str, model: nn.Module, batch: Batch, loss_fn: LossFn | None = None) -> Step:
    """Check a model and a batch and bring the batch into the form of a call.

    Args:
        who: function that speaks in error messages.
        model: on a real device.
        batch: keyword arguments, positional arguments, or the only argument.
        loss_fn: output -> scalar; by default the loss is found in the output.

    Raises:
        UnsupportedError: the model has parameters or buffers on the meta device.
        ConfigError: the batch is empty or of another type.
    """
    named = [*model.named_parameters(), *model.named_buffers()]
    on_meta = [name for name, tensor in named if tensor.is_meta]
    if on_meta:
        raise UnsupportedError(
            f"{who}: model must be on a real device, got {len(on_meta)} tensors on meta (first: "
            f"{on_meta[0]}); load the weights, or call model.to_empty(device=...)"
        )
    if isinstance(batch, Tensor):
        args, kwargs = (batch,), {}
    elif isinstance(batch, Mapping):
        args, kwargs = (), dict(batch)
    elif isinstance(batch, (list, tuple)):
        args, kwargs = tuple(batch), {}
    else:
        raise ConfigError(
            f"{who}: batch must be a mapping, a tuple or a tensor, got {type(batch).__name__}; "
            f"pass what the model is called with"
        )
    tensors = list(iter_tensors([args, kwargs]))
    if not tensors or all(t.numel() == 0 for t in tensors):
        shapes = [tuple(t.shape) for t in tensors]
        raise ConfigError(
            f"{who}: batch must hold at least one non-empty tensor, got {type(batch).__name__} "
            f"with tensor shapes {shapes}; pass one batch of the training data"
        )
    return Step(
        who, model, tuple(map(_cut, args)), {k: _cut(v) for k, v in kwargs.items()}, loss_fn
    )


def _cut(value: Any) -> Any:
    # The graph above a batch belongs to the caller: a backward through it would free it.
    if isinstance(value, Tensor) and value.grad_fn is not None:
        return value.detach().requires_grad_()
    return value


def _find_loss(who: str, output: Any) -> Any:
    loss = output.get("loss") if isinstance(output, Mapping) else getattr(output, "loss", None)
    if loss is not None:
        return loss
    parts = vars(output) if is_dataclass(output) else output
    floating = [t for t in iter_tensors(parts) if t.is_floating_point() and t.requires_grad]
    if not floating:
        raise ConfigError(
            f"{who}: output must hold a differentiable tensor, got {_describe(output)}; unfreeze a "
            f"parameter, or check that the forward does not run under torch.no_grad()"
        )
    for tensor in floating:
        if tensor.dim() == 0:
            return tensor
    return torch.stack([t.sum().to(floating[0]) for t in floating]).sum()


def _describe(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"a {value.dtype} tensor of shape {tuple(value.shape)} without a graph"
    return type(value).__name__


def calibration_step(who: str, model: nn.Module, batch: Batch) -> None:
    """Run one forward and backward in training mode and leave no trace of it.

    Training flags, gradients, buffers, generator states and the session of a converted model are
    afterwards as before; what hooks, stores and rules saw of it stays with them.

    Args:
        who: speaks in error messages.
        model: on a real device.
        batch: keyword arguments, positional arguments or the only argument of the model.

    Raises:
        ConfigError: the batch is empty, or the output has no differentiable tensor.
    """
    step = make_step(who, model, batch)
    with restored_afterwards(model, step.tensors()), torch.enable_grad():
        model.train()
        _, loss = step.forward()
        torch.autograd.backward(loss)
