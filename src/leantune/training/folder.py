"""A run's folder: what lies in it, when it may be written to, and where to go on.

``recipe.json``, ``metrics.json``, ``model/`` (loads without leantune), ``adapter/`` (with LoRA: a
plain PEFT one), ``session/`` (the converted model's state), ``checkpoints/``, and
``checkpoints-NAME/`` of each rival.
"""

import json
import shutil
from pathlib import Path

from leantune.core.files import write_atomic
from leantune.core.recipe import RECIPE_FILE
from leantune.errors import ConfigError
from leantune.integrations.trainer import SESSION_FILE
from leantune.training.recipe import RunRecipe, read_recipe_file
from leantune.training.results import METRICS_FILE

_WRITTEN = (RECIPE_FILE, METRICS_FILE, "report.html", "plots", "model", "adapter", "session")


def check_folder(recipe: RunRecipe) -> None:
    """Check that the run may start in its folder, or go on there.

    Raises:
        ConfigError: the folder exists, is no run's, or holds the run of another recipe.
    """
    output = Path(recipe.output)
    if recipe.resume:
        found = RunRecipe.from_dict(read_recipe_file(output / RECIPE_FILE)).to_dict()
        wanted = recipe.to_dict()
        for key in wanted.keys() - {"output"}:
            if found[key] != wanted[key]:
                raise ConfigError(
                    f"RunRecipe: {key} must be {found[key]!r} to resume the run in {output}, got "
                    f"{wanted[key]!r}; keep it, or start another run in another folder"
                )
    elif output.exists() and not (output.is_dir() and not any(output.iterdir())):
        if not recipe.overwrite:
            raise ConfigError(
                f"RunRecipe: output must be a new folder, got {recipe.output!r}, which exists; "
                "choose another, or give resume=true to go on there, or overwrite=true to replace "
                "that run"
            )
        if not (output / RECIPE_FILE).is_file():
            raise ConfigError(
                f"RunRecipe: output must be a run's folder to be overwritten, got {recipe.output!r}"
                f" without {RECIPE_FILE}; choose another folder, or remove that one yourself"
            )


def make_folder(recipe: RunRecipe) -> None:
    """Start the run's folder with its recipe; what an overwritten run left is removed."""
    output = Path(recipe.output)
    for old in [*(output / name for name in _WRITTEN), *output.glob("checkpoints*")]:
        if old.is_dir() and not old.is_symlink():
            shutil.rmtree(old)
        else:
            old.unlink(missing_ok=True)
    output.mkdir(parents=True, exist_ok=True)
    write_atomic(output / RECIPE_FILE, json.dumps(recipe.to_dict(), indent=2) + "\n")


def last_checkpoint(folder: Path, has_session: bool) -> Path | None:
    """Return the last checkpoint that is whole, and short of the end; None to start anew."""
    found: dict[int, Path] = {}
    for path in folder.glob("checkpoint-*"):
        try:
            # The trainer writes this file last.
            state = json.loads((path / "trainer_state.json").read_text("utf-8"))
        except (OSError, json.JSONDecodeError):
            continue
        # Of a training that had ended the trainer would run one more step.
        is_short = state["global_step"] < state["max_steps"]
        if is_short and (not has_session or (path / SESSION_FILE).is_file()):
            found[state["global_step"]] = path
    return found[max(found)] if found else None
