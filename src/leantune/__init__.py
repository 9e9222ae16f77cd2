"""Fine-tune transformers with less memory and less compute."""

import importlib
from typing import TYPE_CHECKING, Any

from leantune._version import __version__

if TYPE_CHECKING:
    from leantune.core.apply import apply, load
    from leantune.core.discovery import find_sites
    from leantune.core.registry import list_methods
    from leantune.core.session import Session
    from leantune.errors import (
        ConfigError,
        LeantuneError,
        SiteError,
        UnsupportedError,
        WriteError,
    )
    from leantune.integrations.trainer import TrainerCallback
    from leantune.measure.fidelity import fidelity
    from leantune.measure.ledger import ledger
    from leantune.measure.still_held import still_held
    from leantune.methods import (
        WTACRS,
        Checkpoint,
        Liger,
        LoRA,
        MeProp,
        RoutedFFN,
        SparseGrad,
        SPTAttention,
    )
    from leantune.planner.plan import Plan, plan
    from leantune.training.evaluation import evaluate, predict
    from leantune.training.models import merge_checkpoint
    from leantune.training.run import train

# Module -> its public names. Imported when first asked for: the command's help waits for no torch.
_HOMES = {
    "core.apply": ("apply", "load"),
    "core.discovery": ("find_sites",),
    "core.registry": ("list_methods",),
    "core.session": ("Session",),
    "errors": ("ConfigError", "LeantuneError", "SiteError", "UnsupportedError", "WriteError"),
    "integrations.trainer": ("TrainerCallback",),
    "measure.fidelity": ("fidelity",),
    "measure.ledger": ("ledger",),
    "measure.still_held": ("still_held",),
    "methods": (
        "WTACRS",
        "Checkpoint",
        "Liger",
        "LoRA",
        "MeProp",
        "RoutedFFN",
        "SPTAttention",
        "SparseGrad",
    ),
    "planner.plan": ("Plan", "plan"),
    "training.evaluation": ("evaluate", "predict"),
    "training.models": ("merge_checkpoint",),
    "training.run": ("train",),
}
_NEED_EXTRA = ("integrations.trainer", "training.")


def __getattr__(name: str) -> Any:
    home = next((home for home, names in _HOMES.items() if name in names), None)
    if home is None:
        raise AttributeError(f"module 'leantune' has no attribute {name!r}")
    if home.startswith(_NEED_EXTRA):
        from leantune.core.extras import require

        for package in ("transformers", "datasets", "accelerate", "sklearn", "scipy"):
            require(package, extra="train", who=f"leantune.{name}")
    value = globals()[name] = getattr(importlib.import_module(f"leantune.{home}"), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


__all__ = [
    "WTACRS",
    "Checkpoint",
    "ConfigError",
    "LeantuneError",
    "Liger",
    "LoRA",
    "MeProp",
    "Plan",
    "RoutedFFN",
    "SPTAttention",
    "Session",
    "SiteError",
    "SparseGrad",
    "TrainerCallback",
    "UnsupportedError",
    "WriteError",
    "__version__",
    "apply",
    "evaluate",
    "fidelity",
    "find_sites",
    "ledger",
    "list_methods",
    "load",
    "merge_checkpoint",
    "plan",
    "predict",
    "still_held",
    "train",
]
