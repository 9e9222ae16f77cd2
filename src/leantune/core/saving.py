"""A model whose plain modules compute something else is not saved as if they did not."""

from pathlib import Path
from typing import Any

from torch import nn

from leantune.errors import UnsupportedError

_NAME = "save_pretrained"


class RefusedSaving:
    """A refusal stands before a model's ``save_pretrained``, whose files would load as another one.

    It lies on this one object, and leaves it with the session.

    Args:
        model: the converted model.

    Attributes:
        checkpoints: how the paths begin that may be written all the same, since whoever writes them
            sees to it that only a resumed run can read them.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._before = vars(model).get(_NAME)
        self.checkpoints: str | None = None
        vars(model)[_NAME] = self

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
                "session.remove() first to save the plain one"
            )
        save = self._before or getattr(type(self._model), _NAME).__get__(self._model)
        return save(save_directory, *args, **options)

    def lift(self) -> None:
        """Give the model its own ``save_pretrained`` back, unless others have replaced it since."""
        if vars(self._model).get(_NAME) is self:
            del vars(self._model)[_NAME]
            if self._before is not None:
                vars(self._model)[_NAME] = self._before


def allow_checkpoints(model: nn.Module, prefix: str) -> None:
    """Let the model's ``save_pretrained`` write a run's checkpoints, whatever the methods.

    Args:
        model: a converted model.
        prefix: how their absolute paths begin. Whoever calls this sees to it that only a resumed
            run can read them.
    """
    refused = vars(model).get(_NAME)
    if isinstance(refused, RefusedSaving):
        refused.checkpoints = prefix
