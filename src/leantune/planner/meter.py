"""A meter watches a step's operations: the most bytes held at once, and how long they may take."""

import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count

from leantune.core.tensors import iter_tensors

NUM_PHASES = 4
"""Forward, backward to the input of the last block, to that of the first one, and to the end.

In each of these every further block adds the same to the most bytes that are held."""


class Speed(NamedTuple):
    """The speed of a device: what its operations take.

    Args:
        flops: that products compute a second.
        traffic: bytes a second.
        call: seconds for each operation.
        overlaps: whether a product computes while it reads.
    """

    flops: float
    traffic: float
    call: float
    overlaps: bool


def _on_cpu(*args: Any, **_: Any) -> int:
    return sdpa_flop_count(*(x.shape for x in args[:3]))


def _on_cpu_backward(*args: Any, **_: Any) -> int:
    return sdpa_backward_flop_count(*(x.shape for x in args[:4]))


_ATEN = torch.ops.aten
_FLOPS: Mapping[Any, Callable[..., int]] = {
    **flop_registry,  # of attention, that on a GPU alone
    _ATEN._scaled_dot_product_flash_attention_for_cpu: _on_cpu,
    _ATEN._scaled_dot_product_flash_attention_for_cpu_backward: _on_cpu_backward,
}


class Meter(TorchDispatchMode):
    """A meter counts each storage from the operation that makes it until nobody holds it.

    Args:
        model: whose step is run inside.
        blocks: of the model, in order.
        known: what exists besides the model's own tensors.
        speed: of the device.

    Attributes:
        peaks: most bytes held at once, by phase.
        peaks_besides_grads: the same without gradients that have reached their parameters.
        seconds: an estimate from what products compute, and from all operations' bytes and number.
    """

    def __init__(
        self, model: nn.Module, blocks: Sequence[nn.Module], known: Iterable[Tensor], speed: Speed
    ) -> None:
        super().__init__()
        self._model, self._blocks, self._speed = model, blocks, speed
        storages = [t.untyped_storage() for t in (*model.parameters(), *model.buffers(), *known)]
        # These are held here, so that no other storage gets their address.
        self._alive: dict[int, Any] = {storage._cdata: storage for storage in storages}
        self._handles: list[Any] = []
        self._held = self._grads = self._phase = 0
        self.peaks = [0] * NUM_PHASES
        self.peaks_besides_grads = [0] * NUM_PHASES
        self.seconds = 0.0

    def __enter__(self) -> "Meter":
        trained = [p for p in self._model.parameters() if p.requires_grad]
        self._handles = [p.register_post_accumulate_grad_hook(self._arrive) for p in trained]
        ends = [self._blocks[-1], self._blocks[0]] if len(self._blocks) > 1 else []
        after = self._model.register_forward_hook(lambda *call: self._begin(1, call[-1]))
        self._handles.append(after)
        for phase, block in enumerate(ends, start=2):

            def before(*call: Any, phase: int = phase) -> None:
                self._begin(phase, call[1:])

            self._handles.append(block.register_forward_pre_hook(before, with_kwargs=True))
        return super().__enter__()

    def __exit__(self, *exception: Any) -> None:
        super().__exit__(*exception)
        for handle in self._handles:
            handle.remove()

    def _arrive(self, parameter: Tensor) -> None:
        if parameter.grad is not None:
            self._grads += parameter.grad.untyped_storage().nbytes()

    def _begin(self, phase: int, value: Any) -> None:
        """Begin a phase when the first tensor in ``value`` gets its gradient."""
        tensor = next(iter_tensors(value), None)
        if tensor is not None and tensor.requires_grad:
            tensor.register_hook(lambda _: setattr(self, "_phase", max(self._phase, phase)))

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Run an operation, and count what it makes and takes."""
        kwargs = kwargs or {}
        output = func(*args, **kwargs)
        made = list(iter_tensors([output]))
        if made and not func.is_view:
            count = _FLOPS.get(func._overloadpacket)
            flops = 0 if count is None else count(*args, **kwargs, out_val=output)
            self.touch((*made, *iter_tensors([args, kwargs])), flops)
        for tensor in made:
            self._note(tensor.untyped_storage())
        return output

    def touch(self, touched: Sequence[Tensor], flops: int = 0) -> None:
        """Count the time of an operation that reads and writes tensors once.

        A product reads its weight for each micro-batch anew, however few the rows.
        """
        speed, num_bytes = self._speed, sum(t.numel() * t.itemsize for t in touched)
        both = flops / speed.flops, num_bytes / speed.traffic
        self.seconds += speed.call + (max(both) if speed.overlaps else sum(both))

    def _note(self, storage: torch.UntypedStorage) -> None:
        key, num_bytes = storage._cdata, storage.nbytes()
        if key in self._alive:
            return

        def gone(_: Any) -> None:
            del self._alive[key]
            self._held -= num_bytes

        self._alive[key] = weakref.ref(storage, gone)
        self._held += num_bytes
        for peaks, held in (
            (self.peaks, self._held),
            (self.peaks_besides_grads, self._held - self._grads),
        ):
            peaks[self._phase] = max(peaks[self._phase], held)
