"""A model under WTA-CRS: its linears converted, and the running norms that they share."""

from collections.abc import Mapping, Sequence

from torch import Tensor, nn

from leantune.core.conversion import SwapConversion
from leantune.core.linear import Swap, converted, swap
from leantune.core.runtime import Runtime
from leantune.core.sites import Site, group_by_input
from leantune.methods.wta_crs.config import WTACRS
from leantune.methods.wta_crs.norms import RunningNorms
from leantune.methods.wta_crs.policy import SampledRows, SharedInput


class SampledLinears(SwapConversion):
    """Linears with sampled rows keep one state between them: what they know of gradient norms."""

    def __init__(self, swaps: Sequence[Swap], norms: RunningNorms | None) -> None:
        super().__init__(swaps)
        self._norms = norms

    def state_dict(self) -> dict[str, Tensor]:
        """Return the running norms by the linear's name."""
        return {} if self._norms is None else self._norms.state_dict()

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take saved running norms on.

        Raises:
            ConfigError: they are of another model, or not finite.
        """
        if self._norms is None:
            super().load_state_dict(state)
        else:
            self._norms.load_state_dict(state)


def convert(
    model: nn.Module, sites: list[Site], config: WTACRS, runtime: Runtime
) -> SampledLinears:
    """Give each linear a row policy; linears that read one input share their sample."""
    groups = [group for read in group_by_input(sites) for group in _sharing(read)]
    names = [site.name for group in groups for site in group]
    norms = RunningNorms(names, config.decay) if config.norms == "running" else None
    swaps: list[Swap] = []
    for group in groups:
        first = len(swaps)
        columns = range(first, first + len(group))
        shared = SharedInput([site.name for site in group], columns)
        runtime.at_forward_end(shared.forget)
        for column, site in zip(columns, group, strict=True):
            block = None if site.block is None else model.get_submodule(site.block)
            rows = SampledRows(site, column, shared, norms, config, runtime, block)
            new = converted(site.module, runtime, rows=rows)
            swaps.append(swap(model, site.name, new))
    return SampledLinears(swaps, norms)


def _sharing(sites: list[Site]) -> list[list[Site]]:
    """Split off the linears with a trained subspace, which keep a projection of their own."""
    alone = [s for s in sites if getattr(s.module, "subspace", None) is not None]
    together = [s for s in sites if s not in alone]
    return [*([together] if together else []), *([s] for s in alone)]
