"""Fine-tune transformers with less memory and less compute."""

from leantune.core import registry
from leantune.core.apply import apply, load
from leantune.core.session import Session
from leantune.errors import ConfigError, LeantuneError, SiteError, UnsupportedError
from leantune.measure import fidelity, ledger
from leantune.methods import (
    WTACRS,
    Checkpoint,
    LoRA,
    MeProp,
    RoutedFFN,
    SparseGrad,
    SPTAttention,
)

# Importing the subpackage bound its name here; the public name is the function.
methods = registry.methods

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
    "UnsupportedError",
    "apply",
    "fidelity",
    "ledger",
    "load",
    "methods",
]
