"""What a run's report shows of its methods, measured once before the first step."""

import dataclasses
import math
from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import ExportableState

from leantune.core import registry
from leantune.core.session import Session
from leantune.train.batches import (
    calibration_batches,
    cuda_devices,
    held_out_batches,
    num_calibration_batches,
)
from leantune.train.callback import kept_attributes

NUM_HELD_OUT = 4


class FiguresCallback(TrainerCallback, ExportableState):
    """Ask every method of a session for its figures once the session has been calibrated.

    Comes after the session's own callback. Training is the same to the bit with and without it. A
    resumed run takes the figures from the checkpoint.

    Args:
        session: of the model that is trained; None measures nothing.
        other_rows: data set to measure on where calibration took the whole training set.

    Attributes:
        figures: the JSON form of each ``Figure``; those with a number that is not finite are left
            out.
        peak_bytes: the CUDA allocator's peak before the figures were measured, which start it
            anew: what they take is no cost of training. 0 on the CPU.
    """

    def __init__(self, session: Session | None, other_rows: Any) -> None:
        self.session, self.other_rows = session, other_rows
        self.figures: list[dict[str, Any]] = []
        self.peak_bytes = 0

    def state(self) -> dict[str, Any]:
        """Return what a checkpoint keeps."""
        return {"args": {}, "attributes": {"figures": self.figures}}

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        train_dataloader: Any = None,
        **kwargs: Any,
    ) -> None:
        if state.global_step > 0:
            self.figures = kept_attributes(self, state).get("figures", self.figures)
            return
        on_gpu = torch.cuda.is_available()
        self.peak_bytes = torch.cuda.max_memory_allocated() if on_gpu else 0
        # Loading batches draws a number.
        with torch.random.fork_rng(devices=cuda_devices(args)):
            self.figures = self._measure(args, train_dataloader)
        if on_gpu:
            torch.cuda.reset_peak_memory_stats()

    def _measure(self, args: TrainingArguments, loader: Any) -> list[dict[str, Any]]:
        methods = () if self.session is None else self.session.methods
        specs = {config.method: registry.get(config.method) for config in methods}
        wanted = [spec.figures for spec in specs.values() if spec.figures is not None]
        if self.session is None or not wanted:
            return []
        num = num_calibration_batches(self.session)
        calibration = list(calibration_batches(loader, args, num))
        held_out = list(held_out_batches(loader, args, NUM_HELD_OUT, num, self.other_rows))
        found = [
            figure for measure in wanted for figure in measure(self.session, calibration, held_out)
        ]
        return [
            dataclasses.asdict(figure)
            for figure in found
            if all(math.isfinite(value) for value in figure.values.values())
        ]
