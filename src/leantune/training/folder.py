"""A run's folder: what lies in it, and who may write to it.

``recipe.json``, ``plan.json`` (with a budget), ``metrics.json``, ``model/`` (loads without
leantune), ``adapter/`` (with LoRA: a plain PEFT one), ``session/`` (the converted model's state),
``checkpoints/``, and ``checkpoints-NAME/`` of each rival. All folders have manifests, each
checkpoint its own.
"""

import json
import os
import shutil
from pathlib import Path
from typing import Any, Self

from leantune.core.disk import check_writable, free_bytes, read_json, write_atomic, writing
from leantune.core.distributed import is_first_process
from leantune.core.files import SESSION
from leantune.core.manifest import check_replaceable, remove_leftovers
from leantune.core.recipe import RECIPE_FILE
from leantune.errors import ConfigError, WriteError
from leantune.training.checkpoints import check_checkpoints, variant_folders
from leantune.training.progress import say
from leantune.training.recipe import RunRecipe
from leantune.training.results import METRICS_FILE

LOCK_FILE = ".lock"
PLAN_FILE = "plan.json"
"""What ``RunResult.plan`` will be, which a resumed run reads."""
_FOLDERS = ("model", "adapter", SESSION, "plots")
"""Each is named after its kind."""


class RunLock:
    """A lock lets one process at a time write into a run's folder, and dies with that process.

    A context manager that gives it back. A file system without locks is named, and lets all in.
    """

    def __init__(self, recipe: RunRecipe) -> None:
        self._folder = Path(recipe.output)
        self._file: Any = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *args: object) -> None:
        if self._file is not None:
            self._file.close()

    def take(self) -> None:
        """Take the lock of the folder, once, and clear away what a killed run had half-written.

        Raises:
            ConfigError: another process has it.
        """
        # Of the processes of one run the first one locks for all.
        if self._file is not None or not is_first_process():
            return
        import fcntl

        path = self._folder / LOCK_FILE
        with writing(path):
            file = path.open("a+")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            file.close()
            raise ConfigError(
                "RunRecipe: output must be a folder that no other run is writing to, got "
                f"{str(self._folder)!r}, which one is; wait for it, or choose another folder"
            ) from error
        except OSError as error:
            say(f"{path}: no lock on this file system ({error})")
        else:
            for name in _FOLDERS:
                remove_leftovers(self._folder / name)
        self._file = file


def check_folder(recipe: RunRecipe) -> None:
    """Check that the run may start in its folder, or go on there, without touching it.

    Raises:
        ConfigError: the folder exists, is no run's, holds the run of another recipe, or something
            that leantune did not write where the run would write.
        WriteError: it cannot be written.
    """
    output = Path(recipe.output)
    if not recipe.resume:
        check_writable(output.parent)
        if not _is_new(output) and not recipe.overwrite:
            raise ConfigError(
                f"RunRecipe: output must be a new folder, got {recipe.output!r}, which exists; "
                "choose another, or give resume=true to go on there, or overwrite=true to replace "
                "that run"
            )
    if recipe.resume or not _is_new(output):
        found = recipe_there(recipe)
        if recipe.resume:
            is_longer = goes_further(found, recipe)
            _check_same(found, recipe, ("epochs", "max_steps") if is_longer else ())
            if (output / METRICS_FILE).is_file() and not is_longer:
                if recipe.resume_from is None:
                    return
                raise ConfigError(
                    "RunRecipe: resume_from must be left out for a run that has ended, got "
                    f"{recipe.resume_from!r}; start another run in another folder"
                )
        check_writable(output)
        for name in _FOLDERS:
            check_replaceable(output / name, name)
        if recipe.overwrite:
            for folder in {*variant_folders(found).values(), *variant_folders(recipe).values()}:
                check_checkpoints(folder)


def _is_new(output: Path) -> bool:
    """Whether a run may start in a folder without asking."""
    if not output.is_dir():
        return not os.path.lexists(output)
    return all(path.name == LOCK_FILE for path in output.iterdir())


def recipe_there(recipe: RunRecipe) -> RunRecipe:
    """Return the recipe of the run that lies in the output folder.

    Raises:
        ConfigError: there is none.
    """
    path = Path(recipe.output) / RECIPE_FILE
    try:
        return RunRecipe.from_dict(read_json(path))
    except ConfigError as error:
        how = "resumed" if recipe.resume else "overwritten"
        raise ConfigError(
            f"RunRecipe: output must be a run's folder to be {how}, got {recipe.output!r} without "
            f"a run's {RECIPE_FILE} ({error}); choose another folder"
        ) from error


def goes_further(found: RunRecipe, recipe: RunRecipe) -> bool:
    """Return whether a recipe asks for more of a run that has ended with the recipe ``found``."""
    if not (Path(recipe.output) / METRICS_FILE).is_file():
        return False
    if found.max_steps is not None:
        return recipe.max_steps is not None and recipe.max_steps > found.max_steps
    return recipe.max_steps is None and recipe.epochs > found.epochs


def _check_same(found: RunRecipe, recipe: RunRecipe, lengths: tuple[str, ...]) -> None:
    there, wanted = found.to_dict(), recipe.to_dict()
    for key in wanted.keys() - {"output", *lengths}:
        if there[key] != wanted[key]:
            raise ConfigError(
                f"RunRecipe: {key} must be {there[key]!r} to resume the run in {recipe.output}, "
                f"got {wanted[key]!r}; keep it, or start another run in another folder"
            )


def make_folder(recipe: RunRecipe, lock: RunLock, plan: dict[str, Any] | None) -> None:
    """Start the run's folder with its recipe and plan; what an overwritten run left is removed.

    Raises:
        ConfigError: another run has started there meanwhile.
        WriteError: the disk is full; a folder that this call has made is taken away again.
    """
    output = Path(recipe.output)
    is_new = not output.exists()
    with writing(output):
        output.mkdir(parents=True, exist_ok=True)
    lock.take()
    if not recipe.overwrite:
        check_folder(recipe)
    try:
        if not _is_new(output):
            # The old recipe stays until the new one takes its place.
            folders = [*variant_folders(recipe_there(recipe)).values()]
            folders += [*variant_folders(recipe).values(), *(output / name for name in _FOLDERS)]
            for name in (METRICS_FILE, PLAN_FILE, "report.html"):
                (output / name).unlink(missing_ok=True)
            for folder in folders:
                shutil.rmtree(folder, ignore_errors=True)
        write_recipe(recipe)
        if plan is not None:
            write_atomic(output / PLAN_FILE, json.dumps(plan, indent=2) + "\n")
    except WriteError:
        if is_new:
            shutil.rmtree(output, ignore_errors=True)
        raise


def write_recipe(recipe: RunRecipe) -> None:
    """Write a run's recipe into its folder."""
    path = Path(recipe.output) / RECIPE_FILE
    write_atomic(path, json.dumps(recipe.to_dict(), indent=2) + "\n")


def check_space(recipe: RunRecipe, num_bytes: int) -> None:
    """Check that the disk has room for a checkpoint, before hours are spent on what it is of.

    Raises:
        WriteError: it has not.
    """
    free = free_bytes(Path(recipe.output))
    if free < num_bytes:
        raise WriteError(
            f"RunRecipe: output must be on a disk with room for a checkpoint of {num_bytes:,} "
            f"bytes, got {recipe.output!r} with {free:,} bytes free; make room there or choose "
            "another folder"
        )
