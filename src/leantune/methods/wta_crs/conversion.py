"""A model under WTA-CRS: its linears converted, and the running norms that they share."""

from collections.abc import Mapping, Sequence

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from leantune.core.conversion import SwapConversion
from leantune.core.linear import Swap, converted, swap_all
from leantune.core.runtime import Runtime
from leantune.core.sites import Site, group_by_input
from leantune.methods.wta_crs.cache import CachedNorms
from leantune.methods.wta_crs.config import WTACRS
from leantune.methods.wta_crs.norms import RunningNorms
from leantune.methods.wta_crs.policy import SampledRows, SharedInput

_DECAY = 0.9
"""Weight of the past in the running norms."""


class SampledLinears(SwapConversion):
    """Linears with sampled rows keep one state between them: what they know of gradient norms.

    Args:
        swaps: of the linears.
        norms: what they share; None where nothing is guessed.
        handles: of the hooks that take sample ids out of the batch, where ``norms`` wants them.
    """

    def __init__(
        self,
        swaps: Sequence[Swap],
        norms: RunningNorms | CachedNorms | None,
        handles: Sequence[RemovableHandle] = (),
    ) -> None:
        super().__init__(swaps)
        self.needs_sample_ids = bool(handles)
        self._norms = norms
        self._handles = handles

    def undo(self) -> None:
        """Put the plain linears back."""
        for handle in self._handles:
            handle.remove()
        super().undo()

    def state_dict(self) -> dict[str, Tensor]:
        """Return what is known of gradient norms."""
        return {} if self._norms is None else self._norms.state_dict()

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take saved norms on.

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
    groups = group_by_input(sites)
    linears = [site for group in groups for site in group]
    norms = _norm_source(linears, config)
    twins: list[tuple[str, nn.Module]] = []
    for group in groups:
        columns = range(len(twins), len(twins) + len(group))
        shared = SharedInput([site.name for site in group], columns)
        runtime.at_forward_end(shared.forget)
        for column, site in zip(columns, group, strict=True):
            block = None if site.block is None else model.get_submodule(site.block)
            rows = SampledRows(site, column, shared, norms, config, runtime, block)
            twins.append((site.name, converted(site.module, runtime, rows=rows)))
    swaps = swap_all(model, twins)
    handles = norms.install(model) if isinstance(norms, CachedNorms) else []
    return SampledLinears(swaps, norms, handles)


def _norm_source(sites: list[Site], config: WTACRS) -> RunningNorms | CachedNorms | None:
    # In backward the norms are exact.
    if config.norms == "activation" or config.draw_at == "backward":
        return None
    names = [site.name for site in sites]
    if config.norms == "cache":
        return CachedNorms(names, config.cache_gib)
    devices = [site.module.get_parameter("weight").device for site in sites]
    return RunningNorms(names, _DECAY, devices)
