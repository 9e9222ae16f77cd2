"""Launches that are looked at instead: what a forecast counts where nothing can run."""

from collections.abc import Callable, Generator
from contextlib import contextmanager
from importlib.util import find_spec
from typing import Any

from torch import Tensor

_is_seeing = False


def sees_launches() -> bool:
    """Return whether launches are looked at instead; see :func:`launches_seen`."""
    return _is_seeing


@contextmanager
def launches_seen(see: Callable[[list[Tensor]], None]) -> Generator[None]:
    """Let Triton's kernels, ours and others', launch nothing inside.

    What they would write stays as it was allocated: enough where shapes are all that counts.

    Args:
        see: gets the tensors that each launch would read and write.
    """
    global _is_seeing
    if find_spec("triton") is None:
        yield
        return
    from triton.runtime import jit  # type: ignore

    kernels: Any = jit.KernelInterface

    def launcher(kernel: Any, grid: Any) -> Callable[..., None]:
        return lambda *args, **options: see(
            [arg for arg in (*args, *options.values()) if isinstance(arg, Tensor)]
        )

    launch = kernels.__getitem__
    kernels.__getitem__, _is_seeing = launcher, True
    try:
        yield
    finally:
        kernels.__getitem__, _is_seeing = launch, False
