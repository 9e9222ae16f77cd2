"""Where a tensor comes from, in terms of the linears of one block, and what that makes of it.

An origin lists the calls that a tensor was made of. A linear that reads ``act(up(x))``,
``act(gate(x)) * up(x)`` or ``act(half) * other_half`` of one product, compared by value, ends an
FFN. Attention is the softmax of a product of two marked tensors.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import Any, TypeVar

import torch
from torch import Tensor

from leantune.core.sites import Part

M = TypeVar("M")


@dataclass(eq=False)
class LinearCall:
    """A linear, or a LoRA layer around one, made a tensor (kept as a copy) of another."""

    name: str
    read: Tensor
    made: Tensor


@dataclass(eq=False)
class Activation:
    """An elementwise function was called with a linear's output.

    Attributes:
        name: of the module, or None for a plain function, whose tensors are not kept.
    """

    name: str | None
    source: LinearCall
    read: Tensor | None = None
    made: Tensor | None = None


@dataclass(eq=False)
class Dropped:
    """A dropout was called, of a module or, without ``name``, as a plain function."""

    name: str | None
    made: Tensor | None = None


@dataclass(eq=False)
class Scores:
    """A query was multiplied by a key."""

    query: "Origin"
    key: "Origin"


@dataclass(eq=False)
class Attention:
    """Attention was computed in the module ``entry``, which was called with ``inputs``."""

    entry: str
    block: str
    inputs: Sequence[Tensor]
    query: "Origin"
    key: "Origin"
    value: "Origin" = ()
    output: str | None = None


@dataclass(eq=False)
class Mixed:
    """An element depends on more than the marked elements at its place."""


MIXED = Mixed()
Origin = tuple[LinearCall | Activation | Dropped | Scores | Attention | Mixed, ...]


@dataclass(eq=False)
class FFN:
    """An FFN was seen; where ``modules`` has no activation, nothing but its linears is known.

    Attributes:
        modules: part -> name.
        up: the call of the linear that is not the gate.
        is_gated: whether two linears or two halves of one are multiplied.
        inside: the smallest module with all linears inside.
        is_whole: whether that module computes the FFN and nothing else.
    """

    modules: dict[str, str]
    up: LinearCall
    is_gated: bool
    inside: str
    is_whole: bool = False


def union(*origins: Origin) -> Origin:
    """Return all calls of some origins, each once, in order."""
    return tuple(dict.fromkeys(call for origin in origins for call in origin))


def first(kind: type[M], origin: Origin) -> M | None:
    """Return the first call of a kind, or None."""
    return next((call for call in origin if isinstance(call, kind)), None)


def product(*origins: Origin) -> Origin:
    """Return the origin of a product of two tensors: scores, or what attention puts out."""
    for origin, other in (origins, origins[::-1]):
        attention = first(Attention, origin)
        if attention is not None:
            attention.value = attention.value or other
            return (attention,)
    return (Scores(*origins),)


def match_ffn(down: str, origin: Origin, hidden: Tensor) -> FFN | None:
    """Return the FFN that ends with the linear ``down`` reading ``hidden``, or None."""
    linears = [call for call in origin if isinstance(call, LinearCall)]
    activations = [call for call in origin if isinstance(call, Activation)]
    dropouts = [call for call in origin if isinstance(call, Dropped)]
    num_known = len(linears) + len(activations) + len(dropouts)
    if num_known < len(origin) or len(activations) != 1 or len(linears) > 1:
        return None
    activation = activations[0]
    gate = activation.source
    up = linears[0] if linears else gate
    if not same(gate.read, up.read):
        return None
    modules = {"up": up.name, "gate": gate.name, "down": down}
    if gate is up:
        del modules["gate"]
    ffn = FFN(modules, up, bool(linears), _common(list(modules.values())))
    named = [call.name for call in dropouts if call.name and same(call.made, hidden)]
    is_last = len(named) == len(dropouts) < 2
    if activation.name is not None and is_last and same(_computed(activation, ffn), hidden):
        modules["activation"] = activation.name
        modules.update(zip(["hidden_dropout"], named, strict=False))
    return ffn


def _computed(activation: Activation, ffn: FFN) -> Tensor | None:
    """Return what a plain, gated or halved FFN's last linear reads; None if it is none of these."""
    read, made, up = activation.read, activation.made, ffn.up.made
    acted_on = activation.source.made
    if ffn.is_gated and activation.source is ffn.up:
        acted_on, up = up.tensor_split(2, -1)
    if made is None or not same(read, acted_on):
        return None
    if not ffn.is_gated:
        return made
    return made * up if made.shape == up.shape else None


def attention_part(seen: Attention) -> Part:
    """Return the part that an attention is, with the linears that can be told apart."""
    origins = {"query": seen.query, "key": seen.key, "value": seen.value}
    calls = {part: _only_linear(origin) for part, origin in origins.items()}
    modules = {part: call.name for part, call in calls.items() if call is not None}
    if modules.keys() == origins.keys() and modules["key"] == modules["value"]:
        del modules["value"]
        modules["key_value"] = modules.pop("key")
        if modules["query"] == modules["key_value"]:
            modules = {"qkv": modules["query"]}
    if seen.output is not None:
        modules["output"] = seen.output
    return Part("attention", seen.entry, seen.block, modules, _is_cross(seen, **calls))


def _is_cross(seen: Attention, query: LinearCall | None, key: LinearCall | None, **_: Any) -> bool:
    """Return whether keys are made of one argument of the module, and queries of something else."""
    if key is None or not any(key.read is x for x in seen.inputs):
        return False
    return query is None or key.read is not query.read


def _only_linear(origin: Origin) -> LinearCall | None:
    """Return the linear of an origin, or None unless there is exactly one."""
    sources = {call.source if isinstance(call, Activation) else call for call in origin}
    linears = [call for call in sources if isinstance(call, LinearCall)]
    return linears[0] if len(linears) == 1 else None


def same(a: Tensor | None, b: Tensor | None) -> bool:
    """Return whether two tensors hold the same numbers, in whatever shape and precision."""
    if a is None or b is None or a.numel() != b.numel():
        return False
    return a is b or torch.equal(a.flatten(), b.flatten().to(a.dtype))


def _common(names: Sequence[str]) -> str:
    """Return the name of the smallest module that has all of ``names`` inside."""
    paths = [name.split(".")[:-1] for name in names]
    shared = takewhile(lambda parts: len(set(parts)) == 1, zip(*paths, strict=False))
    return ".".join(parts[0] for parts in shared)
