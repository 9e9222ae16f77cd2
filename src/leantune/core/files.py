"""A session's folder: its recipe, what trained, its state, and samples of its base."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from leantune.core.adapters import original_name
from leantune.core.disk import load_tensors, save_tensors, write_atomic
from leantune.core.distributed import is_sharded
from leantune.core.fingerprint import refuse_lost
from leantune.core.manifest import atomic_folder
from leantune.core.recipe import RECIPE_FILE
from leantune.errors import ConfigError, UnsupportedError

WEIGHTS_FILE = "weights.safetensors"
STATE_FILE = "session.safetensors"
BASE_FILE = "base.safetensors"
SESSION = "session"
"""The kind of folder that a session is saved in."""


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
        UnsupportedError: parameters are sharded, or were frozen after they had trained.
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
    tied = model.named_parameters(remove_duplicate=False)
    saved = {original_name(name) for name, parameter in tied if parameter.requires_grad}
    lacking = {name: value for name, value in base.items() if name not in saved}
    refuse_lost(model, lacking)
    with atomic_folder(folder, SESSION) as fresh:
        write_atomic(fresh / RECIPE_FILE, json.dumps(recipe, indent=2) + "\n")
        save_tensors(fresh / BASE_FILE, lacking)
        save_tensors(fresh / WEIGHTS_FILE, trained_weights(model))
        save_tensors(fresh / STATE_FILE, make_state())


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
