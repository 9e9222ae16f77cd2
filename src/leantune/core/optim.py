"""An optimiser for parameters with sparse gradients, stepped together with any other as one."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer, SparseAdam

from leantune.errors import ConfigError

OF_SPARSE = ("lr", "betas", "eps")
"""Options that the sparse Adam takes from those of the other optimiser."""


class PairedOptimizer(Optimizer):
    """A sparse Adam and any other optimiser that act as one: joint groups and state, one step.

    Schedulers reach both through ``param_groups``, and ``state_dict`` covers both. The first group
    is the sparse Adam's; all others, later ones included, are the other optimiser's.
    """

    def __init__(self, sparse: SparseAdam, dense: Optimizer) -> None:
        self.sparse, self.dense = sparse, dense
        # Some optimisers have a state before their first step; adding groups, which the base class
        # may do by our own method, puts the joint state in its place.
        started = dict(dense.state)
        super().__init__([*sparse.param_groups, *dense.param_groups], {})
        self.defaults = dense.defaults
        self.state.update(started)
        self._share()

    def _share(self) -> None:
        self.sparse.param_groups, self.dense.param_groups = (
            self.param_groups[:1],
            self.param_groups[1:],
        )
        self.sparse.state = self.dense.state = self.state

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group, which the other optimiser steps."""
        super().add_param_group(param_group)
        self._share()

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """Step both once; ``closure`` is evaluated once, before."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self.sparse.step()
        self.dense.step()
        return loss

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Put a joint state back."""
        super().load_state_dict(state_dict)
        self._share()

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "sparse": self.sparse, "dense": self.dense}


def paired(
    kind: type[Optimizer],
    parameters: Iterable[nn.Parameter],
    sparse: Iterable[nn.Parameter],
    options: Mapping[str, Any],
) -> Optimizer:
    """Return ``kind`` over what trains, joined by a sparse Adam over those with sparse gradients.

    Args:
        kind: any torch optimiser class.
        parameters: of the model; ones that do not train are left out.
        sparse: those with sparse gradients.
        options: of ``kind``; the sparse Adam takes ``lr``, ``betas`` and ``eps`` of them. Weight
            decay is not applied to sparse gradients.

    Raises:
        ConfigError: nothing trains, or ``kind`` is no optimiser class or refuses the options.
    """
    if not (isinstance(kind, type) and issubclass(kind, Optimizer)):
        raise ConfigError(
            f"session.optimizer: kind must be a class of torch.optim, got {kind!r}; for example "
            "torch.optim.AdamW"
        )
    params = [p for p in parameters if p.requires_grad]
    if not params:
        raise ConfigError(
            "session.optimizer: the model must have a trainable parameter, got none; set "
            "requires_grad on what should train"
        )
    is_sparse = set(sparse)
    dense = [p for p in params if p not in is_sparse]
    chosen = [p for p in params if p in is_sparse]
    try:
        if not chosen:
            return kind(dense, **options)
        adam = SparseAdam(chosen, **{k: options[k] for k in OF_SPARSE if k in options})
        return PairedOptimizer(adam, kind(dense, **options)) if dense else adam
    except (TypeError, ValueError) as error:
        raise ConfigError(
            f"session.optimizer: options must suit {kind.__name__}, got {dict(options)}: {error}"
        ) from error
