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
