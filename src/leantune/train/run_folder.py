"""A run's folder: what lies in it, when it may be written to, and where to go on.

``recipe.json`` (the RunConfig), ``metrics.json`` (the RunResult), ``model/`` (loads without
leantune), ``adapter/`` (with LoRA: a plain PEFT one), ``session/`` (the converted model's state),
``checkpoints/`` and, for comparison, ``checkpoints-exact/``.
"""

import json
import shutil
from pathlib import Path

from leantune.core.state import write_atomic
from leantune.errors import ConfigError
from leantune.train.config import RunConfig

RECIPE_FILE, METRICS_FILE, RESULT_FILE = "recipe.json", "metrics.json", "result.json"
_WRITTEN = (
    RECIPE_FILE,
    METRICS_FILE,
    "report.html",
    "plots",
    "model",
    "adapter",
    "session",
    "checkpoints",
    "checkpoints-exact",
)


def check_folder(config: RunConfig, output: Path) -> None:
    """Check that the run may start in ``output``, or go on there.

    Raises:
        ConfigError: the folder exists, is no run's, or holds the run of another recipe.
    """
    if config.resume:
        found = _read_recipe(output).to_dict()
        wanted = config.to_dict()
        for key in wanted.keys() - {"output"}:
            if found[key] != wanted[key]:
                raise ConfigError(
                    f"RunConfig: {key} must be {found[key]!r} to resume the run in {output}, got "
                    f"{wanted[key]!r}; keep it, or start another run in another folder"
                )
        return
    is_empty_folder = output.is_dir() and not any(output.iterdir())
    if not output.exists() or is_empty_folder:
        return
    if not config.overwrite:
        raise ConfigError(
            f"RunConfig: output must be a new folder, got {config.output!r}, which exists; choose "
            "another, or give resume to go on with that run, or overwrite to replace it"
        )
    if not (output / RECIPE_FILE).is_file():
        raise ConfigError(
            f"RunConfig: output must be a run's folder to be overwritten, got {config.output!r} "
            f"without {RECIPE_FILE}; choose another folder, or remove that one yourself"
        )


def _read_recipe(output: Path) -> RunConfig:
    path = output / RECIPE_FILE
    try:
        return RunConfig.from_dict(json.loads(path.read_text("utf-8")))
    except FileNotFoundError as error:
        raise ConfigError(
            f"RunConfig: output must hold {RECIPE_FILE} to be resumed, got none in {output}; "
            "leave out resume to start the run"
        ) from error
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"RunConfig: {path} must be valid JSON, got {error}") from error


def make_folder(config: RunConfig, output: Path) -> None:
    """Start the run's folder with its recipe; what an overwritten run left is removed."""
    if config.resume:
        return
    for name in _WRITTEN:
        old = output / name
        if old.is_dir() and not old.is_symlink():
            shutil.rmtree(old)
        else:
            old.unlink(missing_ok=True)
    output.mkdir(parents=True, exist_ok=True)
    write_atomic(output / RECIPE_FILE, json.dumps(config.to_dict(), indent=2) + "\n")


def last_checkpoint(folder: Path, has_session: bool) -> Path | None:
    """Return the last checkpoint that is whole, and short of the end; None to start anew."""
    from leantune.train.callback import SESSION_FILE

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
