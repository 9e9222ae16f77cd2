"""How far routed FFNs are from the dense ones before any training: MiniLM on held-out RTE text."""

from itertools import product
from statistics import fmean
from typing import Any

import torch

import leantune as lt
from bench import rows
from bench.models import glue, minilm
from leantune.methods.routed_ffn import choose_layers
from leantune.methods.routed_ffn.layers import output_errors

RESULT = "routed_ffn_error"
ACTIVE, COMPENSATE = (2, 3), ("none", "lowrank")
SHARE = 0.75


def main(num_tokens: int = 128, num_texts: int = 8) -> None:
    """Measure each compensation at 2 and 3 of 4 groups, then what the choice of layers adds."""
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
    for compensate in COMPENSATE:
        config = lt.RoutedFFN(split="coactivation", compensate=compensate)
        errors = {s.name: 0.0 for s in lt.find_sites(model) if s.role == "mlp"}
        for chosen in choose_layers(model, calibration, config, active_share=SHARE):
            errors |= output_errors(model, chosen, calibration, held_out)
        found.append(_row(f"chosen, {SHARE:.0%} of all groups", compensate, errors))
    rows.replace(RESULT, ("groups", "compensate"), found)
    print(summary())


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
