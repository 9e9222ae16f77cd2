"""Optimisers for parameters with sparse gradients, stepped together with any other as one."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer, SparseAdam


class PairedOptimizer(Optimizer):
    """Several optimisers that act as one: joint groups, joint state, one ``step``.

    ``param_groups`` holds the parts' own groups, so schedulers reach every part; ``state_dict``
    covers all of them. A group that is added later goes to the first part.

    Args:
        parts: optimisers over disjoint parameters.
    """

    def __init__(self, parts: Sequence[Optimizer]) -> None:
        self.parts = list(parts)
        super().__init__([group for part in parts for group in part.param_groups], {})
        for part in parts:
            self.state.update(part.state)
        self._share()

    def _share(self) -> None:
        """Let the parts work on the joint state and on their share of the joint groups."""
        first = 0
        for part in self.parts:
            last = first + len(part.param_groups)
            part.param_groups = self.param_groups[first:last]
            part.state = self.state
            first = last

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group; the first part takes it, with its own defaults."""
        own = [group for part in self.parts for group in part.param_groups]
        if any(param_group is group for group in own):
            super().add_param_group(param_group)
            return
        self.parts[0].add_param_group(param_group)
        self.param_groups.insert(len(self.parts[0].param_groups) - 1, param_group)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Step every part once; ``closure`` is evaluated once, before."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for part in self.parts:
            part.step()
        return loss

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Put a joint state back and hand the parts their share."""
        super().load_state_dict(state_dict)
        self._share()

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "parts": self.parts}


def paired(
    kind: type[Optimizer],
    params: Sequence[nn.Parameter],
    sparse: Sequence[nn.Parameter],
    options: Mapping[str, Any],
) -> Optimizer:
    """Return ``kind`` over ``params``, joined by a sparse Adam over those with sparse gradients.

    Args:
        kind: any torch optimiser class.
        params: the parameters that train.
        sparse: those with sparse gradients.
        options: of ``kind``; the sparse Adam takes ``lr``, ``betas`` and ``eps`` of them. Weight
            decay is not applied to sparse gradients.
    """
    is_sparse = {id(p) for p in sparse}
    dense = [p for p in params if id(p) not in is_sparse]
    thin = [p for p in params if id(p) in is_sparse]
    parts: list[Optimizer] = [kind(dense, **options)] if dense else []
    if thin:
        shared = {k: options[k] for k in ("lr", "betas", "eps") if k in options}
        parts.append(SparseAdam(thin, **shared))
    return parts[0] if len(parts) == 1 else PairedOptimizer(parts)
