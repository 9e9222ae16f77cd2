"""Errors that a user can cause; each names the field, the value and the way out."""

from typing import Any

_MOST_SHOWN = 200


class LeantuneError(ValueError):
    """Base of every error that leantune raises on purpose."""


class ConfigError(LeantuneError):
    """An option, a recipe, a data file or a checkpoint is not acceptable."""


class SiteError(LeantuneError):
    """A method cannot act where it was asked to; lists every failing site at once."""


class UnsupportedError(LeantuneError):
    """The request is sound but this model, device or version cannot serve it."""


class WriteError(LeantuneError, OSError):
    """A file cannot be written: no room is left, or the place does not let it; an ``OSError``."""


def shown(value: Any) -> str:
    """Return a value as an error shows it: its ``repr``, cut in the middle where that is long."""
    try:
        text = repr(value)
    except Exception:
        # Python spells no number of more than 4,300 digits, and no list that nests too deep.
        return f"a {type(value).__name__} that cannot be shown"
    half = _MOST_SHOWN // 2
    return text if len(text) <= _MOST_SHOWN else f"{text[:half]} ... {text[-half:]}"
