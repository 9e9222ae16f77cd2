"""A converted model is shown some batches, for methods that start from what they see."""

from collections.abc import Generator, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn

from leantune.core.runtime import BatchInfo, Runtime
from leantune.errors import ConfigError
from leantune.ops.backend import on_gpu


def checked_batches(batches: Any) -> Iterable[Any]:
    """Return the batches, each checked when its turn comes.

    Raises:
        ConfigError: no list of batches: none at all, a single batch, or text.
    """
    if isinstance(batches, str | bytes | Mapping | Tensor) or not isinstance(batches, Iterable):
        raise ConfigError(
            f"session.calibrate: batches must be a list of batches, got {_kind(batches)}; give "
            "some of what the model is trained on, as in session.calibrate([batch])"
        )
    return map(_checked, batches)


def _checked(batch: Any) -> Any:
    if batch is None or isinstance(batch, str | bytes | int | float):
        raise ConfigError(
            "session.calibrate: batches must each be what the model is called with, got "
            f"{_kind(batch)}; give mappings of tensors, such as what a tokenizer returns"
        )
    return batch


def _kind(value: Any) -> str:
    return "None" if value is None else f"a {type(value).__name__}"


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


@contextmanager
def seeded_generators(model: nn.Module, seed: int) -> Generator[None]:
    """Seed the generators of the CPU and of the model's GPUs inside, and put them back after."""
    # Only these: to touch another GPU would start CUDA on it.
    used = {p.device for p in model.parameters() if on_gpu(p)}
    with torch.random.fork_rng(devices=list(used)):
        torch.default_generator.manual_seed(seed)
        for device in used:
            torch.cuda.default_generators[device.index].manual_seed(seed)
        yield
