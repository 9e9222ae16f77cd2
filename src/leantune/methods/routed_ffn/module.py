"""The module that takes an FFN's place: a router, and only the chosen groups of hidden units.

Legend: n tokens, m = n A routed rows, d_model, F hidden units, G groups, A active groups.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from leantune.core.ffn import FFN, HiddenUnits, view_ffn
from leantune.core.runtime import Runtime
from leantune.core.sites import Site
from leantune.errors import ConfigError
from leantune.methods.routed_ffn import maths
from leantune.methods.routed_ffn.compensation import Compensation
from leantune.methods.routed_ffn.config import RoutedFFN
from leantune.ops.backend import by_device
from leantune.ops.groups import combine, dispatch, route, spread
from leantune.ops.random import RandomKey, stream_of, uniform

_TOKENS_PER_BATCH = 512
_MULTIPLE = 128
"""Rows of a product's tile on a GPU, to which lists of tokens are rounded up there."""
_FRESH_SPREAD = 0.02
"""Root mean square of a fresh router's logits: small, yet no two groups tie."""


class Router(nn.Module):
    """A router gives one logit for each group: that of its start, and what it has learnt since.

    No ``nn.Linear``, so that no method takes it for one of the FFN's.

    Attributes:
        start_weight, start_bias: at conversion, (G, d_model) and (G,).
        weight: (G, d_model), trained from zero.
        bias: (G,), trained from zero.
    """

    start_weight: Tensor
    start_bias: Tensor

    def __init__(self, like: Tensor, num_groups: int) -> None:
        super().__init__()
        weight, bias = like.new_zeros(num_groups, like.shape[1]), like.new_zeros(num_groups)
        self.register_buffer("start_weight", weight)
        self.register_buffer("start_bias", bias)
        self.weight = nn.Parameter(weight.clone())
        self.bias = nn.Parameter(bias.clone())

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return the logits, and the part of them that was learnt; (..., G) each."""
        learnt = F.linear(x, self.weight, self.bias)
        return F.linear(x, self.start_weight, self.start_bias) + learnt, learnt

    @torch.no_grad()
    def restart(self, weight: Tensor, bias: Tensor) -> None:
        """Start from weight (G, d_model) and bias (G,), with nothing learnt."""
        self.start_weight.copy_(weight)
        self.start_bias.copy_(bias)
        self.weight.zero_()
        self.bias.zero_()


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
        compensation: what stands in for skipped groups, once calibration has found it.
        names: part of the FFN -> the name of the child that computes it.
    """

    def __init__(self, model: nn.Module, site: Site, config: RoutedFFN, runtime: Runtime) -> None:
        super().__init__()
        self.config = config
        self.runtime = runtime
        self.recorded: list[tuple[Tensor, Tensor]] | None = None
        self._is_dense = config.is_dense
        self._name = site.name
        self.compensation: Compensation | None = None
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
        self.router = Router(self.ffn.weight("up").detach(), config.num_groups)
        self._stream = stream_of(site.name)
        start = self.uniform(self.router.weight.numel()).view_as(self.router.weight)
        scale = _FRESH_SPREAD * (12 / start.shape[1]) ** 0.5
        self.router.restart((start - 0.5) * scale, start.new_zeros(config.num_groups))
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
        flat = x.flatten(0, -2)
        logits, learnt = self.router(flat)  # (n, G)
        wide = torch.float64 if logits.dtype == torch.float64 else torch.float32
        chosen = maths.choose(logits, config.num_active)
        c = 2.0 * learnt.gather(1, chosen).to(wide).sigmoid()  # exactly 1 while nothing is learnt
        if config.balance_weight and self.training:
            p = logits.to(wide).sigmoid()
            loss = maths.balance_loss(p, chosen, self.runtime.batch.real_rows(x.shape))
            self.runtime.add_auxiliary_loss(config.balance_weight * loss)
        guess = self._guess(flat, chosen)
        if ffn.is_divisible and not self._is_hooked:
            return self._routed(ffn, flat, chosen, c, guess).view(*x.shape[:-1], -1)
        scale = torch.zeros_like(logits, dtype=wide).scatter(1, chosen, c)
        guess = None if guess is None else guess.view(*x.shape[:-1], -1)
        return ffn.output(ffn.hidden(x), scale, guess)

    @property
    def num_recorded(self) -> int:
        """How many tokens were recorded so far."""
        return sum(len(x) for x, _ in self.recorded or ())

    def uniform(self, n: int) -> Tensor:
        """Return n numbers in [0, 1) that depend on the session's seed and the site alone."""
        counter = torch.zeros((), dtype=torch.int64, device=self.router.weight.device)
        return uniform(RandomKey(self.runtime.seed, counter, self._stream), n)

    def found(self) -> dict[str, Tensor]:
        """Return what calibration found: buffers by name."""
        found = dict(self.router.named_buffers())
        if self.units is not None:
            found["permutation"] = self.units.permutation
        if self.compensation is not None:
            found |= dict(self.compensation.named_buffers())
        return found

    def _guess(self, x: Tensor, chosen: Tensor) -> Tensor | None:
        """Return what stands in for the groups that each token skips, (n, d_model), or None."""
        if not self.config.is_compensated:
            return None
        if self.compensation is None:
            raise ConfigError(
                "RoutedFFN: compensate must be calibrated before the model runs, got no "
                f"calibration at {self._name}; call session.calibrate(batches) (the trainer "
                "callback does so by itself), or load a session that was calibrated"
            )
        skipped = x.new_ones(len(chosen), self.config.num_groups).scatter(1, chosen, 0.0)
        return self.compensation(x, skipped)

    def _routed(
        self, ffn: FFN, x: Tensor, chosen: Tensor, c: Tensor, guess: Tensor | None
    ) -> Tensor:
        """Run the chosen groups alone; what does not depend on the group runs once per token."""
        routing = route(chosen, self.config.num_groups, by_device(x, cpu=1, gpu=_MULTIPLE))
        rows, *low = [dispatch(t, routing) for t in (x, *ffn.project(x))]
        sums = ffn.run_groups(rows, low, routing.read_sizes(), spread(c, routing))
        y, *low = [combine(t, routing) for t in sums]
        return ffn.finish(y if guess is None else y + guess, low)
