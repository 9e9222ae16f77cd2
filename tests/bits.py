"""Quantised bases: the blocks of a tiny Llama with weights in few bits, by four libraries."""

import importlib.util
from collections.abc import Callable
from typing import Any

import pytest
import torch
from models import MODELS
from torch import Tensor, nn
from torch.nn import functional as F

TINY = MODELS["llama"]


class ScaledTensor(Tensor):
    """Whole numbers and a scale for each row, as torchao lays them out: nothing but linear."""

    @staticmethod
    def __new__(cls, numbers: Tensor, scales: Tensor) -> "ScaledTensor":
        return Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls, numbers.shape, dtype=scales.dtype, device=numbers.device
        )

    def __init__(self, numbers: Tensor, scales: Tensor) -> None:
        self.numbers, self.scales = numbers, scales

    @classmethod
    def of(cls, weight: Tensor) -> "ScaledTensor":
        scales = weight.abs().amax(1, keepdim=True) / 127
        return cls((weight / scales).round().to(torch.int8), scales)

    def __tensor_flatten__(self) -> tuple[list[str], Any]:
        return ["numbers", "scales"], None

    def dequantize(self) -> Tensor:
        return self.numbers.to(self.scales.dtype) * self.scales

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None):
        if function is F.linear:
            x, weight, *bias = args
            return F.linear(x, weight.dequantize(), *bias, **(kwargs or {}))
        return super().__torch_function__(function, types, args, kwargs or {})

    @classmethod
    def __torch_dispatch__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None):
        if function in (torch.ops.aten.detach.default, torch.ops.aten.alias.default):
            return cls(args[0].numbers, args[0].scales)
        return NotImplemented  # torch names the operation and the class


# It stands for torchao's, whose classes are known by where they live.
ScaledTensor.__module__ = "torchao.quantization"


def _linears(model: nn.Module) -> list[tuple[nn.Module, str, nn.Linear]]:
    layers = model.get_submodule("model.layers")
    children = ((m, n, c) for m in layers.modules() for n, c in m.named_children())
    return [(m, n, c) for m, n, c in children if isinstance(c, nn.Linear)]


def _scaled(model: nn.Module) -> None:
    for _, _, layer in _linears(model):
        weight = ScaledTensor.of(layer.weight.detach())
        layer.weight = nn.Parameter(weight, requires_grad=False)


def _int8(model: nn.Module) -> None:
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    quantize_(model.get_submodule("model.layers"), Int8WeightOnlyConfig())


def _int4(model: nn.Module) -> None:
    from torchao.quantization import IntxWeightOnlyConfig, PerGroup, quantize_

    config = IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=PerGroup(16))
    quantize_(model.get_submodule("model.layers"), config)


def _nf4(model: nn.Module) -> None:
    import bitsandbytes as bnb

    for parent, name, old in _linears(model):
        new = bnb.nn.Linear4bit(old.in_features, old.out_features, bias=False, quant_type="nf4")
        new.weight = bnb.nn.Params4bit(old.weight.data, requires_grad=False, quant_type="nf4")
        setattr(parent, name, new)
    model.is_loaded_in_4bit = True  # type: ignore[assignment]


_KINDS: dict[str, tuple[str | None, Callable[[nn.Module], None]]] = {
    "scaled": (None, _scaled),
    "int8": ("torchao", _int8),
    "int4": ("torchao", _int4),
    "nf4": ("bitsandbytes", _nf4),
}
KINDS = [
    *_KINDS,
    *(pytest.param(f"{kind}-gpu", marks=pytest.mark.gpu) for kind in ("int8", "int4", "nf4")),
]


def build(kind: str, seed: int = 0) -> Any:
    """Make the tiny Llama with the linears of its blocks frozen and quantised."""
    name, _, device = kind.partition("-")
    library, quantise = _KINDS[name]
    if library and importlib.util.find_spec(library) is None:
        pytest.skip(f"needs {library}")
    model = TINY.build(seed).requires_grad_(False)
    quantise(model)
    return model.to("cuda" if device else "cpu")


def packed(weight: Any) -> list[Tensor]:
    """Return the tensors that a quantised weight is made of."""
    if hasattr(weight, "quant_state"):
        state = weight.quant_state
        scales = [state.absmax, state.code, state.offset, state.state2.absmax, state.state2.code]
        return [weight.data, *scales]
    return [getattr(weight, name) for name in weight.__tensor_flatten__()[0]]
