"""A forecast of a training step: its bytes and its work, from a model without numbers.

The methods are really applied and the step really runs, on fake tensors: torch computes their
shapes, strides and storages with the real device's own operations, and no number. What is no weight
stays real, so that masks are what they would be.
"""

import copy
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import astuple, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from leantune.core.apply import apply
from leantune.core.config import MethodConfig
from leantune.core.discovery import discover
from leantune.errors import LeantuneError, UnsupportedError
from leantune.measure.ledger import count_step
from leantune.measure.step import make_step
from leantune.ops.backend import is_fake
from leantune.planner.meter import Meter

_DEPTHS = (2, 3)
"""Blocks of the models that a deep one is extrapolated from."""


@dataclass(frozen=True)
class Forecast:
    """A forecast holds bytes and work of one forward and backward; every field grows by block.

    Args:
        weights: bytes of parameters and buffers.
        gradients: bytes that one backward leaves on the parameters.
        optimizer: bytes of AdamW's state.
        activations: bytes kept for backward at the end of the forward.
        peaks: bytes that the step's own tensors take at most, by phase (see ``Meter``).
        peaks_besides_grads: the same without gradients that have reached their parameters.
        flops: of products and attention.
        traffic: bytes that the other operations read and write.
        num_operations: how many there are.
    """

    weights: int
    gradients: int
    optimizer: int
    activations: int
    peaks: tuple[int, ...]
    peaks_besides_grads: tuple[int, ...]
    flops: int
    traffic: int
    num_operations: int

    def peak(self, *, accumulates: bool) -> int:
        """Return the most bytes that a step holds at once, weights and optimizer state included.

        Args:
            accumulates: gradients of earlier micro-batches are there from the start.
        """
        resident = self.weights + self.optimizer
        if accumulates:
            return resident + self.gradients + max(self.peaks_besides_grads)
        return resident + max(self.gradients, *self.peaks)

    def deeper(self, more: "Forecast", num_blocks: int) -> "Forecast":
        """Return the forecast with further blocks, each of which adds what the first in ``more`` did.
        """

        def far(one: Any, other: Any) -> Any:
            if isinstance(one, tuple):
                return tuple(map(far, one, other))
            return other + num_blocks * (other - one)

        return Forecast(*map(far, astuple(self), astuple(more)))


class Blueprint:
    """A blueprint is a model without numbers, of which forecasts are made.

    A model of more than three equal blocks is run with two and with three; every further one adds
    what the third did.

    Args:
        model: real or on the meta device; it is left alone.
        device: where the step would run.

    Raises:
        UnsupportedError: a weight is no plain tensor, so that its bytes are not those of its shape.
    """

    def __init__(self, model: nn.Module, device: torch.device) -> None:
        self.device = device
        self._mode = FakeTensorMode(allow_non_fake_inputs=True)
        whole = self._copy(model)
        self._blocks = blocks = discover(whole).blocks
        self._models = [whole]
        if len(blocks) > max(_DEPTHS) and _are_alike(whole, blocks):
            self._models = [_with_blocks(self._copy(whole), blocks, n) for n in _DEPTHS]

    def forecast(
        self,
        batch: Mapping[str, Any],
        methods: Sequence[MethodConfig] = (),
        dtype: torch.dtype | None = None,
    ) -> Forecast:
        """Forecast a training step on ``batch`` with the methods applied.

        Args:
            batch: the model's keyword arguments, real tensors; shapes and masks count.
            dtype: of autocast; None without it.

        Raises:
            SiteError: a method cannot act on the model.
            UnsupportedError: the forward asks for numbers that are not there.
        """
        few, *more = [self._run(self._copy(m), batch, methods, dtype) for m in self._models]
        return few.deeper(more[0], len(self._blocks) - max(_DEPTHS)) if more else few

    def _run(
        self,
        model: nn.Module,
        batch: Mapping[str, Any],
        methods: Sequence[MethodConfig],
        dtype: torch.dtype | None,
    ) -> Forecast:
        modules = dict(model.named_modules())
        blocks = [modules[name] for name in self._blocks if name in modules]
        # Peft asks a weight for its address.
        with warnings.catch_warnings(), self._autocast(dtype):
            warnings.filterwarnings("ignore", message="Accessing the data pointer of FakeTensor")
            if methods:
                apply(model, *methods)
            step = make_step("plan", model, batch)
            meter = Meter(model, blocks, step.tensors())
            try:
                held = count_step(step, watch=meter)
            except LeantuneError:
                raise
            # What a foreign forward makes of tensors without numbers may be any error.
            except Exception as error:
                raise UnsupportedError(
                    f"plan: {type(model).__name__} must run without numbers, got "
                    f"{type(error).__name__}: {str(error).partition(chr(10))[0]}; load it, and "
                    "measure it with leantune.ledger"
                ) from error
        return Forecast(
            held.weights,
            held.gradients,
            held.optimizer,
            held.activations,
            tuple(meter.peaks),
            tuple(meter.peaks_besides_grads),
            meter.flops,
            meter.traffic,
            meter.num_operations,
        )

    def _autocast(self, dtype: torch.dtype | None) -> torch.autocast:
        return torch.autocast(self.device.type, dtype or torch.bfloat16, enabled=dtype is not None)

    def _copy(self, model: nn.Module) -> nn.Module:
        """Copy modules, with fake tensors for weights and for whatever has no numbers."""
        memo: dict[int, Any] = {}
        for name, weight in model.named_parameters():
            if type(weight) not in (nn.Parameter, Tensor) and not is_fake(weight):
                raise UnsupportedError(
                    f"plan: weights must be plain tensors, got {type(weight).__name__} at {name}; "
                    "measure a quantised or sharded model with leantune.ledger"
                )
            memo[id(weight)] = nn.Parameter(self._fake(weight), weight.requires_grad)
        for buffer in model.buffers():
            if buffer.is_meta or is_fake(buffer):
                memo[id(buffer)] = self._fake(buffer)
        return copy.deepcopy(model, memo)

    def _fake(self, tensor: Tensor) -> Tensor:
        with self._mode:
            size, stride = tensor.shape, tensor.stride()
            return torch.empty_strided(size, stride, dtype=tensor.dtype, device=self.device)


def _are_alike(model: nn.Module, blocks: Sequence[str]) -> bool:
    """Return whether all blocks stand in one list and differ in nothing but their number."""
    place = blocks[0].rpartition(".")[0]
    if list(blocks) != [f"{place}.{i}" for i in range(len(blocks))]:
        return False
    holder = model.get_submodule(place)
    kinds = [_kind(block) for block in holder.children()]
    return isinstance(holder, nn.ModuleList) and kinds == [kinds[0]] * len(blocks)


def _kind(block: nn.Module) -> list[Any]:
    """Return what two blocks have in common that compute the same: classes, shapes, settings."""
    return [
        (
            name,
            type(module),
            [(p.shape, p.dtype, p.requires_grad) for p in module.parameters(recurse=False)],
            {
                key: value
                for key, value in vars(module).items()
                if isinstance(value, bool | int | float | str) and not key.endswith("idx")
            },
        )
        for name, module in block.named_modules()
    ]


def _with_blocks(model: nn.Module, blocks: Sequence[str], num_blocks: int) -> nn.Module:
    """Leave a model its first blocks alone, and let its configuration say so."""
    holder = model.get_submodule(blocks[0].rpartition(".")[0])
    del holder[num_blocks:]  # type: ignore[operator]
    for module in model.modules():
        config = vars(module).get("config")
        if getattr(config, "num_hidden_layers", None) == len(blocks):
            config.num_hidden_layers = num_blocks
    return model
