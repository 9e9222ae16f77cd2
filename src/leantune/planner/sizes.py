"""What a user asks for, checked: a budget in words or bytes, a batch, the batch's tensors."""

import inspect
import re
from typing import Any

import torch
from torch import nn

from leantune.errors import ConfigError, shown

_BUDGET = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([kKMGT]?)(i?)B\s*")
_POWERS = {"": 0, "k": 1, "K": 1, "M": 2, "G": 3, "T": 4}


def parse_budget(budget: Any) -> int:
    """Return the bytes of a budget: ``"22GiB"``, ``"8 GB"``, ``"500MiB"``, or a number of bytes.

    Raises:
        ConfigError: text without a unit, or nothing above zero.
    """
    num_bytes: Any = budget
    if isinstance(budget, str):
        found = _BUDGET.fullmatch(budget)
        if found is not None:
            base = 1024 if found[3] else 1000
            num_bytes = int(float(found[1]) * base ** _POWERS[found[2]])
    if type(num_bytes) is not int or num_bytes <= 0:
        raise ConfigError(
            "plan: budget must be a size above zero with its unit, or a number of bytes, got "
            f"{shown(budget)}; for example '22GiB', '8 GB' or '500MiB'"
        )
    return num_bytes


def check_count(name: str, value: Any, *, least: int, most: int | None = None) -> None:
    """Raise a ConfigError unless a count is a whole number in its range."""
    is_in_range = type(value) is int and value >= least and (most is None or value <= most)
    if not is_in_range:
        rule = f"at least {least}" if most is None else f"from {least} to {most}"
        raise ConfigError(
            f"plan: {name} must be a whole number {rule}, got {shown(value)}; give what the model "
            "is to be trained on"
        )


def token_batch(
    model: nn.Module, batch_size: int, max_length: int, device: torch.device
) -> dict[str, Any]:
    """Return a batch of the longest samples, the last of which has one token of padding.

    Real batches are padded, and a mask that says so is kept for backward.

    Args:
        model: of token ids; labels are those of its loss, where it computes one.

    Raises:
        ConfigError: the model reads no token ids, or fewer than ``max_length``.
    """
    takes = inspect.signature(model.forward).parameters
    who = type(model).__name__
    if "input_ids" not in takes:
        raise ConfigError(
            f"plan: model must read input_ids, got {who}; measure one of another kind with "
            "leantune.ledger(model, batch)"
        )
    config = getattr(model, "config", None)
    longest = getattr(config, "max_position_embeddings", None)
    check_count(f"max_length of {who}", max_length, least=2, most=longest)
    ids = torch.ones(batch_size, max_length, dtype=torch.int64, device=device)
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    batch["attention_mask"][-1, -1] = 0
    if "labels" not in takes:
        return batch
    if "SequenceClassification" in who:
        is_number = getattr(config, "num_labels", 2) == 1
        dtype = torch.float32 if is_number else torch.int64
        return batch | {"labels": torch.zeros(batch_size, dtype=dtype, device=device)}
    return batch | {"labels": ids.masked_fill(batch["attention_mask"] == 0, -100)}
