"""A converted model is shown some batches, for methods that start from what they see."""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any, cast

import torch
from torch import nn

from leantune.core.runtime import BatchInfo, Runtime


def run_batches(model: nn.Module, runtime: Runtime, batches: Iterable[Any]) -> Iterator[BatchInfo]:
    """Run batches through the model in eval mode, without a graph; yield each one's facts.

    Meanwhile ``runtime.batch`` is the batch at hand, so that its row masks can be asked for.
    Every module's mode is put back at the end.

    Args:
        model: the converted model.
        runtime: of its session.
        batches: mappings of keyword arguments, or single positional arguments.
    """
    before = runtime.batch
    modes = [(module, module.training) for module in model.modules()]
    try:
        model.eval()
        for batch in batches:
            fields: Mapping[str, Any] = {}
            if isinstance(batch, Mapping):
                fields = cast(Mapping[str, Any], batch)
            runtime.batch = BatchInfo.of(fields)
            with runtime.exact(), torch.no_grad():
                model(**fields) if fields else model(batch)
            yield runtime.batch
    finally:
        runtime.batch = before
        for module, mode in modes:
            module.training = mode
