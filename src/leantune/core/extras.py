"""Optional packages: one function that imports them and names the extra that is missing."""

import importlib
from types import ModuleType

from leantune.errors import UnsupportedError


def require(package: str, *, extra: str, who: str) -> ModuleType:
    """Import an optional package, and say how to install it where it is missing.

    Args:
        package: name to import.
        extra: the extra of leantune that brings it.
        who: what needs it; the first words of the error.

    Raises:
        UnsupportedError: the package is not installed.
    """
    try:
        return importlib.import_module(package)
    except ModuleNotFoundError as error:
        if error.name != package.partition(".")[0]:
            raise
        raise UnsupportedError(
            f"{who}: package {package} must be installed, got none; pip install "
            f"'leantune[{extra}]'"
        ) from error
