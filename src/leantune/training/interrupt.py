"""The trainer callback that ends a run with a checkpoint when Ctrl-C is pressed."""

import signal
import threading
from types import FrameType
from typing import Any, Self

from transformers import TrainerCallback


class StopOnInterrupt(TrainerCallback):
    """End training with a checkpoint at the next step where Ctrl-C is pressed; twice is at once.

    A context manager: inside, the main thread's SIGINT only sets a flag, so that no step and no
    file is left half done; on leaving, KeyboardInterrupt is raised if it was set.
    """

    def __init__(self) -> None:
        self._is_asked = False
        self._is_installed = False

    def __enter__(self) -> Self:
        is_main = threading.current_thread() is threading.main_thread()
        # A handler that the application has put there itself keeps its say.
        if is_main and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
            signal.signal(signal.SIGINT, self._ask)
            self._is_installed = True
        return self

    def __exit__(self, kind: type[BaseException] | None, *args: object) -> None:
        if self._is_installed:
            signal.signal(signal.SIGINT, signal.default_int_handler)
        if self._is_asked and kind is None:
            raise KeyboardInterrupt

    def _ask(self, number: int, frame: FrameType | None) -> None:
        self._is_asked = True
        signal.signal(signal.SIGINT, signal.default_int_handler)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._is_asked:
            # The log in between keeps the losses since the last one, which no checkpoint holds.
            control.should_log = control.should_save = control.should_training_stop = True

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._is_asked and not state.epoch.is_integer():
            control.should_evaluate = control.should_save = False
        # An evaluation moves the random stream: this step's checkpoint has to come after it.
        elif control.should_evaluate:
            control.should_save = True
