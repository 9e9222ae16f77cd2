"""A model whose plain modules compute something else is not saved as if they did not."""

from pathlib import Path
from typing import Any

from torch import nn

from leantune.errors import UnsupportedError

_NAME = "save_pretrained"


class _RefusedSaving:
    """A refusal stands on one model, before its class's ``save_pretrained``."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self.own = vars(model).get(_NAME)
        self.checkpoints: str | None = None

    def __call__(self, save_directory: str | Path, *args: Any, **options: Any) -> Any:
        """Save a run's checkpoint; refuse everything else.

        Raises:
            UnsupportedError: the folder is no checkpoint of a run that keeps the session, too.
        """
        folder = str(Path(save_directory).resolve())
        if self.checkpoints is None or not folder.startswith(self.checkpoints):
            raise UnsupportedError(
                "save_pretrained: model must compute what its plain modules do, got one converted "
                "by a method that the files would lack; keep it with session.save(folder), or call "
                "session.merge() or session.remove() first to save the plain one"
            )
        save = self.own or getattr(type(self._model), _NAME).__get__(self._model)
        return save(save_directory, *args, **options)


def refuse_saving(model: nn.Module) -> None:
    """Refuse ``save_pretrained`` from now on: the model that its files give computes another thing.

    Args:
        model: a converted model; one without that method is left as it is.
    """
    if hasattr(model, _NAME):
        vars(model)[_NAME] = _RefusedSaving(model)


def allow_saving(model: nn.Module) -> None:
    """Give a model its own ``save_pretrained`` back, unless others have replaced it since."""
    refused = vars(model).get(_NAME)
    if isinstance(refused, _RefusedSaving):
        del vars(model)[_NAME]
        if refused.own is not None:
            vars(model)[_NAME] = refused.own


def allow_checkpoints(model: nn.Module, prefix: str) -> None:
    """Let the model's ``save_pretrained`` write a run's checkpoints, whatever the methods.

    Args:
        model: a converted model.
        prefix: how their absolute paths begin. Whoever calls this sees to it that only a resumed
            run can read them.
    """
    refused = vars(model).get(_NAME)
    if isinstance(refused, _RefusedSaving):
        refused.checkpoints = prefix
