"""Rows to calibrate on and rows that calibration left: evenly spread, disjoint, repeatable."""

from itertools import pairwise
from pathlib import Path

import pytest
import torch
from torch.utils.data import DataLoader
from transformers import TrainingArguments

from leantune.train.batches import calibration_batches, held_out_batches


def collate(rows: list[int]) -> torch.Tensor:
    return torch.tensor(rows)


@pytest.fixture
def args(tmp_path: Path) -> TrainingArguments:
    return TrainingArguments(str(tmp_path), per_device_train_batch_size=4, use_cpu=True)


def shown(args: TrainingArguments, num_rows: int, num_calibration: int) -> tuple[list, list]:
    loader = DataLoader(list(range(num_rows)), 4, shuffle=True, collate_fn=collate)  # type: ignore[arg-type]
    seen = list(calibration_batches(loader, args, num_calibration))
    others = list(held_out_batches(loader, args, 3, num_calibration, list(range(1000, 1100))))
    assert len(seen) <= num_calibration and len(others) <= 3
    return torch.cat(seen).tolist(), torch.cat(others).tolist()


def test_held_out_rows_are_others_and_spread_over_the_data(args: TrainingArguments) -> None:
    seen, others = shown(args, 100, 2)
    assert seen == [0, 12, 25, 37, 50, 62, 75, 87]
    assert len(others) == len(set(others)) == 12 and not set(others) & set(seen)
    assert others[0] == 1 and max(b - a for a, b in pairwise([*others, 100])) <= 100 / 12 + 2
    assert shown(args, 100, 2) == (seen, others)


def test_few_rows_left_are_all_taken_and_none_left_are_the_other_sets(
    args: TrainingArguments,
) -> None:
    seen, others = shown(args, 13, 2)
    assert sorted(seen + others) == list(range(13))
    seen, others = shown(args, 8, 2)
    assert seen == list(range(8)) and min(others) == 1000 and len(others) == 12


def test_without_calibration_every_row_is_another(args: TrainingArguments) -> None:
    seen, others = shown_without(args)
    assert seen == [] and others[:3] == [0, 8, 16]


def shown_without(args: TrainingArguments) -> tuple[list, list]:
    loader = DataLoader(list(range(100)), 4, collate_fn=collate)  # type: ignore[arg-type]
    others = list(held_out_batches(loader, args, 3, 0, None))
    return list(calibration_batches(loader, args, 0)), torch.cat(others).tolist()
