"""A run's folder: what lies in it, who may write to it, and where to go on.

``recipe.json``, ``metrics.json``, ``model/`` (loads without leantune), ``adapter/`` (with LoRA: a
plain PEFT one), ``session/`` (the converted model's state), ``checkpoints/``, and
``checkpoints-NAME/`` of each rival. All but the first two have manifests, each checkpoint its own.
"""

import json
import os
import re
import shutil
import sys
from pathlib import Path
from typing import Any, Self

import torch
from transformers import TrainerCallback

from leantune.core.disk import check_writable, free_bytes, read_json, write_atomic, writing
from leantune.core.distributed import is_distributed, is_first_process
from leantune.core.files import SESSION
from leantune.core.manifest import MANIFEST_FILE, check_replaceable, find_damage, write_manifest
from leantune.core.recipe import RECIPE_FILE
from leantune.errors import ConfigError, WriteError
from leantune.training.recipe import RunRecipe
from leantune.training.results import METRICS_FILE

RESULT_FILE = "result.json"
LOCK_FILE = ".lock"
CHECKPOINT = "checkpoint"
KEPT_CHECKPOINTS = 2
"""The one before serves where the last is damaged."""

_FOLDERS = {"model": "model", "adapter": "adapter", "session": SESSION, "plots": "plots"}
_STEP = re.compile(r"checkpoint-(\d+)")
# What a run and its trainer write below ``checkpoints``; also in one that was cut off half-way.
_OF_A_TRAINER = re.compile(
    rf"\.?{RESULT_FILE}.*|{_STEP.pattern}(/(\.?leantune_|model|adapter_|config|generation_config|"
    r"training_args|optimizer|scheduler|scaler|rng_state|trainer_state|tokenizer|added_tokens|"
    r"special_tokens_map|vocab|merges|spiece|sentencepiece|chat_template|README\.md)[^/]*)?"
)


def variant_folders(recipe: RunRecipe) -> dict[str, Path]:
    """Return name -> folder of checkpoints of everything that the run trains, its own last."""
    output, names = Path(recipe.output), list(recipe.variants())
    rivals = {name: output / f"checkpoints-{name}" for name in names[:-1]}
    return rivals | {names[-1]: output / "checkpoints"}


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
        """Take the lock of the folder, once.

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
            print(f"{path}: no lock on this file system ({error})", file=sys.stderr)
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
        found = _recipe_there(recipe)
        if recipe.resume:
            _check_same(found, recipe)
            if (output / METRICS_FILE).is_file():
                return
        check_writable(output)
        for name, kind in _FOLDERS.items():
            check_replaceable(output / name, kind)
        if recipe.overwrite:
            for folder in {*variant_folders(found).values(), *variant_folders(recipe).values()}:
                _check_checkpoints(folder)


def _is_new(output: Path) -> bool:
    """Whether a run may start in a folder without asking."""
    if not output.is_dir():
        return not os.path.lexists(output)
    return all(path.name == LOCK_FILE for path in output.iterdir())


def _recipe_there(recipe: RunRecipe) -> RunRecipe:
    """Return the recipe of the run that lies in the output folder."""
    path = Path(recipe.output) / RECIPE_FILE
    try:
        return RunRecipe.from_dict(read_json(path))
    except ConfigError as error:
        how = "resumed" if recipe.resume else "overwritten"
        raise ConfigError(
            f"RunRecipe: output must be a run's folder to be {how}, got {recipe.output!r} without "
            f"a run's {RECIPE_FILE} ({error}); choose another folder"
        ) from error


def _check_same(found: RunRecipe, recipe: RunRecipe) -> None:
    there, wanted = found.to_dict(), recipe.to_dict()
    for key in wanted.keys() - {"output"}:
        if there[key] != wanted[key]:
            raise ConfigError(
                f"RunRecipe: {key} must be {there[key]!r} to resume the run in {recipe.output}, "
                f"got {wanted[key]!r}; keep it, or start another run in another folder"
            )


def _check_checkpoints(folder: Path) -> None:
    stranger = _find_stranger(folder)
    if stranger is not None:
        raise ConfigError(
            "RunRecipe: output must hold what leantune wrote alone to be overwritten, got "
            f"{str(stranger)!r}; move it away yourself, or choose another folder"
        )


def _find_stranger(folder: Path, below: str = "") -> Path | None:
    """Return the first path in a folder of checkpoints that no run writes there."""
    if folder.is_symlink() or (folder.exists() and not folder.is_dir()):
        return folder
    for path in sorted(folder.rglob("*")):
        name = below + path.relative_to(folder).as_posix()
        if path.is_symlink() or not _OF_A_TRAINER.fullmatch(name):
            return path
    return None


def make_folder(recipe: RunRecipe, lock: RunLock) -> None:
    """Start the run's folder with its recipe; what an overwritten run left is removed.

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
            folders = [*variant_folders(_recipe_there(recipe)).values()]
            folders += [*variant_folders(recipe).values(), *(output / name for name in _FOLDERS)]
            for name in (METRICS_FILE, "report.html"):
                (output / name).unlink(missing_ok=True)
            for folder in folders:
                shutil.rmtree(folder, ignore_errors=True)
        write_atomic(output / RECIPE_FILE, json.dumps(recipe.to_dict(), indent=2) + "\n")
    except WriteError:
        if is_new:
            shutil.rmtree(output, ignore_errors=True)
        raise


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


class SealCheckpoints(TrainerCallback):
    """Give each checkpoint its manifest when all its files are there, then drop those before.

    The last callback of a trainer: the others' files are in the manifest, too. The trainer must
    not drop checkpoints itself, since it does so before the new one is whole.
    """

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        _wait_for_all()
        if state.is_world_process_zero:
            _seal(Path(args.output_dir), state.global_step)
        # No process takes a checkpoint for one that was cut off.
        _wait_for_all()


def _wait_for_all() -> None:
    if is_distributed():
        torch.distributed.barrier()


def _seal(folder: Path, last: int) -> None:
    """Write the manifest of the checkpoint of step ``last``, and drop those that are not kept."""
    found = _checkpoints(folder)
    write_manifest(found[last], CHECKPOINT)
    # Those of later steps are of the way that this run has left.
    whole = [s for s, path in found.items() if s <= last and (path / MANIFEST_FILE).is_file()]
    for step in found.keys() - set(whole[:KEPT_CHECKPOINTS]):
        if _find_stranger(found[step], f"{found[step].name}/") is None:
            shutil.rmtree(found[step], ignore_errors=True)


def _checkpoints(folder: Path) -> dict[int, Path]:
    """Return step -> checkpoint, the last first."""
    named = [(_STEP.fullmatch(path.name), path) for path in folder.glob("checkpoint-*")]
    found = {int(match[1]): path for match, path in named if match and path.is_dir()}
    return dict(sorted(found.items(), reverse=True))


def find_starts(recipe: RunRecipe) -> dict[str, Path]:
    """Return the checkpoint that each variant of a resumed run goes on from.

    What is passed over, and why, is said on stderr.

    Returns:
        Variant -> checkpoint; a variant that has ended, or starts anew, is not there.

    Raises:
        ConfigError: ``resume_from`` names none, or a damaged one; or all are damaged.
    """
    wanted = recipe.resume_from
    if wanted is not None and (Path(recipe.output) / METRICS_FILE).is_file():
        raise ConfigError(
            f"RunRecipe: resume_from must be left out for a run that has ended, got {wanted!r}; "
            "start another run in another folder"
        )
    starts: dict[str, Path] = {}
    folders = variant_folders(recipe)
    for name, folder in folders.items():
        has_ended = (folder / RESULT_FILE).is_file() and name != list(folders)[-1]
        if not has_ended:
            start = _find_start(folder, wanted)
            wanted = None
            if start is not None:
                starts[name] = start
    return starts


def _find_start(folder: Path, wanted: str | None) -> Path | None:
    found = list(_checkpoints(folder).values())
    if wanted is not None:
        if all(path.name != wanted for path in found):
            names = ", ".join(path.name for path in found) or "none"
            raise ConfigError(
                f"RunRecipe: resume_from must be a checkpoint in {folder} ({names}), got "
                f"{wanted!r}; name one of them, or give resume=true for the last whole one"
            )
        found = [folder / wanted]
    passed_over: list[str] = []
    start, is_damaged = None, False
    for path in found:
        damage = find_damage(path, CHECKPOINT)
        if damage is None and not _has_ended(path):
            start = path
            break
        passed_over.append(f"{path.name}: {damage or 'its training has ended'}")
        # Without a manifest it was cut off while it was written, which a crash may do to the first.
        is_damaged = is_damaged or (damage is not None and (path / MANIFEST_FILE).exists())
    reasons = "; ".join(passed_over)
    if start is None and (wanted is not None or is_damaged):
        raise ConfigError(
            f"RunRecipe: checkpoint must be whole to resume from, got none in {folder} "
            f"({reasons}); put the files back, or start anew with overwrite=true"
        )
    if passed_over:
        where = "step 0" if start is None else start.name
        print(f"{folder}: going on from {where}, passed over {reasons}", file=sys.stderr)
    return start


def _has_ended(checkpoint: Path) -> bool:
    # From there the trainer would run one more step.
    state = read_json(checkpoint / "trainer_state.json")
    return state["global_step"] >= state["max_steps"]
