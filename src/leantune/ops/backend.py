"""Where a tensor lies: the only file that asks for the kind of a device."""

from typing import TypeVar

import torch
from torch import Tensor

T = TypeVar("T")


def on_gpu(x: Tensor | torch.device) -> bool:
    """Return whether a tensor or device is an NVIDIA or AMD GPU."""
    device = x.device if isinstance(x, Tensor) else x
    return device.type == "cuda"


def by_device(x: Tensor | torch.device, *, cpu: T, gpu: T) -> T:
    """Return the value for the kind of device that ``x`` is on."""
    return gpu if on_gpu(x) else cpu
