"""What PEFT calls the parts of a LoRA layer; no other file of the package says these names.

Layers are read by their attributes alone, so that peft need not be installed.
"""

import re
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from torch import Tensor, nn

from leantune.errors import UnsupportedError

_FACTOR = re.compile(r"\.(lora_A|lora_B)\.[^.]+$")
_COPY = re.compile(r"\.modules_to_save\.[^.]+(?=\.)")
_INSIDE = re.compile(rf"\.base_layer$|{_FACTOR.pattern}")
_CALLING = frozenset(f"{name}LinearVariant" for name in ("Dora", "ALora", "BdLora", "MiCA", "Kasa"))
"""The variants that call their factors, as plain LoRA does; all others multiply by the weights."""
_MULTIPLYING = frozenset(("ParamWrapper", "MultiheadAttention"))
"""The layers that multiply by their factors' weights, whatever the variant."""
_NOT_TWICE = {
    "ALoraLinearVariant": "is told where to act outside the block; switch the "
    "model's own checkpointing on instead",
    "MontecloraLinearVariant": "draws other numbers when it is recomputed; leave the block out "
    "with sites=",
}


class LowRank(NamedTuple):
    """An adapter of a linear adds ``scaling * second(first(dropout(x)))`` to its output.

    The factors are linears, d_in -> r and r -> d_out.
    """

    first: nn.Module
    second: nn.Module
    scaling: float
    dropout: nn.Module


class Adapted(NamedTuple):
    """A linear and the adapters that add to its output now; two that are equal compute the same."""

    linear: nn.Module
    adapters: tuple[LowRank, ...] = ()

    @property
    def modules(self) -> list[nn.Module]:
        """The linear and both factors of each adapter."""
        return [self.linear, *(m for a in self.adapters for m in (a.first, a.second))]


def unwrap(layer: nn.Module) -> Adapted:
    """Return the linear inside a LoRA layer with its active adapters; any other as it is.

    Raises:
        UnsupportedError: an adapter that is no plain LoRA.
    """
    adapters: tuple[LowRank, ...] = ()
    while hasattr(layer, "base_layer"):
        adapters = (*_active(layer), *adapters)
        layer = layer.get_submodule("base_layer")
    return Adapted(layer, adapters)


def linears_along(layer: nn.Module, dim: int) -> Iterator[tuple[str, nn.Module]]:
    """Yield name prefix and module of all that has a layer's output (0) or input (1) features.

    Of a LoRA layer that is the linear inside and one factor of every adapter, active or not: all of
    them change when features are reordered.
    """
    if not hasattr(layer, "base_layer"):
        yield "", layer
        return
    for prefix, linear in linears_along(layer.get_submodule("base_layer"), dim):
        yield f"base_layer.{prefix}", linear
    side = "lora_A" if dim == 1 else "lora_B"
    for name, factor in layer.get_submodule(side).named_children():
        yield f"{side}.{name}.", factor


def saved_name(name: str) -> str:
    """Return the key under which a saved adapter has the first factor of the linear ``name``."""
    return f"{name}.lora_A.weight"


def adapted_layers(model: nn.Module) -> Iterator[tuple[str, nn.Module, nn.Module]]:
    """Yield name, layer and original of each LoRA layer and each module that trains as a copy."""
    for name, layer in model.named_modules():
        for held, original in layer.named_children():
            if held in ("base_layer", "original_module"):
                yield name, layer, original


def trained_by_adapter(layer: Any) -> dict[str, nn.Module]:
    """Return what such a layer trains, by adapter: the first of its factors, or the copy."""
    return dict(layer.modules_to_save if hasattr(layer, "modules_to_save") else layer.lora_A)


def fold_in_state(state: dict[str, Tensor], name: str, layer: Any, adapter: str) -> None:
    """Put what the layer ``name`` computes with under its plain module's names, in ``state`` alone.

    One adapter is folded into the weight; where it trains a copy of the module, the copy counts.
    """
    is_copy, start = hasattr(layer, "modules_to_save"), f"{name}."
    kept = start + (f"modules_to_save.{adapter}." if is_copy else "base_layer.")
    own = {key: state.pop(key) for key in list(state) if key.startswith(start)}
    state.update({k.replace(kept, start): v for k, v in own.items() if k.startswith(kept)})
    if not is_copy:
        weight = state[f"{start}weight"]
        state[f"{start}weight"] = (weight + layer.get_delta_weight(adapter).to(weight)).cpu()


def is_factor(name: str) -> bool:
    """Return whether a module's name is that of a LoRA layer's first or second factor."""
    return _FACTOR.search(name) is not None


def is_second_factor(name: str) -> bool:
    """Return whether a module's name is that of a second factor, which reads the first's output."""
    found = _FACTOR.search(name)
    return found is not None and found[1] == "lora_B"


def bypass(name: str, modules: Mapping[str, nn.Module]) -> str | None:
    """Say why what is kept of a factor's input would never be used, or None for any other module.

    A method that acts on a factor acts when it is called. A variant of LoRA that reads the
    factor's weight instead would train as if the method were not there.

    Args:
        name: of the factor.
        modules: name -> module of the whole model.
    """
    found = _FACTOR.search(name)
    if found is None:
        return None
    kind = _kind(modules[name[: found.start()]], name.rpartition(".")[2])
    if kind is None or (kind in _CALLING and isinstance(modules[name], nn.Linear)):
        return None
    return (
        f"adapter must call its factors as linears, got {kind}, which does not; leave it out with "
        "sites=, or train plain LoRA"
    )


def not_repeatable(layer: nn.Module) -> str | None:
    """Say why a layer with adapters would compute something else when it is run again, or None."""
    variants: Mapping[str, Any] = getattr(layer, "lora_variant", {})
    kinds = [type(variant).__name__ for variant in variants.values()]
    why = [f"got {kind}, which {_NOT_TWICE[kind]}" for kind in kinds if kind in _NOT_TWICE]
    return f"adapter must compute the same when it is run again, {why[0]}" if why else None


def base_name(name: str) -> str:
    """Return the name that a linear has without LoRA layers: of a factor, the layer's name.

    ``mlp.up_proj.lora_A.default`` and ``mlp.up_proj.base_layer`` both give ``mlp.up_proj``.
    """
    while found := _INSIDE.search(name):
        name = name[: found.start()]
    return name


def original_name(parameter: str) -> str:
    """Return the name that a parameter had before PEFT trained a copy of its module instead."""
    return _COPY.sub("", parameter)


def _active(layer: Any) -> tuple[LowRank, ...]:
    """Return the adapters that the LoRA layer's own forward would add."""
    if not hasattr(layer, "lora_A"):
        kind = f"{type(layer).__module__}.{type(layer).__qualname__}"
        raise UnsupportedError(f"adapter must be plain LoRA, got {kind}")
    if layer.disable_adapters and layer.merged:
        layer.unmerge()
    if layer.disable_adapters or layer.merged:
        return ()
    active: list[LowRank] = []
    for name in layer.active_adapters:
        if name not in layer.lora_A:
            continue
        # Asked in every forward of a routed FFN: no call where there is nothing to say.
        if name in getattr(layer, "lora_variant", {}) or type(layer).__name__ in _MULTIPLYING:
            kind = _kind(layer, name)
            raise UnsupportedError(f"adapter must be plain LoRA, got {name!r}, a {kind}")
        factors = layer.lora_A[name], layer.lora_B[name]
        active.append(LowRank(*factors, layer.scaling[name], layer.lora_dropout[name]))
    return tuple(active)


def _kind(layer: Any, adapter: str) -> str | None:
    """Return the class that makes an adapter another thing than plain LoRA, or None."""
    variants: Mapping[str, Any] = getattr(layer, "lora_variant", {})
    if adapter in variants:
        return type(variants[adapter]).__name__
    kind = type(layer).__name__
    return kind if kind in _MULTIPLYING else None
