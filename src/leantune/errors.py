"""Errors that a user can cause; each names the field, the value and the way out."""


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
