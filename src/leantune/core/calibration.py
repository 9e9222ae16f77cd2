"""Showing a converted model some batches, for methods that start from what they see."""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from leantune.core.batch import Batch
from leantune.core.session import Session


def run_batches(session: Session, batches: Iterable[Any]) -> Iterator[Batch]:
    """Run batches through the model in eval mode, without a graph; yield each one's facts.

    Meanwhile ``session.batch`` is the batch at hand, so that its row masks can be asked for.
    Every module's mode is put back at the end.

    Args:
        session: whose model runs.
        batches: mappings of keyword arguments, or single positional arguments.
    """
    model, before = session.model, session.batch
    modes = [(module, module.training) for module in model.modules()]
    try:
        model.eval()
        for batch in batches:
            fields = batch if isinstance(batch, Mapping) else {}
            session.batch = Batch.of(fields)
            with session.exact(), torch.no_grad():
                model(**fields) if fields else model(batch)
            yield session.batch
    finally:
        session.batch = before
        for module, mode in modes:
            module.training = mode


def spread_rows(x: Tensor, mask: Tensor | None, num_rows: int) -> Tensor:
    """Return the numbers of at most ``num_rows`` real rows, evenly spread over them.

    Args:
        x: (..., d).
        mask: bool, one for each row of ``x``: which are real; None for all.
        num_rows: limit.

    Returns:
        (at most num_rows,) int64, ascending.
    """
    total = x.shape[:-1].numel()
    rows = torch.arange(total, device=x.device) if mask is None else mask.nonzero().flatten()
    wanted = min(len(rows), num_rows)
    return rows[torch.arange(wanted, device=x.device) * len(rows) // max(wanted, 1)]
