"""What depends on the device: the only file that asks where a tensor lies.

A reference in ``x.py`` runs anywhere. A kernel for a GPU lies beside it, in ``x_triton.py``, and is
chosen here.
"""

from typing import TypeVar

import torch
from torch import Tensor

T = TypeVar("T")


def on_gpu(where: Tensor | torch.device) -> bool:
    """Return whether a tensor or a device is an NVIDIA GPU's."""
    device = where.device if isinstance(where, Tensor) else where
    return device.type == "cuda"


def by_device(where: Tensor | torch.device, *, cpu: T, gpu: T) -> T:
    """Return the one of two values, functions or limits that suits the device."""
    return gpu if on_gpu(where) else cpu


class LateCopy:
    """A late copy is read one step after it was begun, so that nobody waits for a GPU.

    Attributes:
        lags: whether a tensor is read late; what lies on the host is read at once.
    """

    lags = staticmethod(on_gpu)

    def __init__(self) -> None:
        self._begun: tuple[Tensor, torch.Event] | None = None

    def swap(self, tensor: Tensor) -> Tensor | None:
        """Begin to copy a tensor to the host, and return what the last call began, if any did."""
        if not self.lags(tensor):
            return tensor
        begun = self._begun
        copy = tensor.to("cpu", non_blocking=True)  # into pinned memory
        self._begun = copy, torch.cuda.current_stream(tensor.device).record_event()
        if begun is None:
            return None
        copy, is_done = begun
        is_done.synchronize()
        return copy

    def __getstate__(self) -> dict[str, None]:
        """Leave out what was begun: an event has no copy."""
        return {"_begun": None}
