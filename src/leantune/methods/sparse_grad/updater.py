"""How trained values reach the dense weights of linears, in one process or in shards."""

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch import distributed as dist

from leantune.core.distributed import full_tensor, is_sharded, shard_like
from leantune.methods.sparse_grad import maths
from leantune.methods.sparse_grad.subspace import SubspaceRule


class WeightUpdater:
    """A weight updater keeps one linear's dense weight up to date with what the rule trains.

    With ``W0`` the weight before training, the linear has ``W0 + Q_out scatter(delta) Q_in^T``.
    ``merged_delta`` says which part of ``delta`` the dense weight holds already. Both travel with
    the model's state, so that a checkpoint of all three, or ``delta`` alone on the base model, come
    out right.
    """

    def __init__(self, rule: SubspaceRule) -> None:
        self.rule = rule
        self._seen: tuple[int, int] | None = None
        self._num_backwards = -1
        self._counts_versions = False

    def start(self) -> None:
        """Act on new bases; a delta starts at zero in any basis."""

    @torch.no_grad()
    def update(self) -> None:
        """Add to the dense weight what it lacks of ``delta``; do nothing where it lacks nothing."""
        if self.rule.bases is None:
            return
        module, delta = self.rule.module, self.rule.parameter
        merged = module.get_parameter("merged_delta")
        if self._is_current(delta, merged):
            return
        change = self.rule.change(full_tensor(delta - merged))
        module.weight.add_(shard_like(self.rule.laid_out(change), module.weight))
        merged.copy_(delta)

    def _is_current(self, delta: Tensor, merged: Tensor) -> bool:
        if delta.device.type == "cpu" and not is_sharded(delta):
            return torch.equal(delta, merged)
        # A comparison would wait for the device, or for other ranks. The version counter tells for
        # most optimisers; fused ones do not move it, so it is trusted once it has moved after a
        # backward.
        now = (id(delta), delta._version)
        had_backward = self._num_backwards != self.rule.num_backwards
        has_moved = now != self._seen
        is_same = self._seen is not None and self._seen[0] == now[0]
        self._counts_versions |= has_moved and is_same and had_backward
        is_current = not has_moved and (self._counts_versions or not had_backward)
        self._seen, self._num_backwards = now, self.rule.num_backwards
        return is_current


class RotatedWeightUpdater(WeightUpdater):
    """A rotated-weight updater writes the dense weight anew from the rotated weight that trains."""

    @torch.no_grad()
    def start(self) -> None:
        """Rotate the parameter into the new bases; the dense weight stays as it is."""
        assert self.rule.bases is not None
        trained = self.rule.parameter
        trained.copy_(maths.rotate(trained, *self.rule.bases.to_device_of(trained)))
        self._seen = (id(trained), trained._version)

    @torch.no_grad()
    def update(self) -> None:
        """Write the dense weight anew where the rotated one has moved."""
        trained, bases = self.rule.parameter, self.rule.bases
        now = (id(trained), trained._version)
        if bases is None or now == self._seen:
            return
        q_out, q_in = bases.to_device_of(trained)
        dense = maths.rotate(trained, q_out.t(), q_in.t())
        self.rule.module.weight.copy_(self.rule.laid_out(dense))
        self._seen = now


def sharded_with_root(model: nn.Module, names: Iterable[str]) -> str | None:
    """Return the first of the modules that FSDP2 shards with the model itself, or None.

    Their parameters are gathered before the model's forward begins and freed after it: what is
    written into them then is lost. A lone process does not read ``names``.
    """
    if not (dist.is_available() and dist.is_initialized()):
        return None
    from torch.distributed.fsdp import FSDPModule

    if not isinstance(model, FSDPModule):
        return None
    sharded = [n for n, module in model.named_modules() if n and isinstance(module, FSDPModule)]
    inside = tuple(f"{name}." for name in sharded)
    return next((n for n in names if n not in sharded and not n.startswith(inside)), None)
