"""The order of an FFN's hidden units: changed in place, put back; files keep the original one.

Legend: F hidden units.
"""

from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from leantune.core.ranks import share_of, whole
from leantune.core.session import Session
from leantune.core.sites import Site
from leantune.core.views import parameters_along
from leantune.errors import ConfigError, UnsupportedError


class HiddenUnits:
    """The hidden units of one FFN, whose order is free: any is the same function.

    The module that computes the FFN gets a buffer ``permutation``, (F,): the original number of
    each unit, which the session saves, too. Weights in the model's ``state_dict`` are in the
    original order and load in that order, so that they and adapters suit the plain model as they
    are.

    Args:
        site: the FFN.
        holder: the module that takes its place.
        linears: the names in ``holder`` of ``up``, ``down`` and, in a gated FFN, ``gate``.
        session: keeps the order.

    Raises:
        UnsupportedError: another module shares a weight, which would be reordered as well.
    """

    def __init__(
        self, site: Site, holder: nn.Module, linears: Mapping[str, str], session: Session
    ) -> None:
        self._holder = holder
        self._linears = linears
        own = {id(parameter) for _, parameter, _ in self._parameters()}
        names: dict[int, str] = {}
        for name, parameter in session.model.named_parameters(remove_duplicate=False):
            first = names.setdefault(id(parameter), name)
            if id(parameter) in own and first != name:
                raise UnsupportedError(
                    f"{site.name}: hidden units can be reordered only where no weight is shared, "
                    f"got {first} tied to {name}; leave the site out with sites=, or keep the order"
                )
        _, weight, dim = next(self._parameters())
        units = torch.arange(weight.shape[dim], device=weight.device)
        holder.register_buffer("permutation", units)
        # (torch marks the hook, which a bound method does not allow.)
        holder.register_state_dict_post_hook(partial(self._to_original))
        holder.register_load_state_dict_pre_hook(self._from_original)
        session.keep_state(f"units.{site.name}", self)

    @property
    def permutation(self) -> Tensor:
        """The original number of each unit, (F,) int64."""
        return self._holder.get_buffer("permutation")

    @torch.no_grad()
    def reorder(self, order: Tensor) -> None:
        """Reorder the units in everything that has them: weights, biases, adapters' factors.

        Args:
            order: (F,) int64: the new unit i is the present unit ``order[i]``.
        """
        for _, parameter, dim in self._parameters():
            parameter.copy_(_selected(parameter, dim, order))
        self.permutation.copy_(self.permutation.index_select(0, order))

    def restore(self) -> None:
        """Put the units back into their original order."""
        self.reorder(self.permutation.argsort())

    def state_dict(self) -> dict[str, Tensor]:
        """Return the order, as the session saves it."""
        return {"permutation": self.permutation.cpu()}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take on a saved order; the function stays.

        Raises:
            ConfigError: no order of these units.
        """
        now = self.permutation
        wanted = state.get("permutation", torch.empty(0)).to(now.device)
        if wanted.shape != now.shape or not torch.equal(wanted.sort().values, now.sort().values):
            raise ConfigError(
                f"session: permutation must be an order of {len(now)} hidden units, got a tensor "
                f"of shape {tuple(wanted.shape)}; load the state with the model it was saved with"
            )
        self.reorder(now.argsort()[wanted])

    def _parameters(self) -> Iterator[tuple[str, nn.Parameter, int]]:
        """Yield name in the holder, parameter and dimension of everything that has the units."""
        for part, name in self._linears.items():
            linear = self._holder.get_submodule(name)
            for tail, parameter, dim in parameters_along(linear, int(part == "down")):
                yield f"{name}.{tail}", parameter, dim

    def _to_original(self, holder: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
        self._reorder_entries(state, prefix, self.permutation.argsort())

    def _from_original(
        self, holder: nn.Module, state: dict[str, Any], prefix: str, *_: Any
    ) -> None:
        if f"{prefix}permutation" in state:
            # A router knows the groups that it was saved with.
            self.load_state_dict({"permutation": state[f"{prefix}permutation"]})
        self._reorder_entries(state, prefix, self.permutation)

    def _reorder_entries(self, state: dict[str, Any], prefix: str, order: Tensor) -> None:
        for name, parameter, dim in self._parameters():
            entry = state.get(prefix + name)
            # Of another shape: torch says so.
            if entry is not None and entry.shape == parameter.shape:
                state[prefix + name] = _selected(entry, dim, order)


def _selected(tensor: Tensor, dim: int, order: Tensor) -> Tensor:
    return share_of(whole(tensor).index_select(dim, order.to(tensor.device)), tensor)
