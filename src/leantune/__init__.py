"""Fine-tune transformers with less memory and less compute."""

import importlib
from typing import TYPE_CHECKING, Any

from leantune._version import __version__
from leantune.core.apply import apply, load
from leantune.core.discovery import find_sites
from leantune.core.extras import require
from leantune.core.registry import list_methods
from leantune.core.session import Session
from leantune.errors import ConfigError, LeantuneError, SiteError, UnsupportedError
from leantune.measure.fidelity import fidelity
from leantune.measure.ledger import ledger
from leantune.measure.still_held import still_held
from leantune.methods import (
    WTACRS,
    Checkpoint,
    LoRA,
    MeProp,
    RoutedFFN,
    SparseGrad,
    SPTAttention,
)

if TYPE_CHECKING:
    from leantune.integrations.trainer import TrainerCallback
    from leantune.training.models import merge_checkpoint
    from leantune.training.run import train

# They need the extra packages, and are imported when they are asked for.
_LAZY = {
    "TrainerCallback": "leantune.integrations.trainer",
    "merge_checkpoint": "leantune.training.models",
    "train": "leantune.training.run",
}


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module 'leantune' has no attribute {name!r}")
    for package in ("transformers", "datasets", "accelerate", "sklearn", "scipy"):
        require(package, extra="train", who=f"leantune.{name}")
    return getattr(importlib.import_module(_LAZY[name]), name)


__all__ = [
    "WTACRS",
    "Checkpoint",
    "ConfigError",
    "LeantuneError",
    "LoRA",
    "MeProp",
    "RoutedFFN",
    "SPTAttention",
    "Session",
    "SiteError",
    "SparseGrad",
    "TrainerCallback",
    "UnsupportedError",
    "__version__",
    "apply",
    "fidelity",
    "find_sites",
    "ledger",
    "list_methods",
    "load",
    "merge_checkpoint",
    "still_held",
    "train",
]
