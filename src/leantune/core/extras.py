"""Optional packages: the one function that says which extra brings a missing one."""

import importlib.util

from leantune.errors import UnsupportedError


def require(package: str, *, extra: str | None, who: str) -> None:
    """Check that an optional package is installed; it is not imported here.

    Args:
        package: name that is imported.
        extra: the extra of leantune that brings it; None where none does.
        who: what needs it; the first words of the error.

    Raises:
        UnsupportedError: the package is not installed.
    """
    try:
        is_there = importlib.util.find_spec(package) is not None
    except ImportError:
        is_there = False
    if not is_there:
        what = package if extra is None else f"'leantune[{extra}]'"
        raise UnsupportedError(
            f"{who}: package {package} must be installed, got none; pip install {what}"
        )
