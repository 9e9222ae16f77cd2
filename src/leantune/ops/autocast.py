"""What autocast would do to a product, for autograd Functions that cast by themselves."""

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

_AS_IT_IS = nullcontext()
_WITHOUT = "meta"
"""The device that has no autocast, nor an answer to whether it is on."""


def autocast_dtype(x: Tensor) -> torch.dtype | None:
    """Return the dtype that autocast gives a product of ``x``, or None; float64 is left alone."""
    device = x.device.type
    is_off = device == _WITHOUT or not torch.is_autocast_enabled(device)
    return None if is_off or x.dtype == torch.float64 else torch.get_autocast_dtype(device)


def autocast_off(x: Tensor) -> AbstractContextManager[object]:
    """Return a context without autocast; entering one costs more than to ask whether it is on."""
    device = x.device.type
    is_off = device == _WITHOUT or not torch.is_autocast_enabled(device)
    return _AS_IT_IS if is_off else torch.autocast(device, enabled=False)
