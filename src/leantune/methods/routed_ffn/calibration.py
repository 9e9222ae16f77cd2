"""Calibration of routed FFNs: which hidden units go together, and where the router starts.

Legend: s tokens that are kept, d_model, F hidden units, G groups.
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from leantune.core.calibration import run_batches, spread_rows
from leantune.core.ranks import of_first_rank
from leantune.core.session import Session
from leantune.errors import ConfigError
from leantune.methods.routed_ffn import maths
from leantune.methods.routed_ffn.clusters import balanced_groups
from leantune.methods.routed_ffn.module import RoutedMLP

_TOKENS_PER_BATCH, _MAX_TOKENS = 512, 2048
_RIDGE = 1e-2
_SPREAD = 0.1
"""Root mean square of a fitted router's logits: gates start within about 5 % of 1."""


def calibrate(session: Session, batches: Iterable[Any]) -> None:
    """Run batches through the plain FFNs; then group units and fit the routers.

    The first 2,048 real tokens, at most 512 of a batch, are kept with their hidden activations in
    every layer meanwhile.

    Raises:
        ConfigError: there is no batch, or none with a real token.
    """
    layers = [m for m in session.model.modules() if isinstance(m, RoutedMLP)]
    kept: list[list[tuple[Tensor, Tensor]]] = [[] for _ in layers]
    for layer, pairs in zip(layers, kept, strict=True):
        layer.recorder = lambda *seen, pairs=pairs: pairs.append(_thin(*seen))
    try:
        for _ in run_batches(session, batches):
            if all(sum(len(x) for x, _ in pairs) >= _MAX_TOKENS for pairs in kept):
                break
    finally:
        for layer in layers:
            layer.recorder = None
    for layer, pairs in zip(layers, kept, strict=True):
        if not sum(len(x) for x, _ in pairs):
            raise ConfigError(
                "RoutedFFN: batches must hold at least one real token for calibration, got none; "
                "give session.calibrate a few training batches"
            )
        x, hidden = (torch.cat(seen)[:_MAX_TOKENS] for seen in zip(*pairs, strict=True))
        _fit(layer, x, hidden)


def _thin(x: Tensor, hidden: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    rows = spread_rows(x, mask, _TOKENS_PER_BATCH)
    return x.flatten(0, -2)[rows], hidden.flatten(0, -2)[rows]


@torch.no_grad()
def _fit(layer: RoutedMLP, x: Tensor, hidden: Tensor) -> None:
    """Group units by activations (s, F), then regress the groups' norms on inputs (s, d_model)."""
    hidden = hidden.float()
    # Processes that were shown other rows follow the first one.
    if layer.units is not None:
        order = of_first_rank(_order(layer, hidden.abs().t()))
        layer.units.reorder(order)
        hidden = hidden[:, order]
    norms = hidden.unflatten(1, (layer.config.num_groups, -1)).norm(dim=-1)
    layer.set_router(*map(of_first_rank, maths.fit_router(x, norms, _RIDGE, _SPREAD)))


def split_by_weights(layer: RoutedMLP) -> None:
    """Group a layer's hidden units by their weight rows: those that point alike go together.

    This is the start, until calibration shows which units are active together.
    """
    assert layer.units is not None
    part = "gate" if "gate" in layer.ffn.linears else "up"
    layer.units.reorder(_order(layer, layer.ffn.weight(part).detach()))


def _order(layer: RoutedMLP, features: Tensor) -> Tensor:
    return balanced_groups(features, layer.config.num_groups, layer.uniform(len(features)))
