"""A measurement notes everything that running the model disturbs, and puts it back."""

from collections.abc import Generator, Iterable
from contextlib import contextmanager
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, nn

from leantune.ops.backend import is_fake, on_gpu


class RandomState:
    """A random state remembers the generators of the CPU and of the GPUs in use."""

    def __init__(self, tensors: Iterable[Tensor]) -> None:
        self._cpu = torch.get_rng_state()
        # A model on the CPU must not create a CUDA context.
        devices = {t.device for t in tensors if on_gpu(t)}
        self._cuda = {device: torch.cuda.get_rng_state(device) for device in devices}

    def restore(self) -> None:
        """Set the generators back, so that the next run draws the same dropout masks."""
        torch.set_rng_state(self._cpu)
        for device, state in self._cuda.items():
            torch.cuda.set_rng_state(state, device)


def find_session(model: nn.Module) -> Any | None:
    """Return the run state that a conversion left on the model or on the model it wraps."""
    for module in model.modules():
        session = getattr(module, "_leantune_session", None)
        if session is not None:
            return session
    return None


@contextmanager
def restored_afterwards(
    model: nn.Module, tensors: Iterable[Tensor] = ()
) -> Generator[RandomState, None, None]:
    """Run the body with no gradients present, then put everything back as it was.

    Covers training flags, ``.grad`` of parameters and of leaves among ``tensors`` (the same
    objects come back), buffer objects and values, generator states, and the session of a
    converted model. Parameter values are not covered: a measurement takes no optimizer step.

    Yields:
        The generator states on entry.
    """
    tensors = list(tensors)
    leaves = [*model.parameters(), *(t for t in tensors if t.is_leaf and t.requires_grad)]
    flags = [(module, module.training) for module in model.modules()]
    grads = [(leaf, leaf.grad) for leaf in leaves]
    buffers = [
        (module, name, buffer, buffer.detach().clone())
        for module in model.modules()
        for name, buffer in module.named_buffers(recurse=False, remove_duplicate=False)
    ]
    random = RandomState([*model.parameters(), *model.buffers(), *tensors])
    session = find_session(model)
    # A copy: a session may update the tensors of its state in place.
    state = None if session is None else deepcopy(session.state_dict())
    try:
        for leaf in leaves:
            leaf.grad = None
        yield random
    finally:
        for module, training in flags:
            module.training = training
        for leaf, grad in grads:
            leaf.grad = grad
        with torch.no_grad():
            for module, name, buffer, value in buffers:
                # Not through setattr: a forward may have deleted the name.
                vars(module)["_buffers"][name] = buffer
                # An unneeded write would invalidate graphs of the caller that saved the buffer.
                if not (is_fake(buffer) or _equal(buffer, value)):
                    buffer.copy_(value)
        random.restore()
        if session is not None:
            session.load_state_dict(state)


def _equal(a: Tensor, b: Tensor) -> bool:
    return a.layout == torch.strided and a.shape == b.shape and torch.equal(a, b)
