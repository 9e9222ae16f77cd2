"""A rehearsal is one forward on a model's own dummy inputs, after which nothing has changed."""

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from leantune.core.restore import restored_afterwards
from leantune.errors import LeantuneError, UnsupportedError
from leantune.ops.backend import is_fake

_SOUND_SAMPLES = 4000


class Rehearsal(NamedTuple):
    """What a model was called with, and what it returned."""

    batch: Mapping[str, Tensor]
    output: Any


def can_rehearse(model: nn.Module) -> bool:
    """Return whether the model brings dummy inputs, as every model of transformers does."""
    try:
        return getattr(model, "dummy_inputs", None) is not None
    except Exception:  # It does, and making them raises: the rehearsal says why.
        return True


def rehearse(model: nn.Module, batch: Mapping[str, Tensor] | None = None) -> Rehearsal:
    """Run a model once in evaluation mode, without a graph.

    Training flags, buffers, gradients and random numbers are put back.

    Args:
        model: one that brings dummy inputs.
        batch: of an earlier rehearsal; by default the first of the model's inputs that it takes.

    Raises:
        UnsupportedError: the forward raises, whatever it is given; or weights have no numbers.
    """
    if any(x.is_meta or is_fake(x) for x in (*model.parameters(), *model.buffers())):
        raise UnsupportedError("forward on dummy inputs must run, got a model on the meta device")
    first: Exception | None = None
    with restored_afterwards(model), torch.no_grad():
        model.eval()
        # What a foreign model raises is its own affair.
        try:
            batches = list(_batches(model)) if batch is None else [batch]
        except Exception as error:
            raise _failed(error) from error
        for inputs in batches:
            try:
                return Rehearsal(inputs, model(**inputs))
            except LeantuneError:
                raise  # A method's own words.
            except Exception as error:
                first = first or error
    raise _failed(first) from first


def _failed(error: Exception | None) -> UnsupportedError:
    what = f"{type(error).__name__}: {error}"
    return UnsupportedError(f"forward on dummy inputs must run, got {what}")


def _batches(model: Any) -> Iterator[Mapping[str, Tensor]]:
    """Yield what the model may be called with, the likeliest first."""
    config = getattr(model, "config", None)
    weight = next(p for p in model.parameters() if p.is_floating_point())
    given: dict[str, Tensor] = {
        name: value.to(weight.device)
        for name, value in model.dummy_inputs.items()
        if isinstance(value, Tensor)
    }
    ids = given.get("input_ids")
    decoder: dict[str, Tensor] = {}
    if ids is not None:
        # One token is padding, so that a mask has something to say.
        mask = torch.ones_like(ids)
        mask[0, -1] = 0
        given.setdefault("attention_mask", mask)
        if getattr(config, "is_encoder_decoder", False):
            decoder = {"decoder_input_ids": ids}
    senses = {name: x.to(weight) for name, x in _senses(config)}
    main = getattr(model, "main_input_name", None)
    if main in senses:
        yield {**decoder, main: senses[main]}
    yield {**decoder, **given}
    for name, x in senses.items():
        yield {**decoder, **given, name: x}


def _senses(config: Any) -> Iterator[tuple[str, Tensor]]:
    """Yield inputs of the kinds that are no text: pictures and sound, by name."""
    generator = torch.Generator().manual_seed(0)
    vision = getattr(config, "vision_config", config)
    size = getattr(vision, "image_size", None)
    if size is not None:
        height, width = (size, size) if isinstance(size, int) else size
        channels = getattr(vision, "num_channels", 3)
        yield "pixel_values", torch.randn(2, channels, height, width, generator=generator)
    if hasattr(config, "num_mel_bins") and hasattr(config, "max_source_positions"):
        shape = (1, config.num_mel_bins, 2 * config.max_source_positions)
        yield "input_features", torch.randn(shape, generator=generator)
    yield "input_values", torch.randn(1, _SOUND_SAMPLES, generator=generator)
