"""A run that is cut off, and what may happen to the files of its checkpoints."""

import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from transformers import TrainerCallback

from leantune.core.manifest import MANIFEST_FILE


class CutOff(TrainerCallback):
    """End a run at once after a number of steps."""

    def __init__(self, num_steps: int) -> None:
        self.num_steps = num_steps

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.num_steps:
            raise KeyboardInterrupt


class Payload:
    """Makes a folder where it is unpickled."""

    def __reduce__(self) -> Any:
        return os.mkdir, ("ran",)


def flip(path: Path) -> None:
    """Change one bit in the middle."""
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def drop_tensor(path: Path) -> None:
    """Leave out one tensor of a file that stays valid."""
    tensors = load_file(path)
    tensors.pop(min(tensors))
    save_file(tensors, path)


FILES = ("model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth")
FILES += ("trainer_state.json", "leantune_session.safetensors", MANIFEST_FILE)
"""Of a checkpoint."""
TENSORS = tuple(name for name in FILES if name.endswith(".safetensors"))
TEXTS = tuple(name for name in FILES if name.endswith(".json"))

DAMAGES: dict[str, Callable[[Path], Any]] = {
    "missing": Path.unlink,
    "flipped": flip,
    "truncated": lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]),
    "short": lambda path: path.write_bytes(path.read_bytes()[:-2]),
    "longer": lambda path: path.write_bytes(path.read_bytes() + b"}"),
    "empty": lambda path: path.write_bytes(b""),
    "garbage": lambda path: path.write_bytes(b"\xff[[{" * 99),
    "nested": lambda path: path.write_text("[" * 100_000),
    "pickled": lambda path: path.write_bytes(pickle.dumps(Payload(), protocol=2)),
    "without a tensor": drop_tensor,
    "a folder": lambda path: (path.unlink(), path.mkdir()),
    "a dead link": lambda path: (path.unlink(), path.symlink_to("nowhere")),
}
