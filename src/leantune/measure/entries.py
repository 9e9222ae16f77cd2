"""An entry is a storage that a training step holds; each storage is counted once."""

from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from leantune.measure._graph import dense_parts, storage_key

LedgerName = Literal["weights", "gradients", "optimizer", "activations"]
LEDGERS: tuple[LedgerName, ...] = ("weights", "gradients", "optimizer", "activations")


class Holder(NamedTuple):
    """A holder keeps a tensor: a module's name ("" is the model) and an operation or a role."""

    module: str
    operation: str


@dataclass(frozen=True)
class Entry:
    """An entry is one storage that the step holds.

    Args:
        ledger: where its bytes are counted.
        module: name of the module that owns it; "" is the model itself.
        kind: what it is, in words.
        num_bytes: of the whole storage, since a view keeps all of it alive.
        shape: of the first tensor seen on it.
        dtype: of the first tensor seen on it.
        device: where the storage lies.
        holders: everyone who keeps it; the first is the owner. An activation goes away only
            when all of them let go.
    """

    ledger: LedgerName
    module: str
    kind: str
    num_bytes: int
    shape: tuple[int, ...]
    dtype: torch.dtype
    device: str
    holders: tuple[Holder, ...]


class StorageCounter:
    """A storage counter collects the storages of one ledger, each once."""

    def __init__(self, name: LedgerName) -> None:
        self.name: LedgerName = name
        self._slots: dict[Any, tuple[Tensor, int, str, list[Holder]]] = {}

    def add(self, tensor: Tensor, kind: str, module: str, operation: str | None = None) -> None:
        for part in dense_parts(tensor):
            num_bytes = part.untyped_storage().nbytes()
            # Memory on the meta device has no address to tell storages apart.
            key = id(part) if part.is_meta else storage_key(part)
            if num_bytes > 0:
                slot = self._slots.setdefault(key, (part, num_bytes, kind, []))
                holder = Holder(module, operation or kind)
                if holder not in slot[3]:
                    slot[3].append(holder)

    def keys(self) -> set[Any]:
        return set(self._slots)

    def entries(self) -> list[Entry]:
        return [
            Entry(
                ledger=self.name,
                module=holders[0].module,
                kind=kind,
                num_bytes=num_bytes,
                shape=tuple(part.shape),
                dtype=part.dtype,
                device=str(part.device),
                holders=tuple(holders),
            )
            for part, num_bytes, kind, holders in self._slots.values()
        ]


def module_of(name: str) -> str:
    """Return the name of the module that owns the parameter or buffer ``name``."""
    return name.rpartition(".")[0]
