"""What else holds the tensors that a method wants to free, by name."""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from leantune.core.apply import apply
from leantune.core.config import MethodConfig
from leantune.core.linear import Converted
from leantune.measure.entries import Entry
from leantune.measure.ledger import Ledger, ledger


@dataclass(frozen=True)
class StillHeld:
    """Inputs of sampled linears that something else keeps for backward, of one kind of place.

    Args:
        linears: names of the linears, block numbers as ``*``.
        holders: (module, operation) of everything that keeps the tensor.
        num_bytes: summed over the blocks, each storage once.
        num_tensors: how many storages.
    """

    linears: tuple[str, ...]
    holders: tuple[tuple[str, str], ...]
    num_bytes: int
    num_tensors: int


def still_held(
    model: nn.Module, batch: Mapping[str, Any], *methods: MethodConfig
) -> list[StillHeld]:
    """Name what keeps the inputs of sampled linears in memory, largest first.

    Sampling a linear's input frees nothing while another operation holds the same tensor; the list
    says where, before a run is paid for. The model is converted, measured and put back.

    Args:
        model: a plain model.
        batch: what ``model(**batch)`` takes; the output has a loss.
        methods: the methods to try.
    """
    before = ledger(model, batch)
    session = apply(model, *methods)
    try:
        session.calibrate([batch])
        return find_still_held(before, ledger(model, batch), sampled_linears(model))
    finally:
        session.remove()


def find_still_held(before: Ledger, after: Ledger, sampled: Iterable[str]) -> list[StillHeld]:
    """Compare two ledgers of one batch for what :func:`still_held` returns.

    Args:
        before: of the plain model.
        after: of the converted one.
        sampled: names of the linears whose input should go.
    """
    names = set(sampled)
    remaining = [entry for entry in after.entries if entry.ledger == "activations"]
    groups: dict[tuple[Any, Any], list[int]] = {}
    for entry in before.entries:
        linears = [h.module for h in entry.holders if h.module in names]
        if entry.ledger != "activations" or not linears:
            continue
        twin = next((e for e in remaining if _same_tensor(entry, e, names)), None)
        if twin is not None:
            key = (
                tuple(dict.fromkeys(map(_starred, linears))),
                tuple(dict.fromkeys((_starred(h.module), h.operation) for h in twin.holders)),
            )
            groups.setdefault(key, []).append(entry.num_bytes)
    found = [
        StillHeld(linears, holders, sum(sizes), len(sizes))
        for (linears, holders), sizes in groups.items()
    ]
    return sorted(found, key=lambda held: -held.num_bytes)


def sampled_linears(model: nn.Module) -> list[str]:
    """Return the names of the linears of which a method keeps some rows of the input only."""
    return [
        name
        for name, module in model.named_modules()
        if isinstance(module, Converted) and module.rows is not None
    ]


def _same_tensor(before: Entry, after: Entry, sampled: set[str]) -> bool:
    """Tell whether the input of a sampled linear is the tensor of an entry after conversion."""
    if (before.num_bytes, before.dtype) != (after.num_bytes, after.dtype):
        return False
    # A linear that draws in backward keeps its whole input itself, under another operation.
    kept_by_linear = {h.module for h in before.holders} & {h.module for h in after.holders}
    return bool(set(before.holders) & set(after.holders)) or bool(kept_by_linear & sampled)


def _starred(module: str) -> str:
    return re.sub(r"(?<=\.)\d+(?=\.|$)", "*", module)
