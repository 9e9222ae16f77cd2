"""Which FFNs to route, and how many groups each: from the error that each would make."""

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from leantune.core.apply import apply
from leantune.core.calibration import run_batches
from leantune.errors import ConfigError
from leantune.methods.routed_ffn.config import RoutedFFN
from leantune.methods.routed_ffn.module import RoutedMLP


def choose_layers(
    model: nn.Module, batches: Sequence[Any], config: RoutedFFN, *, active_share: float
) -> list[RoutedFFN]:
    """Choose for each FFN how many groups to compute, so that little is lost for a given share.

    From all groups of all FFNs it leaves out one at a time, each where the squared relative error
    grows least. The first half of the batches calibrates, the second half measures; the model is
    left as it was. ``lt.apply(model, lt.LoRA(), *choose_layers(...))`` uses the result.

    Args:
        model: the plain model.
        batches: at least two, of the form that the model is called with.
        config: the options, and the sites to choose among; its ``num_active`` does not count.
        active_share: of all groups at these sites, how many are computed at most; from
            1 / num_groups to 1.

    Returns:
        A config for each number of active groups, with its sites; FFNs that stay dense are in none.

    Raises:
        ConfigError: ``active_share`` is out of range, or there are fewer than two batches.
    """
    num_groups = config.num_groups
    if not 1 / num_groups <= active_share <= 1:
        raise ConfigError(
            f"choose_layers: active_share must be from 1 / num_groups = {1 / num_groups:g} to 1, "
            f"got {active_share}"
        )
    if len(batches) < 2:
        raise ConfigError(
            f"choose_layers: batches must be at least two, to calibrate on and to measure on, got "
            f"{len(batches)}; give a few training batches"
        )
    half = len(batches) // 2
    errors = {
        num: output_errors(
            model, dataclasses.replace(config, num_active=num), batches[:half], batches[half:]
        )
        for num in range(1, num_groups)
    }
    names = list(next(iter(errors.values()), {}))
    errors[num_groups] = dict.fromkeys(names, 0.0)
    active = dict.fromkeys(names, num_groups)

    def growth(name: str) -> float:
        num = active[name]
        return errors[num - 1][name] ** 2 - errors[num][name] ** 2

    while sum(active.values()) > active_share * num_groups * len(names):
        active[min((n for n in names if active[n] > 1), key=growth)] -= 1
    chosen = {num: tuple(n for n in names if active[n] == num) for num in errors}
    return [
        dataclasses.replace(config, num_active=num, sites=sites)
        for num, sites in chosen.items()
        if sites and num < num_groups
    ]


def output_errors(
    model: nn.Module, config: RoutedFFN, calibration: Iterable[Any], held_out: Iterable[Any]
) -> dict[str, float]:
    """Return how far each routed FFN's output is from the dense one's, relative to its norm.

    Each reads what the plain model gives it, real tokens alone. The model is left as it was.

    Args:
        model: the plain model.
        config: how FFNs are routed.
        calibration: batches that routers are fitted to.
        held_out: batches that errors are measured on.
    """
    session = apply(model, config)
    layers = {n: m for n, m in model.named_modules() if isinstance(m, RoutedMLP)}
    sums = {layer: torch.zeros(2, dtype=torch.float64) for layer in layers.values()}

    def compare(layer: nn.Module, args: tuple[Tensor], dense: Tensor) -> None:
        assert isinstance(layer, RoutedMLP)
        runtime = layer.runtime
        if not runtime.is_exact:
            return  # the call below
        runtime.is_exact = False
        try:
            error = (layer(*args) - dense).double().square().sum(-1).flatten()
        finally:
            runtime.is_exact = True
        pair = torch.stack([error, dense.double().square().sum(-1).flatten()])
        real = runtime.batch.real_rows(dense.shape)
        sums[layer] += (pair if real is None else pair[:, real]).sum(1).cpu()

    try:
        session.calibrate(calibration)
        for layer in layers.values():
            layer.register_forward_hook(compare)
        for _ in run_batches(model, next(iter(layers.values())).runtime, held_out):
            pass
    finally:
        session.remove()
    return {name: float((sums[m][0] / sums[m][1]).sqrt()) for name, m in layers.items()}
