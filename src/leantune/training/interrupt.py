"""What a signal does to a process: it raises, or it ends the process at once.

Ctrl-C is a signal as well (SIGINT); SIGTERM is what schedulers send, SIGHUP what a terminal sends
that is closed. Nothing here loads a library that takes time.
"""

import os
import signal
import threading
from collections.abc import Callable, Generator
from contextlib import contextmanager
from types import FrameType
from typing import Any

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


def end_process(number: int, *_: FrameType | None) -> None:
    """End the process now: a handler for imports, of which one that is cut off raises anything."""
    os.write(2, b"interrupted\n")
    os._exit(128 + number)


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
