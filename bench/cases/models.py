"""On which of the popular model types each method runs, and what sampling keeps there."""

import re
from typing import Any

import torch
import zoo

import leantune as lt
from bench import rows
from leantune.core.config import MethodConfig
from leantune.errors import LeantuneError
from leantune.measure.ledger import ledger

_TRIED: dict[str, tuple[MethodConfig, ...]] = {
    "Checkpoint": (lt.Checkpoint(),),
    "WTACRS": (lt.WTACRS(keep_ratio=0.3),),
    "LoRA + WTACRS": (lt.LoRA(rank=4), lt.WTACRS(keep_ratio=0.3)),
    "SparseGrad": (lt.SparseGrad(),),
    "RoutedFFN": (lt.RoutedFFN(),),
    "SPTAttention": (lt.SPTAttention(subspace_width=4),),
}
_MEASURED = ("Checkpoint", "WTACRS")


def main() -> None:
    """Try every method on every type; rewrite ``bench/results/models.jsonl``."""
    rows.write("models", [_try(name, method) for name in zoo.NAMES for method in _TRIED])


def _try(name: str, method: str) -> dict[str, Any]:
    """Take one training step and return its row; ``reads`` of linears share ``samples``."""
    model, batch = zoo.build(name)
    exact = ledger(model, batch).activations
    row: dict[str, Any] = {"type": name, "method": method}
    try:
        lt.apply(model, *_TRIED[method]).calibrate([batch, batch])
    except LeantuneError as error:
        return row | {"outcome": "refused", "said": str(error)}
    book = ledger(model, batch)
    # The numbers of a sample's rows: the linears that share the sample hold them together.
    samples = [e for e in book.entries if e.kind == "linear input" and e.dtype == torch.int32]
    return row | {
        "outcome": "runs",
        "activations": round(book.activations / exact, 3),
        "samples": len(samples),
        "reads": sum(len({holder.module for holder in e.holders}) for e in samples),
    }


def summary() -> str:
    """Return on how many of the types each method runs."""
    found = rows.read("models")
    lines = []
    for method in _TRIED:
        of_method = [row for row in found if row["method"] == method]
        runs = [row["type"] for row in of_method if row["outcome"] == "runs"]
        lacking = [row["type"] for row in of_method if row["outcome"] != "runs"]
        lines.append(
            {
                "method": f"`{method}`",
                "runs": f"{len(runs)} of {len(of_method)}",
                "lacking": ", ".join(lacking) if len(lacking) < len(runs) else "the others",
            }
        )
    return rows.table(lines, {"method": "", "runs": "types it runs on", "lacking": "not on"})


def types() -> str:
    """Return a line for each type and a column for each method; then the refusals, by reason."""
    found = {(row["type"], row["method"]): row for row in rows.read("models")}
    lines = []
    for name in dict.fromkeys(name for name, _ in found):
        line = {"type": name} | {method: _cell(found[name, method]) for method in _TRIED}
        sampled = found[name, "WTACRS"]
        if sampled["outcome"] == "runs":
            line["shared"] = f"{sampled['reads']} on {sampled['samples']}"
        lines.append(line)
    heads = {"type": "model type"} | {method: method for method in _TRIED}
    table = rows.table(lines, heads | {"shared": "linears on samples"})
    reasons: dict[str, list[str]] = {}
    for (name, method), row in found.items():
        if row["outcome"] == "refused":
            reasons.setdefault(f"{method}: {_reason(row['said'])}", []).append(name)
    refusals = [f"- {', '.join(names)}. {reason}" for reason, names in sorted(reasons.items())]
    return "\n".join([table, "", *refusals])


def _reason(said: str) -> str:
    """Return what a refusal says of its first site, or of all, without the way out."""
    of_site = said.partition("cannot be used: ")[2] or said
    return re.sub(r", got \w+, which.*", "", of_site.partition(": ")[2].partition(";")[0])


def _cell(row: dict[str, Any]) -> str:
    if row["outcome"] == "refused":
        return "-"
    return f"{row['activations']:.2f}" if row["method"] in _MEASURED else "yes"
