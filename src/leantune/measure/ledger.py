"""The ledger counts the exact bytes that one training step holds, by site and by kind."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from copy import deepcopy
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from leantune.core.restore import restored_afterwards
from leantune.core.tensors import iter_tensors
from leantune.errors import UnsupportedError
from leantune.measure._record import BATCH_INPUT, record_forward
from leantune.measure.entries import LEDGERS, Entry, LedgerName, StorageCounter, module_of
from leantune.measure.step import Batch, Step, make_step
from leantune.measure.text import format_bytes, table

_STATE = "optimizer state"


@dataclass(frozen=True)
class Ledger:
    """A ledger holds the exact bytes of one training step; no storage counts twice in one part.

    Args:
        entries: one per storage, by ledger and in the order of the forward.
        optimizer_is_predicted: the optimizer's bytes are a forecast, not a count.
    """

    entries: tuple[Entry, ...] = field(repr=False)
    optimizer_is_predicted: bool = False

    @property
    def weights(self) -> int:
        """Return the bytes of parameters and buffers."""
        return self._sum("weights")

    @property
    def gradients(self) -> int:
        """Return the bytes of the ``.grad`` that one backward leaves on the parameters."""
        return self._sum("gradients")

    @property
    def optimizer(self) -> int:
        """Return the bytes of optimizer state after a step."""
        return self._sum("optimizer")

    @property
    def activations(self) -> int:
        """Return the bytes kept for backward at the end of the forward, batch inputs included."""
        return self._sum("activations")

    @property
    def batch_inputs(self) -> int:
        """Return the part of ``activations`` that is the caller's own batch and exists anyway."""
        return sum(entry.num_bytes for entry in self.entries if entry.kind == BATCH_INPUT)

    @property
    def total(self) -> int:
        """Return the sum of the four ledgers."""
        return sum(entry.num_bytes for entry in self.entries)

    def by_module(
        self, depth: int | None = None, *, ledger: LedgerName | None = None
    ) -> dict[str, int]:
        """Return bytes by owning module, largest first.

        Args:
            depth: parts of the dotted name to keep; None keeps all, 0 sums to the model "".
            ledger: count this ledger only.
        """
        return self._group(lambda e: ".".join(e.module.split(".")[:depth]), ledger)

    def by_kind(self, *, ledger: LedgerName | None = None) -> dict[str, int]:
        """Return bytes by kind, largest first; ``ledger`` restricts the count to one ledger."""
        return self._group(lambda e: e.kind, ledger)

    def saved_bytes(self, module_name: str) -> int:
        """Return bytes of activations that a module, or one inside it, holds for backward.

        Storages that it shares with other modules count in full, so that the figures of two
        modules may add up to more than ``activations``.
        """
        return sum(
            entry.num_bytes
            for entry in self.entries
            if entry.ledger == "activations"
            and any(_is_inside(holder.module, module_name) for holder in entry.holders)
        )

    def to_dict(self) -> dict[str, Any]:
        """Return totals and entries as plain JSON types; sizes in bytes."""
        return {
            **{name: self._sum(name) for name in LEDGERS},
            "total": self.total,
            "batch_inputs": self.batch_inputs,
            "optimizer_is_predicted": self.optimizer_is_predicted,
            "entries": [
                {
                    **vars(entry),
                    "shape": list(entry.shape),
                    "dtype": str(entry.dtype).removeprefix("torch."),
                    "holders": [list(holder) for holder in entry.holders],
                }
                for entry in self.entries
            ],
        }

    def table(self, *, depth: int | None = None, max_rows: int = 20) -> str:
        """Return the ledgers, the kinds and the modules of activations as plain text.

        Args:
            depth: parts of module names to keep, as in ``by_module``.
            max_rows: modules to list; the rest is summed in one row.
        """
        ledgers = {name: self._sum(name) for name in LEDGERS}
        if self.optimizer_is_predicted:
            ledgers = {f"{k} (predicted)" if k == "optimizer" else k: v for k, v in ledgers.items()}
        kinds = self.by_kind(ledger="activations")
        if BATCH_INPUT in kinds:
            kinds[f"{BATCH_INPUT} (exists anyway)"] = kinds.pop(BATCH_INPUT)
        modules = self.by_module(depth, ledger="activations")
        return "\n\n".join(
            (
                table(("ledger", "size", "share"), _shares(ledgers, len(ledgers))),
                table(("activations by kind", "size", "share"), _shares(kinds, len(kinds))),
                table(("activations by module", "size", "share"), _shares(modules, max_rows)),
            )
        )

    def compare(self, other: "Ledger") -> str:
        """Return a plain-text table of this ledger (before) beside another one (after)."""
        blocks: list[str] = []
        for title, before, after in (
            ("ledger", *({n: x._sum(n) for n in LEDGERS} for x in (self, other))),
            ("activations by kind", *(x.by_kind(ledger="activations") for x in (self, other))),
        ):
            names = sorted(before.keys() | after.keys(), key=lambda n: -before.get(n, 0))
            rows = [(name, before.get(name, 0), after.get(name, 0)) for name in names]
            rows.append(("total", sum(before.values()), sum(after.values())))
            cells = [
                (name, format_bytes(a), format_bytes(b), f"{b / a:.3f}" if a else "-")
                for name, a, b in rows
            ]
            blocks.append(table((title, "before", "after", "ratio"), cells))
        return "\n\n".join(blocks)

    def _sum(self, ledger: LedgerName) -> int:
        return sum(entry.num_bytes for entry in self.entries if entry.ledger == ledger)

    def _group(self, key: Callable[[Entry], str], ledger: LedgerName | None) -> dict[str, int]:
        sums: dict[str, int] = {}
        for entry in self.entries:
            if ledger is None or entry.ledger == ledger:
                sums[key(entry)] = sums.get(key(entry), 0) + entry.num_bytes
        return dict(sorted(sums.items(), key=lambda item: -item[1]))


def ledger(
    model: nn.Module, batch: Batch, *, optimizer: torch.optim.Optimizer | None = None
) -> Ledger:
    """Measure the exact bytes that one training step on ``batch`` holds.

    Runs one forward in training mode and one backward, and takes no optimizer step. Activations
    are the storages that backward keeps alive when the forward has ended, parameters and
    buffers excluded: what ``save_for_backward`` or torch itself saved, what a Python Function
    hid on its ``ctx``, and what inner pack hooks made of it (offloaded tensors count where they
    lie). Saved batch inputs are counted and marked with a kind of their own, since the caller's
    tensors exist with or without them. Sizes are those of the storages; what an allocator adds
    by rounding up is not in them. Afterwards training flags, gradients, buffers, generator
    states and the session of a converted model are as before.

    Args:
        model: on a real device; modules inside a compiled region are not told apart.
        batch: keyword arguments, positional arguments or the only argument of the model. The
            loss is ``output.loss``, ``output["loss"]``, the first scalar, or the sum of the
            output's differentiable tensors.
        optimizer: its state is counted if it has any; otherwise it is forecast by a step of a
            copy on the meta device. None forecasts AdamW: ``2 * numel * itemsize + 4`` for each
            parameter that received a gradient (without the 4 for a sparse gradient).

    Raises:
        UnsupportedError: the model is on the meta device, a saved tensor's layout gives no
            access to its memory, or the optimizer cannot be forecast.
        ConfigError: the batch is empty, or the output has no differentiable tensor.
    """
    return count_step(make_step("ledger", model, batch), optimizer)


def count_step(
    step: Step,
    optimizer: torch.optim.Optimizer | None = None,
    watch: AbstractContextManager[object] | None = None,
) -> Ledger:
    """Count what a step holds, as :func:`ledger` does; ``watch`` is entered for its two passes."""
    model = step.model
    with restored_afterwards(model, step.tensors()):
        model.train()
        weights = StorageCounter("weights")
        for name, parameter in model.named_parameters(remove_duplicate=False):
            kind = "parameter" if parameter.requires_grad else "frozen parameter"
            weights.add(parameter, kind, module_of(name))
        for name, buffer in model.named_buffers(remove_duplicate=False):
            weights.add(buffer, "buffer", module_of(name))
        with watch or nullcontext(), torch.enable_grad():
            activations, loss = record_forward(step, weights)
            torch.autograd.backward(loss)
        gradients = StorageCounter("gradients")
        for name, parameter in model.named_parameters():
            if parameter.grad is not None:
                kind = "sparse gradient" if parameter.grad.is_sparse else "gradient"
                gradients.add(parameter.grad, kind, module_of(name))
        state, is_predicted = _optimizer_storages(model, optimizer)
    counted = (weights.entries(), gradients.entries(), state.entries(), activations)
    return Ledger(tuple(chain.from_iterable(counted)), is_predicted)


def _optimizer_storages(
    model: nn.Module, optimizer: torch.optim.Optimizer | None
) -> tuple[StorageCounter, bool]:
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    counter = StorageCounter("optimizer")
    if optimizer is None:
        for name, parameter in model.named_parameters():
            if parameter.grad is not None:
                for _ in range(2):
                    counter.add(torch.empty_like(parameter, device="meta"), _STATE, module_of(name))
                if not parameter.grad.is_sparse:
                    step = torch.empty((), dtype=torch.float32, device="meta")
                    counter.add(step, _STATE, module_of(name))
        return counter, True
    is_predicted = not any(True for _ in iter_tensors(list(optimizer.state.values())))
    if is_predicted:
        twins, state = _meta_state(optimizer)
        names = {id(twins[key]): name for key, name in names.items() if key in twins}
    else:
        state = optimizer.state
    for parameter, value in state.items():
        module = module_of(names.get(id(parameter), ""))
        for tensor in iter_tensors(value):
            counter.add(tensor, _STATE, module)
    return counter, is_predicted


def _meta_state(optimizer: torch.optim.Optimizer) -> tuple[dict[int, Tensor], Any]:
    """Let a copy of the optimizer take one step on the meta device, where nothing is stored."""
    twins: dict[int, Tensor] = {}
    for parameter in chain.from_iterable(group["params"] for group in optimizer.param_groups):
        twin = nn.Parameter(torch.empty_like(parameter, device="meta"), parameter.requires_grad)
        if parameter.grad is not None:
            twin.grad = torch.empty_like(parameter.grad, device="meta")
        twins[id(parameter)] = twin
    try:
        copy = deepcopy(optimizer, dict(twins))
        copy.step()
    except (RuntimeError, TypeError, AttributeError) as error:
        raise UnsupportedError(
            f"ledger: optimizer must have state, or be one whose state can be forecast, got "
            f"{type(optimizer).__name__} before its first step ({error}); take one step first, "
            f"or pass optimizer=None for the forecast of AdamW"
        ) from error
    return twins, copy.state


def _shares(sizes: dict[str, int], max_rows: int) -> list[tuple[str, str, str]]:
    total = sum(sizes.values())
    ranked = sorted(sizes.items(), key=lambda item: -item[1])
    if len(ranked) > max_rows:
        rest = ranked[max_rows:]
        ranked = [*ranked[:max_rows], (f"{len(rest)} more", sum(size for _, size in rest))]
    ranked.append(("total", total))
    return [
        (name or "(model)", format_bytes(size), f"{size / total:.1%}" if total else "-")
        for name, size in ranked
    ]


def _is_inside(module: str, parent: str) -> bool:
    return parent in ("", module) or module.startswith(parent + ".")
