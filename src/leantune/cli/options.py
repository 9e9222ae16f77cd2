"""Flags generated from the fields of ``RunConfig`` and of every method's config."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import MISSING
from typing import Annotated, Any

import typer

from leantune.cli.recipe import METHODS, Setting

_RUN_PANEL = "Run options"
_DOT = "__"


def with_flags(command: Callable[..., None]) -> Callable[..., None]:
    """Return ``command`` with a flag for every run option and every method option.

    The command receives the flags that were given as ``settings``, a list of ``Setting``.
    """
    from leantune.core import registry
    from leantune.train.config import RunConfig

    own = [p for p in inspect.signature(command, eval_str=True).parameters.values()]
    own = [p for p in own if p.name != "settings"]
    flags = [_flag(row, row["name"], _RUN_PANEL) for row in RunConfig.describe()]
    for name, spec in registry.methods().items():
        panel = f"Options of {name}"
        flags += [_flag(row, name + _DOT + row["name"], panel) for row in spec.config.describe()]
    flags = [flag for flag in flags if flag.name != METHODS]
    names = {flag.name for flag in flags}

    def run(**values: Any) -> None:
        settings = [
            Setting(_key(name), value, flag_name(name), is_flag=True)
            for name, value in values.items()
            if name in names and value is not None
        ]
        rest = {name: value for name, value in values.items() if name not in names}
        command(**rest, settings=settings)

    run.__name__, run.__doc__ = command.__name__, command.__doc__
    run.__signature__ = inspect.Signature([*own, *flags])  # type: ignore[attr-defined]
    run.__annotations__ = {}
    return run


def flag_name(name: str) -> str:
    """Return the flag of a parameter: ``wta_crs__keep_ratio`` is ``--wta-crs.keep-ratio``."""
    return "--" + _key(name).replace("_", "-")


def _key(name: str) -> str:
    return name.replace(_DOT, ".")


def _flag(row: Mapping[str, Any], name: str, panel: str) -> inspect.Parameter:
    is_switch = row["rule"] == "bool"
    declared = flag_name(name)
    if is_switch and row["default"] is True:
        # The switch that changes something: off. KEY=true wins over a recipe's false.
        declared = f" /{declared.replace('--', '--no-', 1)}"
    default = "required" if row["default"] is MISSING else f"default: {_worded(row['default'])}"
    rule = "" if is_switch else f"{row['rule']}; "
    option = typer.Option(
        declared,
        help=f"{row['help']} ({rule}{default})",
        metavar=None if is_switch else "VALUE",
        rich_help_panel=panel,
        show_default=False,
    )
    kind = Annotated[bool | None if is_switch else str | None, option]
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=kind)


def _worded(default: Any) -> str:
    if isinstance(default, bool):
        return "on" if default else "off"
    return "none" if default is None else str(default)
