"""A model whose plain modules compute something else is not saved as if they did not."""

import inspect
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from leantune.core.conversion import Conversion
from leantune.core.linear import share_parameters_as
from leantune.errors import UnsupportedError

_NAME = "save_pretrained"


class _Saving:
    """A saving stands on one model, before its class's ``save_pretrained``."""

    def __init__(self, model: nn.Module, conversions: Sequence[Conversion]) -> None:
        self._model, self._conversions = model, conversions
        self.own = vars(model).get(_NAME)
        self.checkpoints: str | None = None

    @torch.no_grad()
    def __call__(self, save_directory: str | Path, *args: Any, **options: Any) -> Any:
        """Save the plain model that merging would give, or a run's checkpoint as it is.

        Raises:
            UnsupportedError: there is no such model, or the class can save no other's state.
        """
        twin = share_parameters_as(type(self._model), self._model)
        save = self.own or getattr(type(twin), _NAME).__get__(twin)
        folder = str(Path(save_directory).resolve())
        if self.checkpoints is not None and folder.startswith(self.checkpoints):
            return save(save_directory, *args, **options)
        can_merge = all(conversion.can_merge for conversion in self._conversions)
        if not can_merge or "state_dict" not in inspect.signature(save).parameters:
            raise UnsupportedError(
                "save_pretrained: model must compute what its plain modules do, got one converted "
                "by a method that the files would lack; keep it with session.save(folder), or call "
                f"session.{'merge' if can_merge else 'remove'}() first to save the plain one"
            )
        state = dict(options.pop("state_dict", None) or self._model.state_dict())
        for conversion in reversed(self._conversions):
            conversion.merge_state(state, twin)
        return save(save_directory, *args, state_dict=state, **options)


def writes_plain(conversions: Sequence[Conversion]) -> bool:
    """Return whether a model's own files, an adapter's among them, compute what the model does."""
    return all((c.can_merge or c.is_adapter) and c.is_plain for c in conversions)


def take_over_saving(model: nn.Module, conversions: Sequence[Conversion]) -> None:
    """Let ``save_pretrained`` write merged weights from now on, or refuse where there are none.

    Args:
        model: a converted model; one without that method, or whose own is right, stays as it is.
        conversions: what was done to it.
    """
    if hasattr(model, _NAME) and not writes_plain(conversions):
        vars(model)[_NAME] = _Saving(model, conversions)


def give_back_saving(model: nn.Module) -> None:
    """Give a model its own ``save_pretrained`` back, unless others have replaced it since."""
    taken = vars(model).get(_NAME)
    if isinstance(taken, _Saving):
        del vars(model)[_NAME]
        if taken.own is not None:
            vars(model)[_NAME] = taken.own


def allow_checkpoints(model: nn.Module, prefix: str) -> None:
    """Let the model's ``save_pretrained`` write a run's checkpoints, whatever the methods.

    Args:
        model: a converted model.
        prefix: how their absolute paths begin. Whoever calls this sees to it that only a resumed
            run can read them.
    """
    taken = vars(model).get(_NAME)
    if isinstance(taken, _Saving):
        taken.checkpoints = prefix
