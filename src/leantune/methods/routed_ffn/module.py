"""The module that takes an FFN's place: a router, and only the chosen groups of hidden units.

Legend: n tokens, m = n A routed rows, d_model, F hidden units, G groups, A active groups.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from leantune.core.ffn import FFN, HiddenUnits, view_ffn
from leantune.core.runtime import Runtime
from leantune.core.sites import Site
from leantune.methods.routed_ffn import maths
from leantune.methods.routed_ffn.config import RoutedFFN
from leantune.ops.groups import combine, dispatch, route
from leantune.ops.random import RandomKey, stream_of, uniform

_TOKENS_PER_BATCH = 512
_FRESH_SPREAD = 0.02
"""Root mean square of a fresh router's logits: gates start near 1, yet no two groups tie."""


class Router(nn.Module):
    """One logit per group; no ``nn.Linear``, so that no method takes it for one of the FFN's."""

    def __init__(self, weight: Tensor, bias: Tensor) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(weight), nn.Parameter(bias)

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits, (..., G)."""
        return F.linear(x, self.weight, self.bias)


class RoutedMLP(nn.Module):
    """A routed MLP computes, for each token, only the groups that its router chooses.

    It holds the very linears of the FFN whose place it takes; see :class:`leantune.RoutedFFN`.

    Args:
        model: the model that the FFN is in.
        site: the FFN.
        config: the options.
        runtime: gives the seed and the batch's row mask, and takes auxiliary losses.

    Attributes:
        recorded: inputs (s, d_model) and hidden activations (s, F) of some real tokens of each
            batch while the FFN is calibrated, otherwise None.
        units: the order of the hidden units, where it may change.
        names: part of the FFN -> the name of the child that computes it.
    """

    def __init__(self, model: nn.Module, site: Site, config: RoutedFFN, runtime: Runtime) -> None:
        super().__init__()
        self.config = config
        self.runtime = runtime
        self.recorded: list[tuple[Tensor, Tensor]] | None = None
        self._is_dense = config.is_dense
        self.names: dict[str, str] = {}
        self._view: FFN | None = None
        order = {id(module): i for i, module in enumerate(model.modules())}
        for part, child in sorted(
            site.children.items(), key=lambda item: order[id(item[1].module)]
        ):
            inside, _, name = child.name.rpartition(".")
            # Parameters keep their names where the FFN is a module of its own.
            self.names[part] = name if inside == site.name and name != "router" else part
            self.add_module(self.names[part], child.module)
        linears = {part: self.names[part] for part in self.ffn.linears}
        inner = [m for name in linears.values() for m in self.get_submodule(name).modules()]
        # What is hooked already (by meProp, say) must be run by its own forward.
        self._is_hooked = any(m._forward_hooks or m._forward_pre_hooks for m in inner)
        weight = self.ffn.weight("up")
        d_model = weight.shape[1]
        like = {"device": weight.device, "dtype": weight.dtype}
        self.router = Router(
            torch.empty(config.num_groups, d_model, **like), torch.empty(config.num_groups, **like)
        )
        self._stream = stream_of(site.name)
        start = self.uniform(self.router.weight.numel()).view_as(self.router.weight)
        scale = _FRESH_SPREAD * (12 / d_model) ** 0.5
        self.set_router((start - 0.5) * scale, start.new_zeros(config.num_groups))
        is_reordered = config.split == "coactivation"
        self.units = HiddenUnits(model, self, linears) if is_reordered else None
        self.train(site.module.training)

    @property
    def ffn(self) -> FFN:
        """The FFN as it computes now."""
        modules = {part: self._modules[name] for part, name in self.names.items()}
        self._view = view_ffn(modules, self._view)  # type: ignore[arg-type]
        return self._view

    def forward(self, x: Tensor) -> Tensor:
        """Return the FFN's output, (..., d_model), from the active groups of each token."""
        config, ffn = self.config, self.ffn
        if x.numel() == 0 or self._is_dense or self.runtime.is_exact:
            hidden = ffn.hidden(x)
            if self.recorded is not None:
                rows = maths.evenly_spaced_rows(
                    x, self.runtime.batch.real_rows(x.shape), _TOKENS_PER_BATCH
                )
                self.recorded.append((x.flatten(0, -2)[rows], hidden.flatten(0, -2)[rows]))
            return ffn.output(hidden)
        logits = self.router(x).flatten(0, -2)  # (n, G)
        p = logits.to(torch.promote_types(logits.dtype, torch.float32)).sigmoid()
        chosen = maths.choose(logits, config.num_active)
        c = 2.0 * p.gather(1, chosen) if config.gate == "output" else None  # (n, A)
        is_partial = config.num_active < config.num_groups
        if is_partial and config.balance_weight and self.training:
            loss = maths.balance_loss(p, chosen, self.runtime.batch.real_rows(x.shape))
            self.runtime.add_auxiliary_loss(config.balance_weight * loss)
        if is_partial and ffn.is_divisible and not self._is_hooked:
            return self._routed(ffn, x, chosen, c)
        factors = torch.ones_like(chosen, dtype=p.dtype) if c is None else c
        return ffn.output(ffn.hidden(x), torch.zeros_like(p).scatter(1, chosen, factors))

    @property
    def num_recorded(self) -> int:
        """How many tokens were recorded so far."""
        return sum(len(x) for x, _ in self.recorded or ())

    def uniform(self, n: int) -> Tensor:
        """Return n numbers in [0, 1) that depend on the session's seed and the site alone."""
        counter = torch.zeros((), dtype=torch.int64, device=self.router.weight.device)
        return uniform(RandomKey(self.runtime.seed, counter, self._stream), n)

    @torch.no_grad()
    def set_router(self, weight: Tensor, bias: Tensor) -> None:
        """Give the router its start: weight (G, d_model) and bias (G,)."""
        self.router.weight.copy_(weight)
        self.router.bias.copy_(bias)

    def _routed(self, ffn: FFN, x: Tensor, chosen: Tensor, c: Tensor | None) -> Tensor:
        """Run the chosen groups alone; what does not depend on the group runs once per token."""
        num_groups = self.config.num_groups
        routing = route(chosen, num_groups)
        rows, *low = [dispatch(t.flatten(0, -2), routing) for t in (x, *ffn.project(x))]
        scale = None if c is None else c.reshape(-1, 1).index_select(0, routing.choices)
        sizes = routing.ends.diff(prepend=routing.ends.new_zeros(1)).tolist()
        split = [t.split(sizes) for t in (rows, *low)]
        scales = [None] * num_groups if scale is None else scale.split(sizes)
        outputs = [
            own.run(rows, low, scale)
            for size, own, scale, (rows, *low) in zip(
                sizes, ffn.slices(num_groups), scales, zip(*split, strict=True), strict=True
            )
            if size
        ]
        sums = list(map(torch.cat, zip(*outputs, strict=True)))
        y, *low = [combine(t, routing) for t in sums]
        return ffn.finish(y, low).view(*x.shape[:-1], -1)
