"""Several processes that train one model: who this one is, what all agree on, and their shards."""

from collections.abc import Sequence

from torch import Tensor, nn
from torch import distributed as dist


def rank() -> int:
    """Return this process's number in the default group, 0 in a lone process."""
    return dist.get_rank() if _is_grouped() else 0


def is_several() -> bool:
    """Return whether other processes train the same model."""
    return _is_grouped() and dist.get_world_size() > 1


def sum_over_ranks(tensor: Tensor) -> Tensor:
    """Return the sum over all processes, the same bits in each; the tensor may be overwritten.

    All processes must call it, in one order; in a lone process it does nothing.
    """
    if not is_several():
        return tensor
    total = tensor.contiguous()
    dist.all_reduce(total)
    return total


def mean_over_ranks(tensor: Tensor) -> Tensor:
    """Return the mean over all processes, as :func:`sum_over_ranks` does the sum."""
    return sum_over_ranks(tensor) / dist.get_world_size() if is_several() else tensor


def of_first_rank(tensor: Tensor) -> Tensor:
    """Return the first process's values, in every process; the tensor may be overwritten.

    All processes must call it, in one order and with one shape; in a lone process it does nothing.
    """
    if not is_several():
        return tensor
    values = tensor.contiguous()
    dist.broadcast(values, src=0)
    return values


# Told by an attribute: importing DTensor would cost every lone process that never meets one.
def is_sharded(tensor: Tensor) -> bool:
    """Return whether this process holds its share of a tensor alone, as under FSDP2."""
    return hasattr(tensor, "device_mesh")


def whole(tensor: Tensor) -> Tensor:
    """Return all of a sharded tensor, gathered from all processes; others as they are."""
    return tensor.full_tensor() if is_sharded(tensor) else tensor  # type: ignore[attr-defined, operator]


def share_of(values: Tensor, like: Tensor) -> Tensor:
    """Return what this process holds of ``values`` where they are sharded like ``like``.

    Every process has all the values already, so nothing is sent.
    """
    if not is_sharded(like):
        return values
    from torch.distributed.tensor import distribute_tensor

    mesh, placements = like.device_mesh, like.placements  # type: ignore[attr-defined]
    return distribute_tensor(values, mesh, placements, src_data_rank=None)


def sharded_with_root(model: nn.Module, names: Sequence[str]) -> str | None:
    """Return the first of the modules that FSDP2 shards with the model itself, or None.

    Their parameters are whole as soon as the model's forward begins, and freed after it: what is
    written into them then is lost.
    """
    if not (names and _is_grouped()):
        return None
    from torch.distributed.fsdp import FSDPModule

    if not isinstance(model, FSDPModule):
        return None
    sharded = [n for n, module in model.named_modules() if n and isinstance(module, FSDPModule)]
    inside = tuple(f"{name}." for name in sharded)
    return next((n for n in names if n not in sharded and not n.startswith(inside)), None)


def _is_grouped() -> bool:
    return dist.is_available() and dist.is_initialized()
