"""A fingerprint of a base model tells whether a session is loaded onto the weights it came from."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from leantune.core.distributed import is_sharded
from leantune.core.linear import Converted, has_entries, trained_in_place_of_weight
from leantune.errors import ConfigError, UnsupportedError

_NUM_ENTRIES = 16


def fingerprint(model: nn.Module) -> dict[str, Tensor]:
    """Return a few entries of every weight, evenly spread: fast for a model of any size.

    They keep their dtype, so that a base that is loaded in another one can still be compared.
    Buffers, quantised weights and shards are left out.

    Returns:
        Name -> up to 16 entries, on the CPU.
    """
    named = model.named_parameters(remove_duplicate=False)
    return {name: _entries(p) for name, p in named if _has_numbers(p)}


def _has_numbers(weight: Tensor) -> bool:
    return has_entries(weight) and weight.numel() > 0 and not is_sharded(weight)


def _entries(weight: Tensor) -> Tensor:
    flat, size = weight.detach().reshape(-1), weight.numel()
    places = [i * (size - 1) // (_NUM_ENTRIES - 1) for i in range(_NUM_ENTRIES)]
    return flat[sorted(set(places))].cpu()


def refuse_lost(model: nn.Module, base: Mapping[str, Tensor]) -> None:
    """Raise where a weight that does not train any more is another one than the base has.

    A session's folder holds what trains, and would lack it without a word. A weight in whose place
    a method trains something follows that.

    Args:
        model: converted.
        base: fingerprint of the weights that the folder would lack.

    Raises:
        UnsupportedError: there is such a weight.
    """
    layers = [(n, m) for n, m in model.named_modules() if isinstance(m, Converted)]
    follow = {f"{name}.weight" for name, layer in layers if trained_in_place_of_weight(layer)}
    now = {n: v for n, v in model.state_dict().items() if n in base and n not in follow}
    lost = [n for n, v in now.items() if _has_numbers(v) and not _is_same(base[n], _entries(v))]
    if lost:
        raise UnsupportedError(
            "session.save: weights that do not train must be those of the base, got "
            f"{len(lost)} that have changed since leantune.apply ({lost[0]}, ...); what was frozen "
            "after training must train while it is saved, and in the model that it is loaded onto"
        )


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
