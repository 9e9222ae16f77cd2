"""The converted linear, and the only code that puts a module into a model or takes it out."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TypeVar, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from leantune.core.runtime import Runtime
from leantune.errors import SiteError
from leantune.ops.codec import EXACT, Codec
from leantune.ops.linear import TrainedSubspace, linear
from leantune.ops.rows import RowPolicy

M = TypeVar("M", bound=nn.Module)


@dataclass
class Swap:
    """One module stands in another's place; ``undo`` puts the very same object back."""

    parent: nn.Module
    attribute: str
    old: nn.Module
    new: nn.Module

    def undo(self) -> None:
        """Put the old module back, in the training mode that the new one is in."""
        self.old.train(self.new.training)
        setattr(self.parent, self.attribute, self.old)


def swap(model: nn.Module, name: str, new: nn.Module) -> Swap:
    """Put ``new`` in the place of the module called ``name``.

    Raises:
        SiteError: ``name`` is the root, which nothing holds.
    """
    if not name:
        raise SiteError(
            "swap: name must be a module inside the model, got the model itself; wrap it in a "
            "module of your own, or apply the method to its children"
        )
    parent_name, _, attribute = name.rpartition(".")
    parent = model.get_submodule(parent_name)
    old = model.get_submodule(name)
    setattr(parent, attribute, new)
    return Swap(parent, attribute, old, new)


def swap_all(model: nn.Module, twins: Iterable[tuple[str, nn.Module]]) -> list[Swap]:
    """Put each module in the place of the one of its name; on an error all come out again."""
    swaps: list[Swap] = []
    try:
        for name, new in twins:
            swaps.append(swap(model, name, new))
    except BaseException:
        for done in reversed(swaps):
            done.undo()
        raise
    return swaps


def share_parameters_as(cls: type[M], old: nn.Module) -> M:
    """Return a ``cls`` that shares everything with ``old``: parameters, buffers, hooks, flags.

    The dictionaries themselves are shared, so a parameter replaced later in one (as sharding
    does) is replaced in both, and ties and optimiser references survive.
    """
    new = cls.__new__(cls)
    new.__dict__.update(old.__dict__)
    return new


class ConvertedLinear(nn.Linear):
    """A converted linear is an ``nn.Linear`` whose weight gradient comes from what was kept.

    Forward is the plain linear's. Which rows of the input are kept, in how many bits, and which
    parameter trains are three independent choices, so that methods combine without code for pairs.
    """

    runtime: Runtime
    rows: RowPolicy | None = None
    codec: Codec = EXACT
    subspace: TrainedSubspace | None = None

    def forward(self, input: Tensor) -> Tensor:
        """Return the plain linear's output, (..., d_out)."""
        return _forward(self, input, self.weight)


class ConvertedConv1D(nn.Module):
    """A converted ``Conv1D`` (weight (d_in, d_out)) does the same as a converted linear."""

    weight: nn.Parameter
    bias: nn.Parameter
    runtime: Runtime
    rows: RowPolicy | None = None
    codec: Codec = EXACT
    subspace: TrainedSubspace | None = None

    def forward(self, x: Tensor) -> Tensor:
        """Return the plain layer's output, (..., d_out)."""
        return _forward(self, x, self.weight.t())


Converted = ConvertedLinear | ConvertedConv1D


def _forward(layer: Converted, x: Tensor, weight: Tensor) -> Tensor:
    subspace, runtime = layer.subspace, layer.runtime
    trained = weight if subspace is None else subspace.parameter
    if trained.requires_grad and torch.is_grad_enabled():
        if layer.training and not runtime.is_exact:
            key = None if layer.rows is None else runtime.key(weight.device)
            return linear(
                x,
                weight,
                layer.bias,
                rows=layer.rows,
                codec=layer.codec,
                key=key,
                subspace=subspace,
            )
        if subspace is not None and trained is not layer.weight:
            # Nothing is sampled here, but the trained parameter has a gradient all the same.
            return linear(x, weight, layer.bias, subspace=subspace)
    return F.linear(x, weight, layer.bias)


def converted(
    old: nn.Module,
    runtime: Runtime,
    *,
    rows: RowPolicy | None = None,
    codec: Codec | None = None,
    subspace: TrainedSubspace | None = None,
    cls: type[nn.Module] | None = None,
) -> Converted:
    """Return the twin of a linear that keeps and trains what is asked; what is None stays as it is.

    The twin shares its parameters with ``old``, which may be converted already.

    Args:
        old: an ``nn.Linear``, a ``Conv1D``, or either one converted.
        runtime: of the session.
        rows: which rows of the input are kept.
        codec: in how many bits they are kept.
        subspace: what is trained instead of the weight, which must be frozen unless the subspace
            trains the weight itself. Parameters that it adds to the twin are ``old``'s, too: take
            them out again before ``old`` comes back.
        cls: the twin's class, where it evaluates its output another way.
    """
    if cls is None:
        if isinstance(old, Converted):
            cls = type(old)
        else:
            cls = ConvertedLinear if isinstance(old, nn.Linear) else ConvertedConv1D
    new = cast(Converted, share_parameters_as(cls, old))
    new.runtime = runtime
    if rows is not None:
        new.rows = rows
    if codec is not None:
        new.codec = codec
    if subspace is not None:
        new.subspace = subspace
    return new


def is_linear(module: nn.Module) -> bool:
    """Return whether the module is a plain or converted linear: ``nn.Linear`` or ``Conv1D``.

    Other subclasses are left alone: quantised or otherwise special linears compute something else.
    """
    is_ours = isinstance(module, Converted)
    return is_ours or type(module) is nn.Linear or is_conv1d(module)


def is_conv1d(module: nn.Module) -> bool:
    """Return whether the module is transformers' ``Conv1D``, a linear with a transposed weight.

    Matched with its module path: a class of the same name that is a real convolution is none.
    """
    kind = type(module)
    return kind is ConvertedConv1D or (
        kind.__name__ == "Conv1D" and kind.__module__ == "transformers.pytorch_utils"
    )


def trained_in_place_of_weight(model: nn.Module) -> list[Tensor]:
    """Return the parameters that are trained in place of a linear's weight."""
    layers = [m for m in model.modules() if isinstance(m, Converted)]
    trained = [(m, m.subspace.parameter) for m in layers if m.subspace is not None]
    return [parameter for m, parameter in trained if parameter is not m.weight]
