"""Fine-tune transformers with less memory and less compute."""

from leantune._version import __version__
from leantune.core.apply import apply, load
from leantune.core.discovery import find_sites
from leantune.core.registry import list_methods
from leantune.core.session import Session
from leantune.errors import ConfigError, LeantuneError, SiteError, UnsupportedError
from leantune.measure.fidelity import fidelity
from leantune.measure.ledger import ledger
from leantune.methods import (
    WTACRS,
    Checkpoint,
    LoRA,
    MeProp,
    RoutedFFN,
    SparseGrad,
    SPTAttention,
)

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
    "__version__",
    "apply",
    "fidelity",
    "find_sites",
    "ledger",
    "list_methods",
    "load",
]
