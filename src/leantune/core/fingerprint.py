"""A fingerprint of a base model tells whether a session is loaded onto the weights it came from."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from leantune.core.distributed import is_sharded
from leantune.errors import ConfigError

_NUM_ENTRIES = 16


def fingerprint(model: nn.Module) -> dict[str, Tensor]:
    """Return a few entries of every weight, evenly spread: fast for a model of any size.

    They keep their dtype, so that a base that is loaded in another one can still be compared.
    Buffers, quantised weights and shards are left out.

    Returns:
        Name -> up to 16 entries, on the CPU.
    """
    found: dict[str, Tensor] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if parameter.is_floating_point() and parameter.numel() and not is_sharded(parameter):
            flat, size = parameter.detach().reshape(-1), parameter.numel()
            places = [i * (size - 1) // (_NUM_ENTRIES - 1) for i in range(_NUM_ENTRIES)]
            found[name] = flat[sorted(set(places))].cpu()
    return found


def check_fingerprint(model: nn.Module, saved: Mapping[str, Tensor]) -> None:
    """Check that a plain model is the base that a session was saved from.

    Args:
        saved: the fingerprint of the weights that the session did not save itself. Where all train,
            that is none: the saved weights are complete.

    Raises:
        ConfigError: a weight is missing or another one.
    """
    names = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    found = fingerprint(model)
    others = [
        name
        for name, values in saved.items()
        if name not in names or (name in found and not _is_same(values, found[name]))
    ]
    if others:
        raise ConfigError(
            "load: model must be the base that the session was saved from, got other weights in "
            f"{len(others)} of {len(saved)} parameters, {others[0]} among them; load onto that "
            "base, with its own pre-trained weights and in the same dtype"
        )


def _is_same(a: Tensor, b: Tensor) -> bool:
    """Whether values are equal, or one of them is the other in a coarser dtype."""
    if a.shape != b.shape:
        return False
    pairs = ((a.to(b.dtype), b), (a, b.to(a.dtype)))
    return any(torch.allclose(x, y, rtol=0, atol=0, equal_nan=True) for x, y in pairs)
