"""Optimisers for parameters with sparse gradients, stepped together with any other as one."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer, SparseAdam

from leantune.errors import ConfigError


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


class EntryAdam(Optimizer):
    """Adam for sparse gradients that counts the steps of every entry by itself.

    ``torch.optim.SparseAdam`` corrects the bias of an entry's first step as if it were the
    optimiser's n-th: such an entry moves by up to 3.2 times the learning rate. Here a first step is
    a first step, of one learning rate, whenever it comes.

    Args:
        params: parameters with sparse gradients.
        lr: the learning rate.
        betas: decay of the two moments.
        eps: added to the root of the second moment.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Move the entries that have a gradient; the others' moments do not decay."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    self._move(p, p.grad.coalesce(), group)
        return loss

    def _move(self, p: Tensor, grad: Tensor, group: dict[str, Any]) -> None:
        state = self.state[p]
        if not state:
            state["steps"] = torch.zeros_like(p, dtype=torch.float32)
            state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(p), torch.zeros_like(p)
        at, g = tuple(grad.indices()), grad.values()
        beta1, beta2 = group["betas"]
        steps = state["steps"][at] + 1
        m = state["exp_avg"][at].lerp(g, 1 - beta1)
        v = state["exp_avg_sq"][at].lerp(g.square(), 1 - beta2)
        state["steps"][at], state["exp_avg"][at], state["exp_avg_sq"][at] = steps, m, v
        corrected = (v / (1 - beta2**steps)).sqrt() + group["eps"]
        move = m / (1 - beta1**steps) / corrected * -group["lr"]
        p.index_put_(at, move.to(p.dtype), accumulate=True)


def paired(
    kind: type[Optimizer],
    params: Sequence[nn.Parameter],
    sparse: Mapping[nn.Parameter, bool],
    options: Mapping[str, Any],
) -> Optimizer:
    """Return ``kind`` over ``params``, joined by a sparse Adam over those with sparse gradients.

    Args:
        kind: any torch optimiser class.
        params: the parameters that train.
        sparse: those with sparse gradients -> whether bias is corrected for each entry.
        options: of ``kind``; the sparse Adam takes ``lr``, ``betas`` and ``eps`` of them. Weight
            decay is not applied to sparse gradients.
    """
    dense = [p for p in params if p not in sparse]
    shared = {k: options[k] for k in ("lr", "betas", "eps") if k in options}
    parts: list[Optimizer] = [kind(dense, **options)] if dense else []
    for of_entry, sparse_kind in ((False, SparseAdam), (True, EntryAdam)):
        chosen = [p for p in params if sparse.get(p) is of_entry]
        if chosen:
            parts.append(sparse_kind(chosen, **shared))
    return parts[0] if len(parts) == 1 else PairedOptimizer(parts)


def refuse_dense(optimizer: Optimizer, sparse: Mapping[nn.Parameter, bool]) -> None:
    """Raise where an optimiser for dense gradients holds a parameter with sparse ones.

    Raises:
        ConfigError: there is such a parameter.
    """
    parts = optimizer.parts if isinstance(optimizer, PairedOptimizer) else [optimizer]
    for part in parts:
        held = [p for group in part.param_groups for p in group["params"] if p in sparse]
        if held and not isinstance(part, SparseAdam | EntryAdam | torch.optim.SGD):
            raise ConfigError(
                f"session: optimizer must take sparse gradients, got {type(part).__name__} over "
                f"{len(held)} parameters that have them; make it with "
                f"session.optimizer(torch.optim.{type(part).__name__}, lr=...)"
            )
