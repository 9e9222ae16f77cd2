"""Files: written atomically, read with checks; a session's folder of JSON and safetensors."""

import errno
import hashlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from leantune.core.adapters import original_name
from leantune.core.distributed import is_sharded
from leantune.core.recipe import RECIPE_FILE
from leantune.errors import ConfigError, UnsupportedError, WriteError

WEIGHTS_FILE = "weights.safetensors"
STATE_FILE = "session.safetensors"
BASE_FILE = "base.safetensors"
MANIFEST_FILE = "leantune_manifest.json"
SESSION = "session"
"""The kind of folder that a session is saved in."""

_MANIFEST_FORMAT = 1

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
                files[name] = {"bytes": path.stat().st_size, "sha256": sha256(path)}
    content = {"format": _MANIFEST_FORMAT, "kind": kind, "files": files}
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
            if sha256(path) != digest:
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
        elif known.get(name) != (path.stat().st_size, sha256(path)):
            return name
    return None


def _read_manifest(folder: Path, kind: str) -> dict[str, tuple[int, str]]:
    """Return name -> size and SHA-256; raise ConfigError, in few words, where there is none."""
    path = folder / MANIFEST_FILE
    if not path.is_file():
        raise ConfigError(f"no {MANIFEST_FILE}, which is written last")
    try:
        data = read_json(path)
        if data["format"] != _MANIFEST_FORMAT:
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


def sha256(path: Path) -> str:
    """Return a file's SHA-256; the file may be larger than memory."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


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


def trained_weights(model: nn.Module) -> dict[str, Tensor]:
    """Return what trains, by name, as the model's ``state_dict`` has it: a session's saved weights.

    A module may keep its weights in another order than its ``state_dict``. Of several processes all
    must call it.
    """
    state = model.state_dict()
    return {name: state[name] for name in _trained_parameters(model)}


def _trained_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    return {n: p for n, p in model.named_parameters() if p.requires_grad}


def write_session(
    folder: Path,
    recipe: Mapping[str, Any],
    model: nn.Module,
    make_state: Callable[[], Mapping[str, Tensor]],
    base: Mapping[str, Tensor],
) -> None:
    """Write recipe, trained weights and state to ``folder``, all or nothing.

    Args:
        folder: new, empty, or a session's; it is replaced.
        recipe: the JSON form.
        model: whose trained weights are written.
        make_state: gives the session's state; called once the folder can be written.
        base: samples of the base's weights; those that train, and so are saved, are left out.

    Raises:
        ConfigError: the folder holds something else.
        UnsupportedError: parameters are sharded.
        WriteError: the disk is full; what was there before survives.
    """
    trained = _trained_parameters(model)
    # Asked of the parameters: a sharded model's state_dict may wait for the other processes.
    sharded = [name for name, parameter in trained.items() if is_sharded(parameter)]
    if sharded:
        raise UnsupportedError(
            f"session.save: parameters must be whole, got {sharded[0]} in shards ({len(sharded)} "
            "such); in all processes call session.merge() and gather the plain model's state with "
            "torch.distributed.checkpoint.state_dict.get_model_state_dict"
        )
    saved = {original_name(name) for name in trained}
    with atomic_folder(folder, SESSION) as fresh:
        write_atomic(fresh / RECIPE_FILE, json.dumps(recipe, indent=2) + "\n")
        save_tensors(fresh / BASE_FILE, {n: v for n, v in base.items() if n not in saved})
        save_tensors(fresh / WEIGHTS_FILE, trained_weights(model))
        save_tensors(fresh / STATE_FILE, make_state())


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


def load_weights(model: nn.Module, folder: Path) -> None:
    """Copy saved weights into the parameters that train, by name, all or nothing.

    Raises:
        ConfigError: names or shapes differ from the model's.
    """
    saved = load_tensors(folder / WEIGHTS_FILE)
    wanted = _trained_parameters(model)
    lost = sorted(set(wanted) ^ set(saved))
    if lost:
        where = "the file" if lost[0] in wanted else "the model"
        raise ConfigError(
            f"load: weights must match the model's trainable parameters, got {lost[0]!r} missing "
            f"in {where} ({len(lost)} differ); load onto the base model that was saved from, with "
            "the same parameters frozen"
        )
    for name, value in saved.items():
        if value.shape != wanted[name].shape:
            raise ConfigError(
                f"load: {name} must have shape {tuple(wanted[name].shape)}, got "
                f"{tuple(value.shape)}; load onto the base model that was saved from"
            )
    model.load_state_dict(saved, strict=False)
