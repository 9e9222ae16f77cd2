"""A forecast of a training step: its bytes and its time, from a model without numbers.

The methods are really applied and the step really runs, on fake tensors: torch works out shapes and
storages with the operations of the real device, and no number. What is no weight stays real, so
that masks are what they would be.
"""

import copy
import warnings
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

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
from leantune.ops.launches_triton import launches_seen
from leantune.planner.meter import Meter, Speed

_DEPTHS = (2, 3)
"""Numbers of blocks that a deep model is extrapolated from."""


class Forecast(NamedTuple):
    """A forecast of one forward and backward; each field grows in proportion to the blocks.

    The four ledgers are those of ``leantune.ledger``; the others are those of ``Meter``.
    """

    weights: int
    gradients: int
    optimizer: int
    activations: int
    seconds: float
    peaks: tuple[int, ...]
    peaks_besides_grads: tuple[int, ...]

    def peak(self, *, accumulates: bool) -> int:
        """Return the most bytes that a step holds at once, the optimiser's state included.

        Args:
            accumulates: whether gradients of earlier micro-batches are there from the start.
        """
        own = max(self.gradients, *self.peaks)
        if accumulates:
            own = self.gradients + max(self.peaks_besides_grads)
        return self.weights + self.optimizer + own


class Blueprint:
    """A blueprint is a model without numbers, of which forecasts are made.

    A model of more than three equal blocks is run with two and with three; each further one adds
    what the third did.

    Args:
        model: real or on the meta device; it is left alone.
        device: where the step would run.
        speed: of that device.

    Raises:
        UnsupportedError: a weight is no plain tensor, so that its shape does not tell its bytes.
    """

    def __init__(self, model: nn.Module, device: torch.device, speed: Speed) -> None:
        self._mode = FakeTensorMode(allow_non_fake_inputs=True)
        self._device, self._speed = device, speed
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
            methods: none forecasts the plain model.
            dtype: of autocast; None without it.

        Raises:
            SiteError: a method cannot act on the model.
            UnsupportedError: the forward asks for numbers that are not there.
        """
        kind = self._device.type
        # Peft asks a weight for its address, and torch its own LoRA factors for their gradients.
        with warnings.catch_warnings(), torch.autocast(kind, dtype, enabled=dtype is not None):
            for about in ("Accessing the data pointer of FakeTensor", "The .grad attribute of a"):
                warnings.filterwarnings("ignore", message=about)
            runs = [self._run(self._copy(model), batch, methods) for model in self._models]
        few, more = runs[0], runs[-1]
        num_further = len(self._blocks) - max(_DEPTHS)

        def far(a: Any, b: Any) -> Any:
            return tuple(map(far, a, b)) if isinstance(a, tuple) else b + num_further * (b - a)

        return few if len(runs) == 1 else Forecast(*map(far, few, more))

    def _run(
        self, model: nn.Module, batch: Mapping[str, Any], methods: Sequence[MethodConfig]
    ) -> Forecast:
        modules = dict(model.named_modules())
        blocks = [modules[name] for name in self._blocks if name in modules]
        if methods:
            apply(model, *methods)
        step = make_step("plan", model, batch)
        meter = Meter(model, blocks, step.tensors(), self._speed)
        try:
            with launches_seen(meter.touch):
                held = count_step(step, watch=meter)
        except LeantuneError:
            raise
        except Exception as error:  # whatever a foreign forward makes of a tensor without numbers
            first = str(error).partition("\n")[0]
            raise UnsupportedError(
                f"plan: model must run without numbers, got {type(error).__name__} from "
                f"{type(model).__name__} ({first}); load it, and measure it with leantune.ledger"
            ) from error
        ledgers = held.weights, held.gradients, held.optimizer, held.activations
        peaks = tuple(meter.peaks), tuple(meter.peaks_besides_grads)
        return Forecast(*ledgers, meter.seconds, *peaks)

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
        unknown = (b for b in model.buffers() if b.is_meta or is_fake(b))
        return copy.deepcopy(model, memo | {id(b): self._fake(b) for b in unknown})

    def _fake(self, x: Tensor) -> Tensor:
        with self._mode:
            return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=self._device)


def _are_alike(model: nn.Module, blocks: Sequence[str]) -> bool:
    """Return whether all blocks stand in one list and differ in nothing but their number."""
    place = blocks[0].rpartition(".")[0]
    if list(blocks) != [f"{place}.{i}" for i in range(len(blocks))]:
        return False
    kinds = [list(map(_kind, model.get_submodule(name).modules())) for name in blocks]
    return kinds == [kinds[0]] * len(blocks)


def _kind(module: nn.Module) -> Any:
    """Return what two modules have in common that compute the same."""
    own = [(p.shape, p.dtype, p.requires_grad) for p in module.parameters(recurse=False)]
    plain = {k: v for k, v in vars(module).items() if isinstance(v, bool | int | float | str)}
    return type(module), own, {k: v for k, v in plain.items() if not k.endswith("idx")}


def _with_blocks(model: nn.Module, blocks: Sequence[str], num_blocks: int) -> nn.Module:
    """Leave a model its first blocks alone, and let its configuration say so."""
    holder: Any = model.get_submodule(blocks[0].rpartition(".")[0])
    del holder[num_blocks:]
    for module in model.modules():
        config: Any = vars(module).get("config")
        if getattr(config, "num_hidden_layers", None) == len(blocks):
            config.num_hidden_layers = num_blocks
    return model
