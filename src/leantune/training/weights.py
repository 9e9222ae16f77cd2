"""Which weights train, and in how many bits and of which dtype the others are."""

import difflib
import importlib
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from leantune.core.adapters import is_factor, original_name
from leantune.core.discovery import find_sites
from leantune.core.extras import require
from leantune.core.sites import matches_name, path_of
from leantune.errors import ConfigError, SiteError, UnsupportedError

_GROUP = 32
"""Weights that share a scale in int4."""


def freeze(model: nn.Module, patterns: Sequence[str]) -> set[str]:
    """Freeze the parameters that patterns fit, by their names or by those of modules around them.

    Args:
        model: what it freezes of a tied weight, it freezes for all its users.
        patterns: in the syntax of ``sites``, without roles and parts.

    Returns:
        The names of what is frozen now.

    Raises:
        SiteError: a pattern fits nothing; names the nearest.
    """
    named = list(model.named_parameters(remove_duplicate=False))
    frozen: set[str] = set()
    for pattern in patterns:
        who = "RunRecipe: freeze"
        found = [
            (name, parameter)
            for name, parameter in named
            if any(matches_name(path, pattern, who) for path in path_of(name))
        ]
        if not found:
            names = sorted({path for name, _ in named for path in path_of(name)})
            ends = {path.rpartition(".")[2]: path for path in names}
            near = difflib.get_close_matches(pattern, [*names, *ends], n=3, cutoff=0.4)
            raise SiteError(
                f"{who} must fit at least one module or parameter, got {pattern!r}, which fits "
                f"none; near it: {', '.join(ends.get(name, name) for name in near) or 'none'}"
            )
        for name, parameter in found:
            parameter.requires_grad_(False)
            frozen.add(name)
    return frozen


def check_frozen(model: nn.Module, frozen: set[str]) -> None:
    """Check that something trains when the methods are applied, and that nothing frozen does.

    Raises:
        ConfigError: it does not, or a method trains a copy of it.
    """
    trained = {original_name(name) for name, p in model.named_parameters() if p.requires_grad}
    if not trained:
        raise ConfigError(
            "RunRecipe: freeze must leave something to train, got patterns that fit everything; "
            "leave one out, or add a method that trains something else, such as lora"
        )
    if lost := sorted(trained & frozen):
        raise ConfigError(
            f"RunRecipe: freeze must leave out what a method trains, got {lost[0]}; leave it out, "
            "or set LoRA's train_head: false"
        )


def quantise(model: nn.Module, kind: str) -> None:
    """Freeze the linears inside the model's blocks and keep their weights in few bits.

    These are the linears that LoRA adapts. Embeddings, heads and norms stay as they are.

    Args:
        kind: ``int8`` or ``int4``, by torchao; ``nf4``, by bitsandbytes.

    Raises:
        UnsupportedError: the package is missing, or a block has a linear that it cannot take.
    """
    sites = find_sites(model)
    layers: dict[str, Any] = {
        s.name: s.module for s in sites if s.role == "linear" and s.block and s.tied_to is None
    }
    for name, layer in layers.items():
        if not isinstance(layer, nn.Linear) or (kind == "int4" and layer.in_features % _GROUP):
            raise UnsupportedError(
                "RunRecipe: quantize must be None unless each linear in a block is an nn.Linear, "
                f"for int4 one that reads a multiple of {_GROUP} features, got {name}, a {layer}; "
                "leave it out"
            )
        layer.requires_grad_(False)
    if kind == "nf4":
        _to_nf4(model, layers)
        return
    require("torchao", extra="quant", who="RunRecipe: quantize")
    from torchao.quantization import Int8WeightOnlyConfig, IntxWeightOnlyConfig, PerGroup, quantize_

    int4: torch.dtype = torch.int4  # type: ignore[attr-defined]
    four = IntxWeightOnlyConfig(weight_dtype=int4, granularity=PerGroup(_GROUP))
    config = four if kind == "int4" else Int8WeightOnlyConfig()
    quantize_(model, config, lambda module, name: name in layers)


def _to_nf4(model: Any, layers: dict[str, nn.Linear]) -> None:
    require("bitsandbytes", extra=None, who="RunRecipe: quantize")
    bitsandbytes = importlib.import_module("bitsandbytes")
    for name, old in layers.items():
        bias = old.bias is not None
        new = bitsandbytes.nn.Linear4bit(
            old.in_features, old.out_features, bias, old.weight.dtype, quant_type="nf4"
        )
        new.weight = bitsandbytes.nn.Params4bit(
            old.weight.data, requires_grad=False, quant_type="nf4"
        )
        new.bias = old.bias
        # It is packed on its way to a device, be it the one where it is.
        model.set_submodule(name, new.to(old.weight.device))
    model.is_loaded_in_4bit = True


def train_factors_in_full(model: nn.Module) -> None:
    """Let LoRA's factors be float32 whatever their base is, as ``get_peft_model`` does.

    In bfloat16 most steps of a usual learning rate would be rounded away.
    """
    for name, module in model.named_modules():
        if is_factor(name):
            module.float()
