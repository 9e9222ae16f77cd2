"""A run's checkpoints: which are whole, which are kept, and from which a run goes on."""

import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback

from leantune.core.disk import read_json
from leantune.core.distributed import is_distributed
from leantune.core.manifest import MANIFEST_FILE, find_damage, write_manifest
from leantune.errors import ConfigError
from leantune.training.progress import say
from leantune.training.recipe import RunRecipe
from leantune.training.results import VariantResult

RESULT_FILE = "result.json"
STATE_FILE = "trainer_state.json"
CHECKPOINT = "checkpoint"
KEPT_CHECKPOINTS = 2
"""The one before serves where the last is damaged."""

_STEP = re.compile(r"checkpoint-(\d+)")
# What a run and its trainer write below ``checkpoints``; also in one that was cut off half-way.
_OF_A_TRAINER = re.compile(
    rf"\.?{RESULT_FILE}.*|README\.md|runs(/.+)?|{_STEP.pattern}(/(\.?leantune_|model|adapter_|config|"
    r"generation_config|training_args|optimizer|scheduler|scaler|rng_state|trainer_state|tokenizer|"
    r"added_tokens|special_tokens_map|vocab|merges|spiece|sentencepiece|chat_template|README\.md)"
    r"[^/]*)?"
)


def variant_folders(recipe: RunRecipe) -> dict[str, Path]:
    """Return name -> folder of checkpoints of everything that the run trains, its own last."""
    output, names = Path(recipe.output), list(recipe.variants())
    rivals = {name: output / f"checkpoints-{name}" for name in names[:-1]}
    return rivals | {names[-1]: output / "checkpoints"}


def check_checkpoints(folder: Path) -> None:
    """Check that a folder of checkpoints holds what a run writes there, and nothing else.

    Raises:
        ConfigError: it does not; names the first such path.
    """
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
    kept = whole[:KEPT_CHECKPOINTS]
    # And the best ones up to each of them.
    kept += [read_json(found[step] / STATE_FILE).get("best_global_step") for step in kept]
    for step in found.keys() - set(kept):
        if _find_stranger(found[step], f"{found[step].name}/") is None:
            shutil.rmtree(found[step], ignore_errors=True)


def _checkpoints(folder: Path) -> dict[int, Path]:
    """Return step -> checkpoint, the last first."""
    named = [(_STEP.fullmatch(path.name), path) for path in folder.glob("checkpoint-*")]
    found = {int(match[1]): path for match, path in named if match and path.is_dir()}
    return dict(sorted(found.items(), reverse=True))


def read_result(folder: Path, past: int) -> VariantResult | None:
    """Return the result that lies in a variant's folder, if it is of more steps than ``past``."""
    path = folder / RESULT_FILE
    result = VariantResult.read(path) if path.is_file() else None
    return result if result is not None and result.num_steps > past else None


def find_starts(recipe: RunRecipe, past: Mapping[str, int]) -> dict[str, Path]:
    """Return the checkpoint that each variant of an unfinished run goes on from.

    What is passed over, and why, is said on stderr.

    Args:
        past: variant -> steps of a shorter run that has ended, where this one asks for more.

    Returns:
        Variant -> checkpoint; a variant that has ended, or starts anew, is not there.

    Raises:
        ConfigError: ``resume_from`` names none, or a damaged one; or all are damaged.
    """
    wanted = recipe.resume_from
    starts: dict[str, Path] = {}
    folders = variant_folders(recipe)
    *_, own = folders
    for name, folder in folders.items():
        if name != own and read_result(folder, past.get(name, 0)) is not None:
            continue
        start = _find_start(folder, wanted, past.get(name, 0))
        wanted = None
        if start is not None:
            starts[name] = start
    return starts


def _find_start(folder: Path, wanted: str | None, past: int) -> Path | None:
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
        if damage is None and not _has_ended(path, past):
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
        say(f"{folder}: going on from {where}, passed over {reasons}")
    return start


def _has_ended(checkpoint: Path, past: int) -> bool:
    # From there the trainer would run one more step, or until one more evaluation.
    state = read_json(checkpoint / STATE_FILE)
    if stopping := state["stateful_callbacks"].get("EarlyStoppingCallback"):
        count = stopping["attributes"]["early_stopping_patience_counter"]
        if count >= stopping["args"]["early_stopping_patience"]:
            return True
    return past < state["max_steps"] <= state["global_step"]
