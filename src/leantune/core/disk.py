"""The disk: files are written whole or not at all, and read with checks."""

import errno
import json
import os
import re
import shutil
import tempfile
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from leantune.errors import ConfigError, WriteError

# What says that a file cannot be written; others (a lost connection) are other people's.
_ERRNOS = {
    *(errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO),
    *(errno.EACCES, errno.EPERM, errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG),
}
# In the words of safetensors, and of torch.save, which has no error of its own for it.
_SAYS_FULL = re.compile(r"I/O error|No space left|iostream error|fail at inline_container")


def as_folder(who: str, folder: str | Path) -> Path:
    """Return a folder's path.

    Args:
        who: what was called; the first words of the error.
        folder: as the caller gave it.

    Raises:
        ConfigError: no path at all, an empty one, or one of a file.
    """
    if not isinstance(folder, str | Path) or not str(folder) or "\0" in str(folder):
        raise ConfigError(f"{who}: folder must be a path, got {folder!r}; give a folder's name")
    path = Path(folder).expanduser()
    if path.is_file():
        raise ConfigError(f"{who}: folder must be a folder, got {str(folder)!r}, which is a file")
    return path


@contextmanager
def writing(path: Path) -> Generator[None]:
    """Turn what a full or closed disk makes libraries raise inside into one error with a name.

    Raises:
        WriteError: in place of theirs; it says how many bytes are free.
    """
    try:
        yield
    except WriteError:
        raise
    except (OSError, SafetensorError, RuntimeError) as error:
        is_ours = isinstance(error, OSError) and error.errno in _ERRNOS
        if not is_ours and not _SAYS_FULL.search(str(error)):
            raise
        said = getattr(error, "strerror", None) or error
        raise WriteError(
            f"write: {path} must be writable and have room, got {said} with {free_bytes(path):,} "
            "bytes free; make room there or choose another folder, what was whole before still is"
        ) from error


def free_bytes(path: Path) -> int:
    """Return the free bytes of the disk that a path is on, or would be on."""
    return shutil.disk_usage(_nearest(path)).free


def _nearest(path: Path) -> Path:
    """Return the path itself or the nearest folder above it that exists."""
    return next(p for p in (path.absolute(), *path.absolute().parents) if p.exists())


def check_writable(folder: Path) -> None:
    """Check that a folder can be written, or made, without touching the disk.

    Raises:
        WriteError: a file is in its way, or the user may not write there.
    """
    place = _nearest(folder)
    with writing(folder):
        if not place.is_dir():
            raise NotADirectoryError(errno.ENOTDIR, "no folder", str(place))
        if not os.access(place, os.W_OK | os.X_OK):
            raise PermissionError(errno.EACCES, "no permission to write", str(place))


@contextmanager
def _replacing(path: Path) -> Generator[str]:
    """Yield the name of an empty file that takes ``path``'s place if the block ends well."""
    with writing(path):
        handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
        os.close(handle)
        try:
            yield name
            os.chmod(name, 0o644)
            os.replace(name, path)
        except BaseException:
            Path(name).unlink(missing_ok=True)
            raise


def write_atomic(path: Path, data: str | bytes) -> None:
    """Write a file so that a reader sees the old content or the new, never half of it.

    Raises:
        WriteError: the disk is full, or the place cannot be written; the old content survives.
    """
    with _replacing(path) as name, Path(name).open("wb") as out:
        out.write(data.encode() if isinstance(data, str) else data)
        out.flush()
        os.fsync(out.fileno())


def save_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write named tensors to one safetensors file, atomically.

    Shared storage is written once for each name.

    Raises:
        WriteError: the disk is full, or the place cannot be written; what was there survives.
    """
    with _replacing(path) as name:
        save_file({k: v.detach().cpu().contiguous().clone() for k, v in tensors.items()}, name)


def load_tensors(path: Path) -> dict[str, Tensor]:
    """Read a safetensors file.

    Raises:
        ConfigError: the file is missing or truncated.
    """
    try:
        return load_file(path)
    except FileNotFoundError as error:
        raise ConfigError(
            f"load: checkpoint must hold {path.name}, got no such file in {path.parent}"
        ) from error
    except SafetensorError as error:
        raise ConfigError(
            f"load: {path} must be a whole safetensors file, got a truncated or damaged one "
            f"({error}); take an earlier checkpoint"
        ) from error
    except OSError as error:
        raise ConfigError(f"load: {path} must be a readable file, got {error}") from error


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON file that holds an object.

    Raises:
        ConfigError: the file is missing, unreadable, no valid JSON, or something else.
    """
    try:
        data = json.loads(path.read_text("utf-8"))
    except (FileNotFoundError, NotADirectoryError) as error:
        raise ConfigError(
            f"load: folder must hold {path.name}, got none in {path.parent}; give the folder that "
            "leantune wrote"
        ) from error
    # A recursion error is what deep nesting gives.
    except (ValueError, RecursionError, OSError) as error:
        raise ConfigError(f"load: {path} must be valid JSON, got {error}") from error
    if not isinstance(data, dict):
        raise ConfigError(f"load: {path} must hold a JSON object, got {type(data).__name__}")
    return data
