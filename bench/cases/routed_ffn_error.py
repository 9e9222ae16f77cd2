"""How far routed FFNs are from the dense ones before any training: MiniLM on held-out RTE text."""

from collections.abc import Iterable
from itertools import product
from statistics import fmean
from typing import Any

import torch
from torch import Tensor, nn

import leantune as lt
from bench import rows
from bench.models import glue, minilm
from leantune.core.calibration import run_batches
from leantune.methods.routed_ffn.module import RoutedMLP

RESULT = "routed_ffn_error"
ACTIVE, COMPENSATE = (2, 3), ("none", "mean", "lowrank")


def main(num_tokens: int = 128, num_texts: int = 8) -> None:
    """Measure each compensation at 2 and 3 of 4 groups."""
    model, tokenizer = minilm()
    ids = tokenizer(" ".join(glue("rte")["train"]["sentence1"]), verbose=False)["input_ids"]
    shape = (-1, num_texts, num_tokens)
    pieces = torch.tensor(ids[: 12 * num_texts * num_tokens]).view(shape)
    shown = [{"input_ids": piece} for piece in pieces]
    calibration, held_out = shown[:8], shown[8:]
    found = []
    for num_active, compensate in product(ACTIVE, COMPENSATE):
        config = lt.RoutedFFN(num_active=num_active, split="coactivation", compensate=compensate)
        errors = output_errors(model, config, calibration, held_out)
        found.append(_row(f"{num_active} of 4 everywhere", compensate, errors))
    rows.replace(RESULT, ("groups", "compensate"), found)
    print(summary())


def output_errors(
    model: nn.Module, config: lt.RoutedFFN, calibration: Iterable[Any], held_out: Iterable[Any]
) -> dict[str, float]:
    """Return how far each routed FFN's output is from the dense one's, relative to its norm.

    Each reads what the plain model gives it, real tokens alone. The model is left as it was.

    Args:
        model: the plain model.
        config: how FFNs are routed.
        calibration: batches that routers are fitted to.
        held_out: batches that errors are measured on.
    """
    session = lt.apply(model, config)
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


def _row(groups: str, compensate: str, errors: dict[str, float]) -> dict[str, Any]:
    by_layer = [round(error, 4) for error in errors.values()]
    root = fmean(error**2 for error in errors.values()) ** 0.5
    return {"groups": groups, "compensate": compensate, "error": round(root, 4), "layers": by_layer}


def summary() -> str:
    """Return the errors of each layer, and their root mean square, as Markdown."""

    def lay_out(found: list[dict[str, Any]]) -> str:
        lines = []
        for row in found:
            by_layer = {str(i): f"{error:.2f}" for i, error in enumerate(row["layers"], 1)}
            lines.append(row | by_layer | {"error": f"{row['error']:.3f}"})
        layers = {str(i + 1): f"layer {i + 1}" for i in range(len(found[0]["layers"]))}
        heads = {"groups": "groups", "compensate": "`compensate`", "error": "all layers"}
        return rows.table(lines, heads | layers)

    return rows.by_device(rows.read(RESULT), lay_out)
