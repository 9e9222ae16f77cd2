"""The only code that puts a module into a model or takes it out."""

from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from leantune.errors import SiteError
from leantune.ops.linear import linear
from leantune.ops.stores import ActivationStore, Draw, ExactStore, GradientCut, GradientRule


@dataclass
class Swap:
    """One module put in another's place; ``undo`` puts the very same object back.

    A new module that changed the parameters it shares with the old one (their order, say) takes
    that back in a ``restore()`` of its own.
    """

    parent: nn.Module
    attribute: str
    old: nn.Module
    new: nn.Module

    def undo(self) -> None:
        """Put the old module back, in the training mode that the new one is in."""
        restore = getattr(self.new, "restore", None)
        if restore is not None:
            restore()
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
    """An ``nn.Linear`` whose weight gradient comes from what its store kept of the input.

    With a ``rule``, the parameter ``trained`` is trained in the weight's stead (the weight itself,
    where there is none); output and input gradient are still those of ``weight``. With a ``cut``,
    all gradients come from what it leaves of the output's.
    """

    store: ActivationStore = ExactStore()
    draws: DrawSource
    rule: GradientRule | None = None
    cut: GradientCut | None = None
    trained: nn.Parameter

    def forward(self, input):
        """Return the plain linear's output, (..., d_out)."""
        return _stored_forward(self, input, self.weight)


class StoredConv1D(nn.Module):
    """transformers' ``Conv1D`` (weight (d_in, d_out)) with a store, as :class:`StoredLinear`."""

    weight: nn.Parameter
    bias: nn.Parameter
    store: ActivationStore = ExactStore()
    draws: DrawSource
    rule: GradientRule | None = None
    cut: GradientCut | None = None
    trained: nn.Parameter

    def forward(self, x):
        """Return the plain layer's output, (..., d_out)."""
        return _stored_forward(self, x, self.weight.t())


def _stored_forward(layer: StoredLinear | StoredConv1D, x: Tensor, weight: Tensor) -> Tensor:
    rule, trained = layer.rule, layer._parameters.get("trained")
    draw = layer.draws.draw_for(weight if trained is None else trained) if layer.training else None
    if draw is not None:
        if rule is not None and trained is None:
            trained, weight = weight, weight.detach()
        return linear(x, weight, layer.bias, layer.store, draw, trained, rule, layer.cut)
    if trained is not None and trained.requires_grad and torch.is_grad_enabled():
        # Nothing is sampled here, but the rule's parameter has a gradient all the same.
        return linear(x, weight, layer.bias, _EXACT, None, trained, rule)
    return F.linear(x, weight, layer.bias)


_EXACT = ExactStore()


def with_store(old: nn.Module, store: ActivationStore, draws: DrawSource) -> nn.Module:
    """Return ``old``'s twin that keeps for backward what ``store`` chooses."""
    new = _stored(old, draws)
    new.store = store
    return new


def with_rule(
    old: nn.Module,
    trained: nn.Parameter | None,
    rule: GradientRule,
    draws: DrawSource,
    kind: type[nn.Module] | None = None,
) -> nn.Module:
    """Return ``old``'s twin that trains ``trained`` in its weight's stead.

    ``trained`` joins the parameters, which the twin shares with ``old``: take it out of them before
    ``old`` comes back. The weight, which must be frozen, stays the same object. None trains the
    weight itself, through the rule.

    Args:
        kind: the twin's class, where it evaluates its output another way.
    """
    new = _stored(old, draws, kind)
    if trained is not None:
        new.trained = trained
    new.rule = rule
    return new


def with_cut(old: nn.Module, cut: GradientCut, draws: DrawSource) -> nn.Module:
    """Return ``old``'s twin that keeps only what ``cut`` leaves of the output's gradient."""
    new = _stored(old, draws)
    new.cut = cut
    return new


def stand_ins(model: nn.Module) -> list[nn.Parameter]:
    """Return the parameters that are trained in a weight's stead."""
    layers = [m for m in model.modules() if isinstance(m, StoredLinear | StoredConv1D)]
    return [m._parameters["trained"] for m in layers if "trained" in m._parameters]  # type: ignore[misc]


def _stored(old: nn.Module, draws: DrawSource, kind: type[nn.Module] | None = None) -> Any:
    if kind is not None:
        pass
    elif isinstance(old, StoredLinear | StoredConv1D):
        kind = type(old)
    else:
        kind = StoredLinear if isinstance(old, nn.Linear) else StoredConv1D
    new = adopt(old, kind)
    new.draws = draws
    return new
