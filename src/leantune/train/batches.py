"""Batches that methods see before step 1: those to calibrate on, and rows that those left out."""

from collections.abc import Iterator, Sequence
from itertools import islice
from typing import Any

import torch
from accelerate.utils import send_to_device
from torch.utils.data import DataLoader
from transformers import TrainingArguments
from transformers.trainer_utils import has_length

from leantune.core import registry
from leantune.core.session import Session


def num_calibration_batches(session: Session) -> int:
    """Return how many batches the session's methods calibrate on; 0 where none asks for any."""
    specs = [(registry.get(config.method), config) for config in session.methods]
    wanted = (s.num_calibration_batches(c) for s, c in specs if s.calibrate is not None)
    return max(wanted, default=0)


def calibration_batches(loader: Any, args: TrainingArguments, num_batches: int) -> Iterator[Any]:
    """Yield the batches that a run calibrates on: the same ones whenever it is asked.

    Their rows are evenly spread over the data set, as far as its length is known.

    Args:
        loader: of the training set.
        args: of the run: size of a batch, device.
        num_batches: limit.
    """
    dataset = loader.dataset
    rows = None
    if has_length(dataset):
        rows = _evenly(range(len(dataset)), args.per_device_train_batch_size * num_batches)
    return islice(_load(dataset, rows, loader, args), num_batches)


def held_out_batches(
    loader: Any, args: TrainingArguments, num_batches: int, num_calibration: int, other: Any
) -> Iterator[Any]:
    """Yield batches of rows that ``calibration_batches`` does not, evenly spread over those.

    Args:
        loader: of the training set, whose length is known.
        args: of the run: size of a batch, device.
        num_batches: limit.
        num_calibration: how many batches the run calibrates on.
        other: the data set to take rows from where calibration took the whole training set.
    """
    dataset, size = loader.dataset, args.per_device_train_batch_size
    seen = set(_evenly(range(len(dataset)), size * num_calibration))
    rest = [row for row in range(len(dataset)) if row not in seen]
    if not rest:
        dataset, rest = other, range(len(other))
    return _load(dataset, _evenly(rest, size * num_batches), loader, args)


def cuda_devices(args: TrainingArguments) -> list[torch.device]:
    """Return the devices whose random streams ``torch.random.fork_rng`` should put back."""
    return [args.device] if args.device.type == "cuda" else []


def _load(
    dataset: Any, rows: list[int] | None, loader: Any, args: TrainingArguments
) -> Iterator[Any]:
    batches = DataLoader(
        dataset,
        args.per_device_train_batch_size,
        sampler=rows,  # type: ignore[arg-type]
        collate_fn=loader.collate_fn,
    )
    return (send_to_device(batch, args.device) for batch in batches)


def _evenly(rows: Sequence[int], num_rows: int) -> list[int]:
    wanted = min(len(rows), num_rows)
    return [rows[i * len(rows) // wanted] for i in range(wanted)]
