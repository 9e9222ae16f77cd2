"""A model with routed FFNs: how they come in, how they are calibrated, and how they go.

Legend: F hidden units.
"""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from leantune.core.calibration import run_batches
from leantune.core.conversion import SwapConversion
from leantune.core.distributed import broadcast
from leantune.core.ffn import view_ffn
from leantune.core.linear import swap, trained_in_place_of_weight
from leantune.core.runtime import Runtime
from leantune.core.sites import Site
from leantune.errors import ConfigError, UnsupportedError
from leantune.methods.routed_ffn import maths
from leantune.methods.routed_ffn.clusters import balanced_groups
from leantune.methods.routed_ffn.compensation import Compensation, fit_compensation
from leantune.methods.routed_ffn.config import RoutedFFN
from leantune.methods.routed_ffn.module import RoutedMLP

_MAX_TOKENS = 2048
_RIDGE = 1e-2
_SPREAD = 0.1
"""Root mean square of a fitted router's logits: far from where the balance loss is flat."""
_RANK_DIVISOR = 32
"""A low-rank compensation has rank d_model / this for each group."""


def refusal(site: Site, config: RoutedFFN) -> str | None:
    """Say why an FFN cannot be routed, or None."""
    names = {name for name, _ in site.module.named_children()}
    if names & {"experts", "router"}:
        return f"FFN must not be a mixture of experts already, got {type(site.module).__name__}"
    lost = [part for part in ("up", "down", "activation") if part not in site.children]
    if lost:
        kind = type(site.module).__name__
        return f"FFN must have up, down and activation modules, got {kind} without {lost[0]}"
    try:
        ffn = view_ffn({part: child.module for part, child in site.children.items()})
    except UnsupportedError as error:
        return str(error)
    weights = [ffn.weight(part) for part in ffn.linears]
    if not all(weight.is_floating_point() for weight in weights):
        return f"weights must be floating point, got {weights[0].dtype}"
    if config.split == "coactivation":
        if ffn.is_halved:
            return "split must be 'contiguous' where gate and up are one linear, got 'coactivation'"
        whole = [p for p in ffn.linears if trained_in_place_of_weight(ffn.modules[p])]
        if whole:
            return (
                f"split must be 'contiguous' where {whole[0]} trains a subspace, got 'coactivation'"
            )
    width = ffn.num_hidden
    if width % config.num_groups:
        near = [n for n in range(2, 65) if width % n == 0]
        return (
            f"num_groups must divide the FFN's width {width}, got {config.num_groups}; it could "
            f"be {', '.join(map(str, near[:8])) or '1'}"
        )
    return None


class RoutedFFNs(SwapConversion):
    """The routed FFNs of one config are calibrated together and know nothing of others."""

    num_calibration_batches = 8

    def __init__(self, model: nn.Module, config: RoutedFFN, runtime: Runtime) -> None:
        super().__init__([])
        self.can_merge = config.is_dense
        self._model = model
        self._config = config
        self._runtime = runtime
        self._layers: dict[str, RoutedMLP] = {}
        self._parts: list[tuple[RoutedMLP, str, nn.Module, str]] = []

    def add(self, site: Site) -> None:
        """Put a routed FFN into a site's place."""
        layer = RoutedMLP(self._model, site, self._config, self._runtime)
        self._layers[site.name] = layer
        for part, child in site.children.items():
            parent, _, attribute = child.name.rpartition(".")
            self._parts.append((layer, part, self._model.get_submodule(parent), attribute))
        self.swaps.append(swap(self._model, site.name, layer))
        for name in site.also_replaced:
            self.swaps.append(swap(self._model, name, nn.Identity()))
        if layer.units is not None:
            # Until calibration shows what is active together: weight rows that point alike.
            first = "gate" if "gate" in layer.ffn.linears else "up"
            layer.units.reorder(_order(layer, layer.ffn.weight(first).detach()))

    def undo(self) -> None:
        """Put units into their order and old modules back, parts with what others put around."""
        for layer in self._layers.values():
            if layer.units is not None:
                layer.units.restore()
        super().undo()
        for layer, part, home, attribute in self._parts:
            setattr(home, attribute, layer.get_submodule(layer.names[part]))

    def calibrate(self, batches: Iterable[Any]) -> None:
        """Run batches through the plain FFNs; then group units and fit the routers.

        The first 2,048 real tokens, at most 512 of a batch, are kept with their hidden activations
        in every layer meanwhile.

        Raises:
            ConfigError: there is no batch, or none with a real token.
        """
        for layer in self._layers.values():
            layer.recorded = []
        try:
            for _ in run_batches(self._model, self._runtime, batches):
                if all(layer.num_recorded >= _MAX_TOKENS for layer in self._layers.values()):
                    break
            for layer in self._layers.values():
                _fit(layer)
        finally:
            for layer in self._layers.values():
                layer.recorded = None

    def state_dict(self) -> dict[str, Tensor]:
        """Return what calibration found for each FFN, its order of hidden units included."""
        return {
            f"{name}.{key}": tensor.cpu()
            for name, layer in self._layers.items()
            for key, tensor in layer.found().items()
        }

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take on what calibration had found when the state was saved.

        Raises:
            ConfigError: the state is of other FFNs or groups, or damaged.
        """
        rest = dict(state)
        for name, layer in self._layers.items():
            for key, buffer in layer.router.named_buffers():
                buffer.copy_(_taken(rest, f"{name}.{key}", buffer.shape))
            if layer.units is not None:
                layer.units.load(rest.pop(f"{name}.permutation", torch.empty(0)))
            layer.compensation = _compensation(layer, name, rest)
        super().load_state_dict(rest)


def _taken(state: dict[str, Tensor], key: str, shape: torch.Size) -> Tensor:
    """Take a tensor out of the state, checked."""
    value = state.pop(key, None)
    is_right = value is not None and value.shape == shape and value.is_floating_point()
    if value is None or not (is_right and bool(value.isfinite().all())):
        got = "none" if value is None else f"{tuple(value.shape)} of {value.dtype}"
        raise ConfigError(
            f"RoutedFFN: {key} must be finite numbers of shape {tuple(shape)}, got {got}; load "
            "onto the base model that the state was saved from"
        )
    return value


def _compensation(layer: RoutedMLP, name: str, state: dict[str, Tensor]) -> Compensation | None:
    """Take a layer's compensation out of the state; None where it was not calibrated."""
    if f"{name}.write" not in state or not layer.config.is_compensated:
        return None
    num_groups, rank = layer.config.num_groups, _rank(layer)
    d_in, d_out = layer.router.weight.shape[1], len(layer.ffn.weight("down"))
    shapes = {"read": (num_groups * rank, d_in), "write": (num_groups * (1 + rank), d_out)}
    found = [_taken(state, f"{name}.{key}", torch.Size(s)) for key, s in shapes.items()]
    return Compensation(*found).to(layer.router.start_weight)


def convert(model: nn.Module, sites: list[Site], config: RoutedFFN, runtime: Runtime) -> RoutedFFNs:
    """Route every FFN of ``sites``, or none if one of them cannot be."""
    conversion = RoutedFFNs(model, config, runtime)
    try:
        for site in sites:
            conversion.add(site)
    except BaseException:
        conversion.undo()
        raise
    return conversion


@torch.no_grad()
def _fit(layer: RoutedMLP) -> None:
    """Group units by their activations, then regress the groups' norms on the inputs."""
    if not layer.num_recorded:
        raise ConfigError(
            "RoutedFFN: batches must hold at least one real token for calibration, got none; give "
            "session.calibrate a few training batches"
        )
    config = layer.config
    inputs, activations = zip(*layer.recorded or [], strict=True)
    x = torch.cat(inputs)[:_MAX_TOKENS].to(layer.router.weight.dtype)  # autocast's may be another
    hidden = torch.cat(activations)[:_MAX_TOKENS].float()
    # Processes that were shown other rows follow the first one.
    if layer.units is not None:
        order = broadcast(_order(layer, hidden.abs().t()))
        layer.units.reorder(order)
        hidden = hidden[:, order]
    groups = hidden.unflatten(1, (config.num_groups, -1))  # (s, G, F / G)
    layer.router.restart(*map(broadcast, maths.fit_router(x, groups.norm(dim=-1), _RIDGE, _SPREAD)))
    if config.is_compensated:
        chosen = maths.choose(layer.router(x)[0], config.num_active)
        skipped = torch.ones(len(x), config.num_groups, dtype=torch.bool, device=x.device)
        down = layer.ffn.merged("down").float().unflatten(1, (config.num_groups, -1))
        outputs = torch.einsum("sgf,dgf->sgd", groups, down)
        found = fit_compensation(x, outputs, skipped.scatter(1, chosen, False), _rank(layer))
        layer.compensation = Compensation(*map(broadcast, found)).to(layer.router.start_weight)


def _order(layer: RoutedMLP, features: Tensor) -> Tensor:
    """Return the order that groups a layer's hidden units by their features (F, any)."""
    return balanced_groups(features, layer.config.num_groups, layer.uniform(len(features)))


def _rank(layer: RoutedMLP) -> int:
    """Return the rank of a layer's compensation."""
    return max(1, layer.router.weight.shape[1] // _RANK_DIVISOR)
