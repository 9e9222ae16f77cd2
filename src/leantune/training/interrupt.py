"""How a signal ends a run: tidily at once, or in training after the step, with a checkpoint.

Ctrl-C is a signal as well (SIGINT); SIGTERM is what schedulers send, SIGHUP what a terminal sends
that is closed.
"""

import signal
import threading
from collections.abc import Callable, Generator
from contextlib import contextmanager
from types import FrameType
from typing import Any, Self

from transformers import TrainerCallback

_NAMES = ("SIGINT", "SIGTERM", "SIGHUP")
_SIGNALS = [getattr(signal, name) for name in _NAMES if hasattr(signal, name)]

Handler = Callable[[int, FrameType | None], None]


class Interrupted(KeyboardInterrupt):
    """A signal has ended the run.

    Args:
        number: of the signal; a command ends with 128 + ``number``.
    """

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.number = number


def _raise(number: int, *_: FrameType | None) -> None:
    raise Interrupted(number)


# Handlers that an application has put there itself keep their say, and ``nohup`` keeps its own.
_OURS_OR_DEFAULT = (signal.SIG_DFL, signal.default_int_handler, _raise)


@contextmanager
def handled_by(handler: Handler = _raise) -> Generator[None]:
    """Give the signals that end a process to ``handler`` inside, in the main thread alone.

    By default each raises ``Interrupted``, so that half-written folders are taken away.
    """
    before: dict[int, Any] = {}
    if threading.current_thread() is threading.main_thread():
        for number in _SIGNALS:
            if signal.getsignal(number) in _OURS_OR_DEFAULT:
                before[number] = signal.signal(number, handler)
    try:
        yield
    finally:
        for number, old in before.items():
            signal.signal(number, old)


class StopOnInterrupt(TrainerCallback):
    """End training with a checkpoint at the next step where a signal asks; twice is at once.

    A context manager: inside, the first signal only sets a flag, so that no step and no file is
    left half done; on leaving, ``Interrupted`` is raised if it was set.
    """

    def __init__(self) -> None:
        self._asked: int | None = None
        self._handled = handled_by(self._ask)

    def __enter__(self) -> Self:
        self._handled.__enter__()
        return self

    def __exit__(self, kind: type[BaseException] | None, *args: Any) -> None:
        self._handled.__exit__(None, None, None)
        if self._asked is not None and kind is None:
            raise Interrupted(self._asked)

    def _ask(self, number: int, *_: FrameType | None) -> None:
        if self._asked is not None:
            raise Interrupted(number)
        self._asked = number

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._asked is not None:
            # The log in between keeps the losses since the last one, which no checkpoint holds.
            control.should_log = control.should_save = control.should_training_stop = True

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._asked is not None and not state.epoch.is_integer():
            control.should_evaluate = control.should_save = False
        # An evaluation moves the random stream: this step's checkpoint has to come after it.
        elif control.should_evaluate:
            control.should_save = True
