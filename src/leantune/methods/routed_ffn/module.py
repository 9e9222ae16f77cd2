"""The module that takes an FFN's place: a router, and only the chosen groups of hidden units.

Legend: n tokens, m = n A routed rows, d_model, F hidden units, G groups, A active groups,
r rank of an adapter.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from leantune.core.session import Session
from leantune.core.sites import Site
from leantune.core.units import HiddenUnits
from leantune.core.views import Divide, LinearView, Multiply, Slice, linear_view, slices
from leantune.methods.routed_ffn import maths
from leantune.ops.autocast import autocast_dtype
from leantune.ops.groups import (
    Routing,
    combine,
    dispatch,
    grouped_linear,
    has_grouped_product,
    route,
)
from leantune.ops.rows import stream_of, uniform

if TYPE_CHECKING:
    from leantune.methods.routed_ffn import RoutedFFN

_LINEARS = ("up", "gate", "down")
_FRESH_SPREAD = 0.02
"""Root mean square of a fresh router's logits: gates start near 1, yet no two groups tie."""


class Router(nn.Linear):
    """One logit per group; a class of its own, so that no method takes it for an FFN's linear."""


class RoutedMLP(nn.Module):
    """An FFN that computes, for each token, only the groups its router chooses.

    It holds the very linears of the FFN whose place it takes; see :class:`leantune.RoutedFFN`.

    Args:
        site: the FFN.
        config: the options.
        session: gives the seed, the step and the batch's row mask, and takes auxiliary losses.
    """

    def __init__(self, site: Site, config: "RoutedFFN", session: Session) -> None:
        super().__init__()
        self.config = config
        self.session = session
        self.recorder: Callable[[Tensor, Tensor, Tensor | None], None] | None = None
        self.mask = site.mask
        self._names: dict[str, str] = {}
        order = {id(module): i for i, module in enumerate(session.model.modules())}
        for part, module in sorted(site.modules.items(), key=lambda item: order[id(item[1])]):
            inside, _, name = site.parts[part].rpartition(".")
            # Parameters keep their names where the FFN is a module of its own.
            self._names[part] = name if inside == site.name and name != "router" else part
            self.add_module(self._names[part], module)
        weight = self.view("up").weight
        d_model = weight.shape[1]
        # Without torch's own initialisation: the global stream of random numbers must not move.
        router: Any = nn.utils.skip_init(
            Router, d_model, config.num_groups, device=weight.device, dtype=weight.dtype
        )
        self.router = router
        self.stream = stream_of(site.name)
        start = self.uniform(self.router.weight.numel()).view_as(self.router.weight)
        scale = _FRESH_SPREAD * (12 / d_model) ** 0.5
        self.set_router((start - 0.5) * scale, start.new_zeros(config.num_groups))
        linears = {part: self._names[part] for part in _LINEARS if part in self._names}
        is_reordered = config.split == "coactivation"
        self.units = HiddenUnits(site, self, linears, session) if is_reordered else None
        self.train(site.module.training)

    def forward(self, x: Tensor) -> Tensor:
        """Return the FFN's output, (..., d_model), from the active groups of each token."""
        config = self.config
        if self.recorder is not None:
            mask = self.session.batch.row_mask(self.mask, x.shape)
            self.recorder(x, self._hidden(x), mask)
            return self._dense(x, None)
        num_active = maths.num_active_at(
            self.session.step if config.warm_down_steps else 0,
            config.num_groups,
            config.num_active,
            config.warm_down_steps,
        )
        is_full = num_active == config.num_groups and config.gate != "spt"
        if x.numel() == 0 or (is_full and config.gate == "none"):
            return self._dense(x, None)
        logits = self.router(x).flatten(0, -2)  # (n, G)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        p = logits.sigmoid()
        chosen = maths.choose(logits, num_active)
        c = maths.coefficients(config.gate, p, chosen)
        self._add_losses(logits, p, chosen, x.shape)
        views = {part: self.view(part) for part in _LINEARS if part in self._names}
        if is_full or not all(view.is_divisible for view in views.values()):
            ones = torch.ones_like(chosen, dtype=p.dtype) if c is None else c
            return self._dense(x, torch.zeros_like(p).scatter(1, chosen, ones))
        return self._routed(x, views, route(chosen, config.num_groups), c)

    def view(self, part: str) -> LinearView:
        """View one of the FFN's linears as it is now."""
        return linear_view(self._part(part))

    def uniform(self, n: int) -> Tensor:
        """Return n numbers in [0, 1) that depend on the session's seed and the site alone."""
        device = self.router.weight.device
        draw = torch.zeros((), dtype=torch.int64, device=device)
        return uniform(self.session.seed, self.stream, draw, n, device=device)

    @torch.no_grad()
    def set_router(self, weight: Tensor, bias: Tensor) -> None:
        """Give the router its start: weight (G, d_model) and bias (G,)."""
        self.router.weight.copy_(weight)
        self.router.bias.copy_(bias)

    def restore(self) -> None:
        """Put the hidden units back into their original order."""
        if self.units is not None:
            self.units.restore()

    # -- the two ways to compute ---------------------------------------------------------------

    def _hidden(self, x: Tensor) -> Tensor:
        """Return the plain FFN's hidden activations, (..., F)."""
        first = "gate" if "gate" in self._names else "up"
        hidden = self._part("activation")(self._part(first)(x))
        return hidden if first == "up" else hidden * self._part("up")(x)

    def _dense(self, x: Tensor, c: Tensor | None) -> Tensor:
        """Run the plain FFN, with group g's hidden units times ``c`` (n, G) if there is one."""
        hidden = self._dropout("hidden_dropout", self._hidden(x))
        if c is not None:
            groups = hidden.unflatten(-1, (self.config.num_groups, -1))
            hidden = (groups * c.to(hidden.dtype).view(*groups.shape[:-1], 1)).flatten(-2)
        if autocast_dtype(hidden) is None:
            hidden = hidden.to(self.view("down").weight.dtype)
        return self._dropout("output_dropout", self._part("down")(hidden))

    def _routed(
        self, x: Tensor, views: dict[str, LinearView], routing: Routing, c: Tensor | None
    ) -> Tensor:
        """Run the chosen groups alone; what does not depend on the group runs once per token."""
        down = views["down"]
        inputs = [x, *(f.first(x) for p in ("up", "gate") if p in views for f in views[p].factors)]
        rows = [dispatch(t.flatten(0, -2), routing) for t in inputs]
        scale = None if c is None else c.reshape(-1, 1).index_select(0, routing.choices)
        outputs = self._run(views, rows, scale, routing)
        y, *low = [combine(t, routing) for t in outputs]
        if down.bias is not None:
            y = y + down.bias.to(y.dtype)
        for z, f in zip(low, down.factors, strict=True):
            y = y + f.b.product(z, f.b.weight, f.second_bias).to(y.dtype)
        return self._dropout("output_dropout", y.view(*x.shape[:-1], y.shape[-1]))

    def _run(
        self, views: dict[str, LinearView], rows: list[Tensor], c: Tensor | None, routing: Routing
    ) -> list[Tensor]:
        """Return the down products (m, d_model) and its adapters' (m, r) of sorted rows."""
        num_groups = self.config.num_groups

        def cut(divide: Divide, multiply: Multiply) -> dict[str, list[Slice]]:
            return {p: slices(v, int(p == "down"), divide, multiply) for p, v in views.items()}

        is_sampled = any(v.draws is not None for v in views.values())
        if self._is_grouped(rows[0], views["up"]) and not is_sampled:

            def stack(t: Tensor, dim: int) -> list[Tensor]:
                return [t.unflatten(dim, (num_groups, -1)).movedim(dim, 0)]

            def multiply(v: LinearView, w: Tensor, b: Tensor | None, t: Tensor) -> Tensor:
                return grouped_linear(t, w, b, routing)

            return self._group({p: s[0] for p, s in cut(stack, multiply).items()}, rows, c)
        parts = cut(partial(_chunk, num_groups), _product)
        sizes = routing.ends.diff(prepend=routing.ends.new_zeros(1)).tolist()
        split = [t.split(sizes) for t in rows]
        scales = [None] * num_groups if c is None else c.split(sizes)
        outputs = [
            self._group({p: s[g] for p, s in parts.items()}, [t[g] for t in split], scales[g])
            for g, size in enumerate(sizes)
            if size
        ]
        return [torch.cat(t) for t in zip(*outputs, strict=True)]

    def _group(self, cut: dict[str, Slice], rows: list[Tensor], c: Tensor | None) -> list[Tensor]:
        """Run one group: [x, then ``a x`` of each adapter] -> [down product, then adapters']."""
        x, *low = rows
        inside, outside = (c, None) if self.config.gate == "spt" else (None, c)
        parts = {}
        for part in ("up", "gate"):
            if part in cut:
                out = _times(cut[part].base(x), inside)
                for product in cut[part].adapters:
                    out = out + product(low.pop(0)).to(out.dtype)
                parts[part] = out
        hidden = self._part("activation")(parts.get("gate", parts["up"]))
        if "gate" in parts:
            hidden = hidden * parts["up"]
        hidden = _times(self._dropout("hidden_dropout", hidden), outside)
        y = _times(cut["down"].base(hidden), inside)
        return [y, *(product(hidden) for product in cut["down"].adapters)]

    def _is_grouped(self, x: Tensor, up: LinearView) -> bool:
        if self.config.backend != "auto":
            return self.config.backend == "grouped"
        dtype = autocast_dtype(x) or up.weight.dtype
        return x.is_cuda and has_grouped_product("cuda", dtype)

    def _add_losses(self, logits: Tensor, p: Tensor, chosen: Tensor, shape: torch.Size) -> None:
        if not self.training:
            return
        mask = self.session.batch.row_mask(self.mask, shape)
        config = self.config
        if config.balance_weight and chosen.shape[1] < config.num_groups:
            loss = maths.balance_loss(p, chosen, mask)
            self.session.add_auxiliary_loss(config.balance_weight * loss)
        if config.z_weight:
            self.session.add_auxiliary_loss(config.z_weight * maths.z_loss(logits, mask))

    def _part(self, part: str) -> Any:
        return getattr(self, self._names[part])

    def _dropout(self, part: str, x: Tensor) -> Tensor:
        return self._part(part)(x) if part in self._names else x


def _chunk(num_groups: int, t: Tensor, dim: int) -> Sequence[Tensor]:
    # One operation for all slices: the gradient of a trained weight is put together once.
    return t.chunk(num_groups, dim)


def _product(v: LinearView, w: Tensor, b: Tensor | None, t: Tensor) -> Tensor:
    return v.product(t, w, b)


def _times(x: Tensor, c: Tensor | None) -> Tensor:
    return x if c is None else x * c.to(x.dtype)
