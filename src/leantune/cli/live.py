"""The progress bar of a training run, with a live line of loss, metric, step time and memory."""

import time
from typing import Any

import torch
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
)
from transformers import TrainerCallback

from leantune.measure.text import format_bytes

_SMOOTHING = 0.9


def make_progress(console: Console) -> Progress:
    """Return the display of one bar per run; it shows while a run is training."""
    return Progress(
        TextColumn("[bold]{task.description}"),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TextColumn("{task.fields[line]}"),
        TimeRemainingColumn(compact=True),
        console=console,
        disable=not console.is_terminal,
    )


class LiveCallback(TrainerCallback):
    """Move a bar with each optimiser step and keep its line up to date.

    Where the console is no terminal, one line for each evaluation is printed instead.

    Args:
        progress: where each run gets a bar of its own; stopped between runs.
        main_metric: name of the validation metric to show.
    """

    def __init__(self, progress: Progress, main_metric: str) -> None:
        self._progress, self._main_metric = progress, main_metric
        self._task: TaskID | None = None
        self._shown: dict[str, str] = {}
        self._began = self._step_ms = 0.0

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._shown, self._step_ms = {}, 0.0
        self._progress.start()
        steps: dict[str, Any] = {"total": state.max_steps, "completed": state.global_step}
        self._task = self._progress.add_task(str(args.run_name), line="", **steps)

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._began = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        elapsed_ms = (time.perf_counter() - self._began) * 1e3
        before = self._step_ms or elapsed_ms
        self._step_ms = _SMOOTHING * before + (1 - _SMOOTHING) * elapsed_ms
        self._shown["time"] = f"{self._step_ms:.0f} ms/step"
        if torch.cuda.is_available() and torch.cuda.is_initialized():
            self._shown["peak"] = f"peak {format_bytes(torch.cuda.max_memory_allocated())}"
        self._update(completed=state.global_step)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any, **kwargs: Any) -> None:
        if "loss" in logs:
            self._shown["loss"] = f"loss {float(logs['loss']):.4f}"
            self._update()

    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: Any, **kwargs: Any) -> None:
        # A language model's metric is made of its loss, later.
        name = self._main_metric if f"eval_{self._main_metric}" in metrics else "loss"
        what = "validation loss" if name == "loss" else name
        self._shown["metric"] = f"{what} {metrics[f'eval_{name}']:.4f}"
        self._update()
        if self._progress.disable:
            place = f"{args.run_name}  step {state.global_step}/{state.max_steps}"
            self._progress.console.print(f"{place}  {self._line()}", soft_wrap=True)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        # What is printed between two runs, such as the loading of the next model, stays readable.
        self._progress.stop()

    def _line(self) -> str:
        parts = ("loss", "metric", "time", "peak")
        return "  ".join(self._shown[part] for part in parts if part in self._shown)

    def _update(self, **changes: Any) -> None:
        if self._task is not None:
            self._progress.update(self._task, line=self._line(), **changes)
