"""The order of an FFN's hidden units: changed in place, put back, saved with the session.

Legend: F hidden units.
"""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from leantune.core.session import Session
from leantune.core.sites import Site
from leantune.core.views import linear_view
from leantune.errors import ConfigError, UnsupportedError


class HiddenUnits:
    """The hidden units of one FFN, whose order is free: any is the same function.

    The module that computes the FFN gets a buffer ``permutation``, (F,): the original number of
    each unit. The session saves it, too.

    Args:
        site: the FFN.
        holder: the module that takes its place.
        session: keeps the order.

    Raises:
        UnsupportedError: another module shares a weight, which would be reordered as well.
    """

    def __init__(self, site: Site, holder: nn.Module, session: Session) -> None:
        self._linears = {p: m for p, m in site.modules.items() if p in ("up", "gate", "down")}
        self._holder = holder
        own = {id(p) for module in self._linears.values() for p in module.parameters()}
        names: dict[int, str] = {}
        for name, parameter in session.model.named_parameters(remove_duplicate=False):
            first = names.setdefault(id(parameter), name)
            if id(parameter) in own and first != name:
                raise UnsupportedError(
                    f"{site.name}: hidden units can be reordered only where no weight is shared, "
                    f"got {first} tied to {name}; leave the site out with sites=, or keep the order"
                )
        weight = linear_view(self._linears["up"]).weight
        units = torch.arange(len(weight), device=weight.device)
        holder.register_buffer("permutation", units)
        session.keep_state(f"units.{site.name}", self)

    @property
    def permutation(self) -> Tensor:
        """The original number of each unit, (F,) int64."""
        return self._holder.get_buffer("permutation")

    @torch.no_grad()
    def reorder(self, order: Tensor, *, frozen_only: bool = False) -> None:
        """Reorder the units in everything that has them: weights, biases, adapters' factors.

        Args:
            order: (F,) int64: the new unit i is the present unit ``order[i]``.
            frozen_only: leave what trains as it is.
        """
        for part, module in self._linears.items():
            view = linear_view(module, every_adapter=True)
            for tensor, dim in view.tensors_along(int(part == "down")):
                if not (frozen_only and tensor.requires_grad):
                    tensor.copy_(tensor.index_select(dim, order))
        self.permutation.copy_(self.permutation.index_select(0, order))

    def restore(self) -> None:
        """Put the units back into their original order."""
        self.reorder(self.permutation.argsort())

    def state_dict(self) -> dict[str, Tensor]:
        """Return the order, as the session saves it."""
        return {"permutation": self.permutation.cpu()}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take on a saved order; weights that train come with the checkpoint in that order.

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
        self.reorder(now.argsort()[wanted], frozen_only=True)
