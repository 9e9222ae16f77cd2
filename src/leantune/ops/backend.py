"""What depends on the device: the only file that asks where a tensor lies.

A reference in ``x.py`` runs anywhere. A kernel for a GPU lies beside it, in ``x_triton.py``, and is
chosen here.
"""

import os
from collections.abc import Callable
from importlib.util import find_spec
from types import ModuleType
from typing import TypeVar

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from leantune.errors import ConfigError, UnsupportedError
from leantune.ops import rows
from leantune.ops.launches_triton import sees_launches

T = TypeVar("T")

# Read once, since a compiler follows what reads them.
_HAS_TRITON = find_spec("triton") is not None
_IS_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
_FORCED = os.environ.get("LEANTUNE_KERNELS", "")


def on_gpu(where: Tensor | torch.device) -> bool:
    """Return whether a tensor or a device is an NVIDIA GPU's."""
    device = where.device if isinstance(where, Tensor) else where
    return device.type == "cuda"


def own_device() -> torch.device:
    """Return where this machine trains a model: on its GPU, if it has one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def is_fake(tensor: Tensor) -> bool:
    """Return whether a tensor has a shape and a device, but no numbers: a forecast's."""
    return isinstance(tensor, FakeTensor)


def by_device(where: Tensor | torch.device, *, cpu: T, gpu: T) -> T:
    """Return the one of two values, functions or limits that suits the device."""
    return gpu if on_gpu(where) else cpu


def read_later(tensor: Tensor) -> Callable[[], list[int]]:
    """Start to copy whole numbers to the host; return what waits for that copy alone.

    What is launched meanwhile keeps a GPU busy while the host waits.
    """
    copy = tensor.to("cpu", non_blocking=True)  # pinned
    if not on_gpu(tensor):
        return copy.tolist
    copied = torch.cuda.current_stream(tensor.device).record_event()

    def read() -> list[int]:
        copied.synchronize()
        return copy.tolist()

    return read


def row_functions(where: Tensor) -> ModuleType:
    """Return whose functions work on a tensor's rows: ``ops.rows``, or the kernels beside it.

    Kernels serve an NVIDIA GPU. ``LEANTUNE_KERNELS=reference`` does without them, and ``triton``
    insists; the latter serves the CPU where Triton interprets. Rows of float64 have no kernel, and
    rows without numbers none that launches.

    Raises:
        ConfigError: an unknown ``LEANTUNE_KERNELS``.
        UnsupportedError: kernels are insisted on and cannot run.
    """
    if _FORCED not in ("", "triton", "reference"):
        raise ConfigError(
            f"LEANTUNE_KERNELS: must be 'triton', 'reference' or unset, got {_FORCED!r}"
        )
    is_on_gpu = where.device.type == "cuda"
    can_run = _HAS_TRITON and (is_on_gpu or _IS_INTERPRETED)
    if _FORCED == "triton" and not can_run:
        lacks = f"a tensor lies on {where.device}" if _HAS_TRITON else "triton is not installed"
        raise UnsupportedError(
            f"LEANTUNE_KERNELS: 'triton' needs an NVIDIA GPU and triton, but {lacks}; unset it"
        )
    is_wanted = _FORCED == "triton" or (_FORCED == "" and can_run and is_on_gpu)
    if not is_wanted or where.dtype == torch.float64 or (is_fake(where) and not sees_launches()):
        return rows
    from leantune.ops import rows_triton

    return rows_triton


def num_launches() -> int:
    """Return how many kernels of ours were launched in this process."""
    if not _HAS_TRITON:
        return 0
    from leantune.ops import rows_triton

    return rows_triton.LAUNCHES.total()


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
