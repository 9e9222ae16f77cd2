"""A model under WTA-CRS: its linears converted, and what they learn together."""

from collections.abc import Mapping, Sequence
from itertools import accumulate, pairwise

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from leantune.core.conversion import SwapConversion
from leantune.core.linear import Swap, converted, swap_all
from leantune.core.runtime import Runtime
from leantune.core.sites import Site, group_by_input
from leantune.methods.wta_crs.cache import CachedNorms
from leantune.methods.wta_crs.config import WTACRS
from leantune.methods.wta_crs.masks import LearnedMasks
from leantune.methods.wta_crs.norms import RunningNorms
from leantune.methods.wta_crs.policy import SampledRows
from leantune.methods.wta_crs.sharing import Allocation, SamplePool
from leantune.ops.random import stream_of

_DECAY = 0.9
"""Weight of the past in the running norms."""

_NORMS, _ALLOCATION = "norms/", "allocation/"


class SampledLinears(SwapConversion):
    """Linears with sampled rows keep one state between them: what they learned while training.

    Args:
        swaps: of the linears.
        pool: who read with whom.
        masks: which row masks are trusted.
        norms: what is known of gradient norms; None where nothing is guessed.
        allocation: how rows are divided among the linears; None for evenly.
        handles: of the hooks that take sample ids out of the batch, where ``norms`` wants them.
    """

    def __init__(
        self,
        swaps: Sequence[Swap],
        pool: SamplePool,
        masks: LearnedMasks,
        norms: RunningNorms | CachedNorms | None,
        allocation: Allocation | None,
        handles: Sequence[RemovableHandle] = (),
    ) -> None:
        super().__init__(swaps)
        self.needs_sample_ids = bool(handles)
        self._pool = pool
        self._masks = masks
        self._norms = norms
        self._allocation = allocation
        self._handles = handles

    def on_step(self, step: int) -> None:
        """Refuse a loss that counted padding which was left out, and divide the rows.

        Raises:
            UnsupportedError: such a loss.
        """
        self._masks.learn("step")
        if self._allocation is not None:
            self._allocation.on_step()

    def undo(self) -> None:
        """Put the plain linears back."""
        for handle in self._handles:
            handle.remove()
        super().undo()

    def state_dict(self) -> dict[str, Tensor]:
        """Return who read with whom, verdicts on row masks, and gradient norms.

        Raises:
            UnsupportedError: a loss counted padding that was left out.
        """
        named = {
            f"{prefix}{name}": value
            for prefix, part in self._learned().items()
            for name, value in part.state_dict().items()
        }
        return self._pool.state_dict() | self._masks.state_dict() | named

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take a saved state on; what it lacks is learned anew.

        Raises:
            ConfigError: it is of another model or recipe, or not finite.
        """
        learned = self._learned()
        rest = {key: value for key, value in state.items() if key not in ("readers", "masks")}
        super().load_state_dict({k: v for k, v in rest.items() if not k.startswith((*learned,))})
        for prefix, part in learned.items():
            own = {k.removeprefix(prefix): v for k, v in rest.items() if k.startswith(prefix)}
            part.load_state_dict(own)
        self._pool.load_state_dict(state)
        self._masks.load_state_dict(state)

    def _learned(self) -> dict[str, RunningNorms | CachedNorms | Allocation]:
        """Return what learns while training, where there is such, by the prefix of its state."""
        parts = {_NORMS: self._norms, _ALLOCATION: self._allocation}
        return {prefix: part for prefix, part in parts.items() if part is not None}


def convert(
    model: nn.Module, sites: list[Site], config: WTACRS, runtime: Runtime
) -> SampledLinears:
    """Give each linear a row policy; linears that read one input share their sample."""
    groups = group_by_input(sites)
    names = [site.name for group in groups for site in group]
    devices = [site.module.get_parameter("weight").device for group in groups for site in group]
    norms = _norm_source(names, devices, config)
    pool, masks = SamplePool(len(names)), LearnedMasks(names, devices, runtime)
    runtime.at_forward_end(pool.forget)
    if config.draw_at != "backward":
        runtime.at_forward_begin(masks.begin)
    twins: list[tuple[str, nn.Module]] = []
    ends = list(accumulate(map(len, groups), initial=0))
    ranges = [tuple(range(*ends)) for ends in pairwise(ends)]
    allocation = None
    if config.allocation == "measured":
        allocation = Allocation(config.keep_ratio, devices, ranges, pool)
    for group, columns in zip(groups, ranges, strict=True):
        for column, site in zip(columns, group, strict=True):
            rows = SampledRows(
                column,
                compiled_readers=columns,
                stream=stream_of(group[0].name),
                norms=norms,
                pool=pool,
                masks=masks,
                allocation=allocation,
                config=config,
                runtime=runtime,
                block=None if site.block is None else model.get_submodule(site.block),
                part=site.whole,
            )
            twins.append((site.name, converted(site.module, runtime, rows=rows)))
    swaps = swap_all(model, twins)
    handles = norms.install(model) if isinstance(norms, CachedNorms) else []
    return SampledLinears(swaps, pool, masks, norms, allocation, handles)


def _norm_source(
    names: Sequence[str], devices: Sequence[torch.device], config: WTACRS
) -> RunningNorms | CachedNorms | None:
    # In backward the norms are exact.
    if config.norms == "activation" or config.draw_at == "backward":
        return None
    if config.norms == "cache":
        return CachedNorms(names, config.cache_gib)
    return RunningNorms(names, _DECAY, devices)
