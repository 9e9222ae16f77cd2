"""A manifest says what leantune wrote into a folder; that alone is trusted and replaced."""

import glob
import hashlib
import json
import re
import shutil
import tempfile
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from leantune.core.disk import check_writable, read_json, write_atomic, writing
from leantune.errors import ConfigError

MANIFEST_FILE = "leantune_manifest.json"
_FORMAT = 1


def write_manifest(folder: Path, kind: str) -> None:
    """Write names, sizes and SHA-256 of all files in ``folder``, which is whole from then on.

    Args:
        folder: what it holds now was written by leantune, or for it.
        kind: what it holds: a folder is only replaced by one of its kind.
    """
    files: dict[str, dict[str, Any]] = {}
    with writing(folder):
        for path in sorted(folder.rglob("*")):
            name = path.relative_to(folder).as_posix()
            if path.is_file() and name != MANIFEST_FILE:
                files[name] = {"bytes": path.stat().st_size, "sha256": _sha256(path)}
    content = {"format": _FORMAT, "kind": kind, "files": files}
    write_atomic(folder / MANIFEST_FILE, json.dumps(content, indent=1) + "\n")


def find_damage(folder: Path, kind: str) -> str | None:
    """Say how a folder differs from what its manifest says was written; None: it is whole."""
    if not folder.is_dir():
        return "no such folder"
    try:
        for name, (size, digest) in _read_manifest(folder, kind).items():
            path = folder / name
            if not path.is_file():
                return f"{name} missing"
            if path.stat().st_size != size:
                return f"{name} with {path.stat().st_size:,} bytes instead of {size:,}"
            if _sha256(path) != digest:
                return f"{name} with other bytes than were written"
    except ConfigError as error:
        return str(error)
    except OSError as error:
        return f"a file that cannot be read ({error})"
    return None


def check_replaceable(folder: Path, kind: str) -> None:
    """Check that ``folder`` is new, empty, or holds only what leantune wrote, unchanged.

    Raises:
        ConfigError: it holds something else, which is named, or is the working folder, the home
            folder or one above them, or no folder.
        WriteError: it cannot be written.
    """
    check_writable(folder.parent)
    got = None
    if folder.is_symlink() or (folder.exists() and not folder.is_dir()):
        got = "a symbolic link" if folder.is_symlink() else "a file"
    elif any(place.is_relative_to(folder.resolve()) for place in (Path.cwd(), Path.home())):
        got = "the working folder, the home folder or one above them"
    elif folder.is_dir() and (stranger := _find_stranger(folder, kind)):
        got = f"{stranger}, which leantune did not write or which was changed since"
    if got is not None:
        raise ConfigError(
            f"{kind}: folder must be new, empty or what leantune wrote as {kind} before, got "
            f"{str(folder)!r}: {got}; choose another folder, or move yourself what is there"
        )


def _find_stranger(folder: Path, kind: str) -> str | None:
    """Return the first name in a folder that its manifest does not vouch for."""
    try:
        known = _read_manifest(folder, kind)
    except ConfigError:
        known = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.is_symlink():
            return name
        if path.is_dir():
            if not any(other.startswith(f"{name}/") for other in known):
                return name
        elif name == MANIFEST_FILE:
            if not known:
                return name
        elif known.get(name) != (path.stat().st_size, _sha256(path)):
            return name
    return None


def _read_manifest(folder: Path, kind: str) -> dict[str, tuple[int, str]]:
    """Return name -> size and SHA-256; raise ConfigError, in few words, where there is none."""
    path = folder / MANIFEST_FILE
    if not path.is_file():
        raise ConfigError(f"no {MANIFEST_FILE}, which is written last")
    try:
        data = read_json(path)
        if data["format"] != _FORMAT:
            raise ValueError(f"format {data['format']}")
        if data["kind"] != kind:
            raise ConfigError(f"the {MANIFEST_FILE} of a {data['kind']}")
        files = {name: (entry["bytes"], entry["sha256"]) for name, entry in data["files"].items()}
        if not files:
            raise ValueError("no files")
        return files
    except ConfigError:
        raise
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        raise ConfigError(f"a damaged {MANIFEST_FILE} ({error})") from error


@contextmanager
def atomic_folder(folder: Path, kind: str) -> Generator[Path]:
    """Yield an empty folder that takes ``folder``'s place, with a manifest, when the block ends.

    On an error (a full disk, an interrupt) the old folder is still there, untouched.

    Args:
        folder: new, empty, or what an earlier call with the same ``kind`` wrote.
        kind: what the folder holds.

    Raises:
        ConfigError: something else is there; raised before anything is written.
        WriteError: the disk is full, or the place cannot be written.
    """
    folder = folder.absolute()
    check_replaceable(folder, kind)
    with writing(folder):
        folder.parent.mkdir(parents=True, exist_ok=True)
        fresh = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
        old = fresh.with_name(f"{fresh.name}.old")
        try:
            yield fresh
            fresh.chmod(0o755)
            write_manifest(fresh, kind)
            if folder.exists():
                folder.replace(old)
            fresh.replace(folder)
        except BaseException:
            if old.exists() and not folder.exists():
                old.replace(folder)
            raise
        finally:
            shutil.rmtree(fresh, ignore_errors=True)
            shutil.rmtree(old, ignore_errors=True)


def remove_leftovers(folder: Path) -> None:
    """Remove what :func:`atomic_folder` had half-written beside ``folder`` when it was killed.

    For who knows that nobody writes there now.
    """
    name = re.compile(rf"\.{re.escape(folder.name)}\.[a-z0-9_]{{8}}(\.old)?")
    for path in folder.parent.glob(f".{glob.escape(folder.name)}.*"):
        if name.fullmatch(path.name):
            shutil.rmtree(path, ignore_errors=True)


def _sha256(path: Path) -> str:
    """Return a file's SHA-256; the file may be larger than memory."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
