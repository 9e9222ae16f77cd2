"""What autocast would do to a product, for autograd Functions that cast by themselves."""

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

_AS_IT_IS = nullcontext()


def autocast_dtype(x: Tensor) -> torch.dtype | None:
    """Return the dtype that autocast gives a product of ``x``, or None; float64 is left alone."""
    device = x.device.type
    if x.dtype == torch.float64 or not _is_on(device):
        return None
    return torch.get_autocast_dtype(device)


def autocast_off(x: Tensor) -> AbstractContextManager[object]:
    """Return a context without autocast; entering one costs more than to ask whether it is on."""
    device = x.device.type
    return torch.autocast(device, enabled=False) if _is_on(device) else _AS_IT_IS


def _is_on(device: str) -> bool:
    # The meta device has no autocast that one could ask for.
    return device != "meta" and torch.is_autocast_enabled(device)
