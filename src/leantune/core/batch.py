"""What a batch says about its rows: which sample each is of, and which may have a gradient."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

IGNORED_LABEL = -100
"""The label that the field's losses skip."""


@dataclass
class Batch:
    """What the current training forward's batch says about its rows.

    Args:
        sample_ids: (b,) int64, or None where the batch has no ``sample_id``.
        masks: batch field -> (b, t) bool, True on rows that may have a gradient.
    """

    sample_ids: Tensor | None = None
    masks: dict[str, Tensor] = field(default_factory=dict)

    @classmethod
    def of(cls, fields: Mapping[str, Any], sample_ids: Tensor | None = None) -> "Batch":
        """Read the facts off the keyword arguments that the model is called with."""
        return cls(sample_ids, _row_masks(fields))

    def row_mask(self, name: str | None, shape: torch.Size) -> Tensor | None:
        """Return the (n,) mask of an input of ``shape`` (b, t, d) or flattened, (b * t, d); or None
        where none fits."""
        mask = self.masks.get(name) if name is not None else None
        if mask is None or shape[:-1] not in (mask.shape, (mask.numel(),)):
            return None
        return mask.reshape(-1)


def _row_masks(kwargs: Mapping[str, Any]) -> dict[str, Tensor]:
    """Mark the rows of a batch that may have a gradient: real tokens, and any with a label."""
    masks = {}
    for name in ("attention_mask", "decoder_attention_mask"):
        mask = kwargs.get(name)
        if isinstance(mask, Tensor) and mask.ndim == 2:
            rows = mask != 0
            labels = kwargs.get("labels")
            if isinstance(labels, Tensor) and labels.shape == rows.shape:
                # A loss that counts padding gives it a gradient: such rows are not padding here.
                # Position t may be scored against its own label or, shifted, the next one.
                counted = labels != IGNORED_LABEL
                rows = rows | counted
                rows[:, :-1] |= counted[:, 1:]
            masks[name] = rows
    return masks
