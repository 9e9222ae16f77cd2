"""What autocast would do to a product, for autograd Functions that cast by themselves."""

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor


def autocast_dtype(x: Tensor) -> torch.dtype | None:
    """Return the dtype that autocast gives a product of ``x``, or None; float64 is left alone."""
    device = x.device.type
    if x.dtype == torch.float64 or not torch.amp.is_autocast_available(device):
        return None
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None


def autocast_off(x: Tensor) -> AbstractContextManager[object]:
    """Return a context without autocast; devices such as meta have none to switch off."""
    device = x.device.type
    if torch.amp.is_autocast_available(device):
        return torch.autocast(device, enabled=False)
    return nullcontext()
