"""Several processes that train one model: which one this is, what all agree on, and shards."""

import os

from torch import Tensor
from torch import distributed as dist


def rank() -> int:
    """Return this process's number in the default group, 0 in a lone process."""
    return dist.get_rank() if _is_grouped() else 0


def is_first_process() -> bool:
    """Return whether this process prints and writes for all: the first of them, or a lone one.

    Before there is a group, its number is the one that the launcher gave it (``RANK``).
    """
    return (rank() if _is_grouped() else int(os.environ.get("RANK", "0"))) == 0


def is_distributed() -> bool:
    """Return whether other processes train the same model."""
    return _is_grouped() and dist.get_world_size() > 1


def sum_over_ranks(tensor: Tensor) -> Tensor:
    """Return the sum over all processes, the same bits in each; the tensor may be overwritten.

    All processes must call it, in one order; in a lone process it does nothing.
    """
    if not is_distributed():
        return tensor
    total = tensor.contiguous()
    dist.all_reduce(total)
    return total


def broadcast(tensor: Tensor) -> Tensor:
    """Return the first process's values, in every process; the tensor may be overwritten.

    All processes must call it, in one order and with one shape; in a lone process it does nothing.
    """
    if not is_distributed():
        return tensor
    values = tensor.contiguous()
    dist.broadcast(values, src=0)
    return values


# Told by an attribute: importing DTensor would cost every lone process that never meets one.
def is_sharded(tensor: Tensor) -> bool:
    """Return whether this process holds a shard of the tensor alone, as under FSDP2."""
    return hasattr(tensor, "device_mesh")


def full_tensor(tensor: Tensor) -> Tensor:
    """Return a sharded tensor in full, gathered from all processes; others as they are."""
    return tensor.full_tensor() if is_sharded(tensor) else tensor  # type: ignore[attr-defined, operator]


def shard_like(values: Tensor, like: Tensor) -> Tensor:
    """Return this process's shard of ``values``, sharded as ``like`` is.

    Every process has all the values already, so nothing is sent. Where ``like`` is no shard, the
    values come back as they are.
    """
    if not is_sharded(like):
        return values
    from torch.distributed.tensor import distribute_tensor

    mesh, placements = like.device_mesh, like.placements  # type: ignore[attr-defined]
    return distribute_tensor(values, mesh, placements, src_data_rank=None)


def _is_grouped() -> bool:
    return dist.is_available() and dist.is_initialized()
