"""A meter watches a step's operations: the most bytes held at once, and what there is to do."""

import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count

from leantune.core.tensors import iter_tensors

NUM_PHASES = 4
"""Forward, backward to the input of the last block, to that of the first one, and to the end.

In each of these every further block adds the same to the most bytes that are held."""


def _attention(query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> int:
    return sdpa_flop_count(query.shape, key.shape, value.shape)


def _attention_backward(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, *_: Any, **__: Any) -> int:
    return sdpa_backward_flop_count(grad.shape, q.shape, k.shape, v.shape)


_ON_CPU = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_ON_CPU_BACKWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
_FLOPS: Mapping[Any, Callable[..., int]] = {
    **flop_registry,
    # Torch itself counts attention on a GPU alone.
    _ON_CPU: _attention,
    _ON_CPU_BACKWARD: _attention_backward,
}


class Meter(TorchDispatchMode):
    """A meter counts each storage from the operation that makes it until nobody holds it.

    Args:
        model: whose step is run inside.
        blocks: of the model, in order.
        known: what exists anyway: weights and the batch.

    Attributes:
        peaks: most bytes held at once, by phase.
        peaks_besides_grads: the same without gradients that have reached their parameters.
        flops: of products and attention.
        traffic: bytes that the other operations read and write.
        num_operations: how many there were, views left out.
    """

    def __init__(
        self, model: nn.Module, blocks: Sequence[nn.Module], known: Iterable[Tensor]
    ) -> None:
        super().__init__()
        self._model = model
        self._ends = [blocks[-1], blocks[0]] if len(blocks) > 1 else []
        self._handles: list[Any] = []
        self._alive = {_key(t): None for t in (*model.parameters(), *model.buffers(), *known)}
        self._weak: dict[int, Any] = {}
        self._held = self._grads = self._phase = 0
        self.peaks = [0] * NUM_PHASES
        self.peaks_besides_grads = [0] * NUM_PHASES
        self.flops = self.traffic = self.num_operations = 0

    def __enter__(self) -> "Meter":
        trained = [p for p in self._model.parameters() if p.requires_grad]
        self._handles = [p.register_post_accumulate_grad_hook(self._arrive) for p in trained]

        def after(_: nn.Module, args: Any, output: Any) -> None:
            self._begin_with_gradient_of(output, phase=1)

        self._handles.append(self._model.register_forward_hook(after))
        for phase, block in enumerate(self._ends, start=2):

            def before(_: nn.Module, args: Any, kwargs: Any, phase: int = phase) -> None:
                self._begin_with_gradient_of((args, kwargs), phase)

            self._handles.append(block.register_forward_pre_hook(before, with_kwargs=True))
        return super().__enter__()

    def __exit__(self, *exception: Any) -> None:
        super().__exit__(*exception)
        for handle in self._handles:
            handle.remove()

    def _arrive(self, parameter: Tensor) -> None:
        if parameter.grad is not None:
            self._grads += parameter.grad.untyped_storage().nbytes()

    def _begin_with_gradient_of(self, value: Any, phase: int) -> None:
        """Begin a phase when the first tensor in ``value`` has its gradient."""

        def begin(_: Tensor) -> None:
            self._phase = max(self._phase, phase)

        tensor = next(iter_tensors(value), None)
        if tensor is not None and tensor.requires_grad:
            tensor.register_hook(begin)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Run an operation, and count what it makes and what it takes."""
        output = func(*args, **(kwargs or {}))
        made = list(iter_tensors([output]))
        flops = _FLOPS.get(func._overloadpacket)
        if flops is not None:
            self.flops += flops(*args, **(kwargs or {}), out_val=output)
        if made and not func.is_view:
            self.num_operations += 1
            if flops is None:
                touched = [*made, *iter_tensors([args, kwargs or {}])]
                self.traffic += sum(t.numel() * t.itemsize for t in touched)
        for tensor in made:
            self._note(tensor.untyped_storage())
        return output

    def _note(self, storage: torch.UntypedStorage) -> None:
        key, num_bytes = storage._cdata, storage.nbytes()
        if key in self._alive:
            return

        def gone(_: Any) -> None:
            del self._alive[key]
            self._held -= num_bytes

        self._alive[key] = weakref.ref(storage, gone)
        self._held += num_bytes
        phase = self._phase
        self.peaks[phase] = max(self.peaks[phase], self._held)
        besides = self._held - self._grads
        self.peaks_besides_grads[phase] = max(self.peaks_besides_grads[phase], besides)


def _key(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata
