"""The only code that puts a module into a model or takes it out."""

from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor, nn
from torch.nn import functional as F

from leantune.errors import SiteError
from leantune.ops.linear import linear
from leantune.ops.stores import ActivationStore, Draw


@dataclass
class Swap:
    """One module put in another's place; ``undo`` puts the very same object back."""

    parent: nn.Module
    attribute: str
    old: nn.Module
    new: nn.Module

    def undo(self) -> None:
        """Put the old module back, in the training mode that the new one is in."""
        self.old.train(self.new.training)
        setattr(self.parent, self.attribute, self.old)

    def merge(self) -> None:
        """Let the new module fold what it trained into the old one, then put the old one back."""
        fold = getattr(self.new, "merge", None)
        if fold is not None:
            fold()
        self.undo()


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


def adopt(old: nn.Module, kind: type[nn.Module]) -> Any:
    """Return a ``kind`` that shares everything with ``old``: parameters, buffers, hooks, flags.

    The dictionaries themselves are shared, so a parameter replaced later in one (as sharding
    does) is replaced in both, and ties and optimiser references survive.
    """
    new = kind.__new__(kind)
    new.__dict__.update(old.__dict__)
    return new


class DrawSource(Protocol):
    """Hands a linear the random numbers of the current forward; the session is one."""

    def draw_for(self, weight: Tensor) -> Draw | None:
        """Return the current draw, or None where the plain linear should run."""
        ...


class StoredLinear(nn.Linear):
    """An ``nn.Linear`` whose weight gradient comes from what its store kept of the input."""

    store: ActivationStore
    draws: DrawSource

    def forward(self, input):
        """Return the plain linear's output, (..., d_out)."""
        draw = self.draws.draw_for(self.weight) if self.training else None
        if draw is None:
            return F.linear(input, self.weight, self.bias)
        return linear(input, self.weight, self.bias, self.store, draw)


class StoredConv1D(nn.Module):
    """transformers' ``Conv1D`` (weight (d_in, d_out)) with a store, as :class:`StoredLinear`."""

    weight: nn.Parameter
    bias: nn.Parameter
    store: ActivationStore
    draws: DrawSource

    def forward(self, x):
        """Return the plain layer's output, (..., d_out)."""
        draw = self.draws.draw_for(self.weight) if self.training else None
        if draw is None:
            return F.linear(x, self.weight.t(), self.bias)
        return linear(x, self.weight.t(), self.bias, self.store, draw)


def with_store(old: nn.Module, store: ActivationStore, draws: DrawSource) -> nn.Module:
    """Return ``old``'s twin that keeps for backward what ``store`` chooses."""
    new = adopt(old, StoredLinear if isinstance(old, nn.Linear) else StoredConv1D)
    new.store = store
    new.draws = draws
    return new
