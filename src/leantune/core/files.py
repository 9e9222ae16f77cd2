"""Files: written atomically, read with checks; a session's folder of JSON and safetensors."""

import json
import os
import shutil
import tempfile
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from leantune.core.distributed import is_sharded
from leantune.core.recipe import RECIPE_FILE
from leantune.errors import ConfigError, UnsupportedError

WEIGHTS_FILE = "weights.safetensors"
STATE_FILE = "session.safetensors"


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
    if Path(folder).is_file():
        raise ConfigError(f"{who}: folder must be a folder, got {str(folder)!r}, which is a file")
    return Path(folder)


@contextmanager
def atomic_folder(folder: Path) -> Generator[Path]:
    """Yield an empty folder that takes ``folder``'s place when the block ends without error.

    On an error (a full disk, an interrupt) the old folder is still there, untouched.
    """
    folder = folder.absolute()
    folder.parent.mkdir(parents=True, exist_ok=True)
    fresh = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    old = fresh.with_name(f"{fresh.name}.old")
    try:
        yield fresh
        fresh.chmod(0o755)
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
    """Write a file so that a reader sees the old content or the new, never half of it."""
    with _replacing(path) as name, Path(name).open("wb") as out:
        out.write(data.encode() if isinstance(data, str) else data)
        out.flush()
        os.fsync(out.fileno())


def save_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write named tensors to one safetensors file, atomically.

    Shared storage is written once for each name.

    Raises:
        OSError: the file cannot be written; what was there before survives.
    """
    with _replacing(path) as name:
        try:
            save_file({k: v.detach().cpu().contiguous().clone() for k, v in tensors.items()}, name)
        except SafetensorError as error:
            # What safetensors makes of a full disk.
            raise OSError(f"cannot write {path}: {error}") from error


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
) -> None:
    """Write recipe, trained weights and state to ``folder``, all or nothing.

    Args:
        folder: is replaced.
        recipe: the JSON form.
        model: whose trained weights are written.
        make_state: gives the session's state; called once the folder can be written.

    Raises:
        UnsupportedError: parameters are sharded.
        OSError: the disk is full; what was there before survives.
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
    with atomic_folder(folder) as fresh:
        write_atomic(fresh / RECIPE_FILE, json.dumps(recipe, indent=2) + "\n")
        save_tensors(fresh / WEIGHTS_FILE, trained_weights(model))
        save_tensors(fresh / STATE_FILE, make_state())


def read_json(path: Path) -> Any:
    """Read one JSON file.

    Raises:
        ConfigError: the file is missing or no valid JSON.
    """
    try:
        return json.loads(path.read_text("utf-8"))
    except (FileNotFoundError, NotADirectoryError) as error:
        raise ConfigError(
            f"load: folder must hold {path.name}, got none in {path.parent}; give the folder that "
            "leantune wrote"
        ) from error
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"load: {path} must be valid JSON, got {error}") from error


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
