"""``leantune merge``: a base model and a saved session become one plain checkpoint."""

from __future__ import annotations

import json as json_module
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.markup import escape

from leantune.cli.output import (
    DebugFlag,
    JsonFlag,
    hide_loading_bars,
    out,
    print_json,
    reported_errors,
)
from leantune.errors import ConfigError

if TYPE_CHECKING:
    from leantune.train.data import TaskData

SESSION_FOLDER = "session"
MODEL_FOLDER = "model"
RUN_RECIPE = "recipe.json"
_SUFFIX_OF_KIND = {
    "ForSequenceClassification": "classification",
    "ForCausalLM": "causal_lm",
    "LMHeadModel": "causal_lm",
}


def merge(
    source: Annotated[
        Path,
        typer.Argument(
            metavar="RUN_OR_SESSION", help="a run folder, or a folder that session.save wrote"
        ),
    ],
    output: Annotated[Path, typer.Argument(metavar="OUTPUT", help="folder of the new checkpoint")],
    model: Annotated[
        str | None,
        typer.Option(
            "--model",
            metavar="NAME",
            help="the base model: a folder, a hub name, or demo; default: the run's own",
            show_default=False,
        ),
    ] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="replace OUTPUT where it exists")
    ] = False,
    json: JsonFlag = False,
    debug: DebugFlag = False,
) -> None:
    """Write a checkpoint that loads without leantune: the base model with what was trained."""
    with reported_errors(debug):
        if output.exists() and not overwrite:
            raise ConfigError(
                f"merge: output must be a new folder, got {str(output)!r}, which exists; choose "
                "another, or give --overwrite"
            )
        if output.exists() and not output.is_dir():
            raise ConfigError(f"merge: output must be a folder, got the file {str(output)!r}")
        session_folder, run_folder = find_session_folder(source)
        base = model or _base_model(run_folder, source)
        hide_loading_bars(base)
        methods = merge_checkpoint(base, session_folder, run_folder, output)
        if json:
            print_json({"output": str(output), "model": base, "methods": methods})
        else:
            names = ", ".join(methods)
            message = f"{output}: {base} with {names} merged; loads with from_pretrained"
            out().print(escape(message), soft_wrap=True)


def find_session_folder(source: Path) -> tuple[Path, Path | None]:
    """Return (session folder, the run folder it lies in or None).

    Raises:
        ConfigError: neither a run folder with a session nor a session folder.
    """
    from leantune.core.state import STATE_FILE

    if (source / STATE_FILE).is_file():
        parent = source.resolve().parent
        return source, parent if (parent / MODEL_FOLDER / "config.json").is_file() else None
    if (source / SESSION_FOLDER).is_dir():
        return source / SESSION_FOLDER, source
    if (source / MODEL_FOLDER).is_dir():
        raise ConfigError(
            f"merge: run must hold a session, got {str(source)!r}, which trained no method; its "
            f"plain checkpoint is {source / MODEL_FOLDER}"
        )
    raise ConfigError(
        f"merge: source must be a run folder or a folder that session.save wrote, got "
        f"{str(source)!r}, which holds neither {SESSION_FOLDER}/ nor {STATE_FILE}"
    )


def merge_checkpoint(
    base: str, session_folder: Path, run_folder: Path | None, output: Path
) -> list[str]:
    """Load base and session, fold the session in, and write model and tokenizer to ``output``.

    Args:
        base: name of the base model.
        session_folder: what ``session.save`` wrote.
        run_folder: its ``model/config.json`` says which head was trained; None takes the base's.
        output: replaced as a whole, once everything is written.

    Returns:
        Names of the methods that were merged.

    Raises:
        ConfigError: a file is missing or damaged, or the session is of another model.
    """
    from leantune.core.apply import load
    from leantune.core.state import atomic_folder
    from leantune.train.models import load_model

    folder = Path(base) if run_folder is None else run_folder / MODEL_FOLDER
    network, tokenizer = load_model(base, _head(folder / "config.json", base))
    session = load(network, session_folder)
    session.merge()
    with atomic_folder(output) as fresh:
        network.save_pretrained(fresh)
        tokenizer.save_pretrained(fresh)
    return [config.method for config in session.methods]


def _base_model(run_folder: Path | None, source: Path) -> str:
    path = None if run_folder is None else run_folder / RUN_RECIPE
    if path is not None and path.is_file():
        name = _read(path).get("model")
        if isinstance(name, str):
            return name
    raise ConfigError(
        f"merge: model must be known, got {str(source)!r}, where no {RUN_RECIPE} names it; give "
        "--model NAME, the base that the session was applied to"
    )


def _head(path: Path, base: str) -> TaskData:
    """Return an empty data set with the task that a checkpoint's head is made for."""
    from leantune.train.data import Table, TaskData
    from leantune.train.tasks import Task

    if not path.is_file():
        raise ConfigError(
            f"merge: model must be a local folder where the session lies outside a run, got "
            f"{base!r}, which has no {path}; give the folder of the model with the head that was "
            "trained"
        )
    config = _read(path)
    architecture = str((config.get("architectures") or ["none"])[0])
    suffix = next((s for s in _SUFFIX_OF_KIND if architecture.endswith(s)), None)
    if suffix is None:
        raise ConfigError(
            f"merge: model must be one of {', '.join(f'*{s}' for s in _SUFFIX_OF_KIND)}, got "
            f"{architecture} in {path}; use leantune.load(model, folder) and session.merge()"
        )
    kind: Any = _SUFFIX_OF_KIND[suffix]
    names: tuple[str, ...] | None = None
    if kind == "classification":
        # transformers leaves out the two default labels.
        labels = config.get("id2label") or {"0": "LABEL_0", "1": "LABEL_1"}
        names = tuple(labels[number] for number in sorted(labels, key=int))
        if config.get("problem_type") == "regression" or len(names) == 1:
            kind, names = "regression", None
    num_labels = {"regression": 1, "causal_lm": 0}.get(kind, len(names or ()))
    task = Task("merge", ("sentence1", None), names, kind, (), "loss")
    return TaskData(task, Table({}), Table({}), num_labels, names)


def _read(path: Path) -> Mapping[str, Any]:
    try:
        data = json_module.loads(path.read_text("utf-8"))
    except (json_module.JSONDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"merge: {path} must be valid JSON, got {error}") from error
    if not isinstance(data, Mapping):
        raise ConfigError(f"merge: {path} must be a mapping, got {type(data).__name__}")
    return data
