"""The recorder notes which module saves what for backward during one forward."""

import gc
import weakref
from bisect import bisect_right
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

import leantune.measure._graph as _graph
from leantune.core.tensors import iter_tensors
from leantune.measure.entries import Entry, StorageCounter
from leantune.measure.step import Step

BATCH_INPUT = "batch input"
HIDDEN = "hidden on ctx"


class _Saved:
    """A saved tensor is what the pack hook returns; it lives as long as backward holds it."""

    def __init__(self, tensor: Tensor, module: str) -> None:
        self.tensor = tensor
        self.module = module


class _Recorder:
    """A recorder keeps a stack of running modules and a weak list of what was saved, in order."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._stack: list[str] = []
        self._saved: list[weakref.ref[_Saved]] = []
        # (next sequence number of autograd, innermost module from there on), ascending
        self._events: list[tuple[int, str]] = [(0, "")]

    @contextmanager
    def recording(self) -> Generator[None, None, None]:
        handles: list[RemovableHandle] = []
        for name, module in _eager_modules(self._model):
            enter, leave = self._hooks(name)
            # First in, last out: what other hooks of the module save belongs to it.
            handles.append(module.register_forward_pre_hook(enter, prepend=True))
            handles.append(module.register_forward_hook(leave))
        try:
            with torch.autograd.graph.saved_tensors_hooks(self._pack, _unpack):
                yield
        finally:
            for handle in handles:
                handle.remove()

    def alive(self) -> list[_Saved]:
        """Return what is still held, in the order of saving."""
        return [saved for ref in self._saved if (saved := ref()) is not None]

    def module_of(self, node: _graph.Node) -> str:
        """Return the innermost module that ran when the node was made."""
        at = bisect_right(self._events, node._sequence_nr(), key=lambda event: event[0])
        return self._events[max(at - 1, 0)][1]

    def _hooks(self, name: str) -> tuple[Callable[..., None], Callable[..., None]]:
        def enter(*_: Any) -> None:
            self._stack.append(name)
            self._mark()

        def leave(*_: Any) -> None:
            self._stack.pop()
            self._mark()

        return enter, leave

    def _mark(self) -> None:
        self._events.append((_next_sequence_number(), self._current()))

    def _current(self) -> str:
        return self._stack[-1] if self._stack else ""

    def _pack(self, tensor: Tensor) -> _Saved:
        # The tensor itself may be the node's own output: a cycle that nothing would ever free.
        saved = _Saved(tensor.detach(), self._current())
        self._saved.append(weakref.ref(saved))
        return saved


def _unpack(saved: _Saved) -> Tensor:
    return saved.tensor


def record_forward(step: Step, weights: StorageCounter) -> tuple[list[Entry], Tensor]:
    """Run the forward and return (entries of activations, loss).

    Args:
        step: the model in training mode and its batch.
        weights: storages that are no activations.
    """
    recorder = _Recorder(step.model)
    with recorder.recording():
        output, loss = step.forward()
    classes = {name: type(module).__name__ for name, module in _named_modules(step.model)}
    batch = {
        _graph.storage_key(part) for tensor in step.tensors() for part in _graph.dense_parts(tensor)
    }
    # A forward may replace a buffer; the new one is a weight as well.
    not_ours = weights.keys() | {_graph.storage_key(b) for b in step.model.buffers()}

    counter = StorageCounter("activations")

    def add(tensor: Tensor, kind: str, module: str, operation: str) -> None:
        for part in _graph.dense_parts(tensor):
            key = _graph.storage_key(part)
            if key not in not_ours:
                counter.add(part, BATCH_INPUT if key in batch else kind, module, operation)

    labels: dict[int, tuple[str, str]] = {}
    foreign: list[tuple[Tensor, str, str, str]] = []
    is_checkpointed = False
    for node in _graph.walk([loss, *iter_tensors(output)]):
        name = _graph.operation(node)
        for field, data in _graph.packed_data(node):
            if isinstance(data, _Saved):
                labels[id(data)] = (_graph.kind_of(node, field), name)
                continue
            is_checkpointed |= type(data).__module__ == "torch.utils.checkpoint"
            for tensor in iter_tensors(data):
                kind = _graph.kind_of(node, field)
                foreign.append((tensor, kind, recorder.module_of(node), name))
        for _, tensor in _graph.hidden_tensors(node):
            foreign.append((tensor, HIDDEN, recorder.module_of(node), name))

    # Unlabelled ones lie outside the graph of the loss: perhaps in a reference cycle that the
    # forward left behind. A collection takes 0.1 s, hence only where it can matter.
    if any(id(saved) not in labels for saved in recorder.alive()):
        gc.collect()
    for saved in recorder.alive():
        kind, name = labels.get(id(saved), ("", ""))
        if not kind:
            # Held, but by a node outside the graph of the loss: the frame of a checkpoint.
            kind = _graph.CHECKPOINT if is_checkpointed else classes[saved.module]
            name = kind
        elif kind == "elementwise" and "Dropout" in classes[saved.module]:
            kind = "dropout"
        add(saved.tensor, kind, saved.module, name)
    for tensor, kind, module, name in foreign:
        add(tensor, kind, module, name)
    return counter.entries(), loss


def _named_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    return cast("Iterator[tuple[str, nn.Module]]", model.named_modules())


def _eager_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    compiled: list[str] = []
    for name, module in _named_modules(model):
        # Hooks would be traced into the compiled region and outlive the measurement there.
        if any(name == c or name.startswith(f"{c}.") for c in compiled):
            continue
        if getattr(module, "_compiled_call_impl", None) is not None:
            compiled.append(name)
            continue
        if "_orig_mod" in dict(module.named_children()):
            compiled.append(f"{name}._orig_mod".removeprefix("."))
        yield name, module


def _next_sequence_number() -> int:
    return torch.autograd._get_sequence_nr()  # pyright: ignore[reportPrivateUsage, reportPrivateImportUsage]
