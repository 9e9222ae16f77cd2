"""From a recipe file, ``KEY=VALUE`` pairs and flags to one checked ``RunConfig``."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from leantune.errors import ConfigError

if TYPE_CHECKING:
    from leantune.train.config import RunConfig

METHODS = "methods"
_PAIR = re.compile(r"([A-Za-z_][\w-]*(?:\.[A-Za-z_][\w-]*)?)=(.*)", re.DOTALL)


@dataclass(frozen=True)
class Setting:
    """One option given on the command line.

    Args:
        key: a run option, a method's option, or ``method.option``; always with underscores.
        value: text as typed, or a bool from a switch.
        source: how it was typed, for errors.
        is_flag: given as ``--flag``, so that ``key`` is a run option or dotted.
    """

    key: str
    value: str | bool
    source: str
    is_flag: bool = False


def split_arguments(arguments: Sequence[str]) -> tuple[Path | None, list[Setting]]:
    """Tell the recipe file from the ``KEY=VALUE`` pairs.

    Raises:
        ConfigError: more than one argument is no pair.
    """
    recipes, settings = [], []
    for argument in arguments:
        pair = _PAIR.fullmatch(argument)
        if pair is None:
            recipes.append(argument)
        else:
            settings.append(Setting(pair[1].replace("-", "_"), pair[2], argument))
    if len(recipes) > 1:
        raise ConfigError(
            f"command line: recipe must be one file, got {' and '.join(map(repr, recipes))}; "
            "write options as KEY=VALUE, without spaces around the ="
        )
    return (Path(recipes[0]) if recipes else None), settings


def build_config(
    recipe: Path | None,
    settings: Sequence[Setting],
    methods: Sequence[str] = (),
    *,
    complete: Callable[[Mapping[str, Any]], Mapping[str, Any]] = lambda given: {},
) -> RunConfig:
    """Merge file and command line (which wins) into a checked run configuration.

    Args:
        recipe: a YAML or JSON file of run options with ``methods``; None for none.
        settings: options from the command line.
        methods: names to train with, in place of the recipe's; a method named there as well keeps
            the options that it has there. Spelled with hyphens, as flags are, or underscores.
        complete: run options given -> values for those that may stay out here.

    Raises:
        ConfigError: a file that cannot be read, an unknown or ambiguous key, an option given
            twice, a missing one, or a value out of range.
    """
    from leantune.core.registry import config_from_dict
    from leantune.train.config import RunConfig

    options = {row["name"]: row for row in RunConfig.describe()}
    values = {} if recipe is None else read_recipe(recipe, list(options))
    entries = [_entry(item) for item in _list_of_methods(values.pop(METHODS, []))]
    settings = list(settings)
    given = [s for s in settings if s.key == METHODS]
    if given:
        _refuse_twice(METHODS, [s.source for s in given] + ["--method"] * bool(methods))
        entries = [_entry(item) for item in _list_of_methods(_load_yaml(str(given[0].value)))]
        settings.remove(given[0])
    if methods:
        entries = _choose(entries, [name.replace("-", "_") for name in methods])
    seen: dict[tuple[str | None, str], str] = {}
    for setting in settings:
        method, name = _resolve(setting, list(options), [e["method"] for e in entries])
        if (method, name) in seen:
            _refuse_twice(name, [seen[method, name], setting.source])
        seen[method, name] = setting.source
        if method is None:
            values[name] = _parse(setting.value, options[name]["rule"])
        else:
            entry = next(e for e in entries if e["method"] == method)
            entry[name] = _parse(setting.value, _method_options(method)[name]["rule"])
    values |= complete(values)
    missing = [n for n, row in options.items() if row["default"] is MISSING and n not in values]
    if missing:
        raise ConfigError(
            f"recipe: {missing[0]} must be given, got none ({options[missing[0]]['help']}); write "
            f"{missing[0]}=VALUE, or put it into a recipe file"
        )
    return RunConfig(**values, methods=tuple(config_from_dict(entry) for entry in entries))


def read_recipe(path: Path, known: Sequence[str]) -> dict[str, Any]:
    """Read a recipe file, YAML or the JSON that a run leaves in its folder.

    Args:
        path: the file.
        known: names of the run options.

    Raises:
        ConfigError: the file is missing, not valid, from a newer version, or has an unknown key.
    """
    from leantune.core.config import unknown_key
    from leantune.core.state import RECIPE_FILE, RECIPE_FORMAT

    try:
        data = _load_yaml(path.read_text("utf-8"))
    except FileNotFoundError as error:
        raise ConfigError(
            f"recipe: file must exist, got {str(path)!r}, which does not; give a YAML file, or "
            "options as KEY=VALUE"
        ) from error
    except IsADirectoryError as error:
        raise ConfigError(
            f"recipe: file must be a YAML file, got the folder {str(path)!r}; a run's recipe is "
            f"{path / RECIPE_FILE}"
        ) from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"recipe: {path} must be valid YAML in UTF-8, got {error}") from error
    if data is None:
        data = {}
    if not isinstance(data, Mapping):
        raise ConfigError(
            f"recipe: {path} must be a mapping of options, got {type(data).__name__}; write one "
            "'option: value' on each line"
        )
    version = data.get("format", RECIPE_FORMAT)
    if type(version) is not int or version > RECIPE_FORMAT:
        raise ConfigError(
            f"recipe: {path}: format must be at most {RECIPE_FORMAT}, got {version!r}; it was "
            "written by a newer leantune: upgrade with pip install -U leantune"
        )
    unknown = [key for key in data if key != "format" and key not in known]
    if unknown:
        raise ConfigError(unknown_key(f"recipe: {path}", "option", str(unknown[0]), list(known)))
    return {key: value for key, value in data.items() if key != "format"}


def _resolve(setting: Setting, run_options: list[str], chosen: list[str]) -> tuple[str | None, str]:
    """Return (method or None for the run, option) that a key names."""
    from leantune.core import registry
    from leantune.core.config import unknown_key

    method, dot, name = setting.key.rpartition(".")
    if dot:
        config = registry.get(method).config
        options = _method_options(method)
        if name not in options:
            raise ConfigError(unknown_key(config.__name__, "option", name, list(options)))
        if method not in chosen:
            raise _not_chosen(setting, [method])
        if chosen.count(method) > 1:
            raise ConfigError(
                f"command line: {setting.source} must name one method, got a recipe with "
                f"{chosen.count(method)} entries of {method}; set it in the recipe"
            )
        return method, name
    owners = [m for m in dict.fromkeys(chosen) if name in _method_options(m)]
    if name in run_options and (setting.is_flag or not owners):
        return None, name
    if name in run_options or len(owners) > 1:
        places = [f"--{name.replace('_', '-')} (the run)"] * (name in run_options)
        places += [f"{owner}.{name}=..." for owner in owners]
        raise ConfigError(
            f"command line: {name} must name one option, got {' and '.join(places)}; write one of "
            "these in full"
        )
    if owners:
        return _resolve(Setting(f"{owners[0]}.{name}", "", setting.source), run_options, chosen)
    others = [m for m in registry.methods() if name in _method_options(m)]
    if others and name != "sites":
        raise _not_chosen(setting, others)
    known = {*run_options, *(option for m in chosen for option in _method_options(m))}
    raise ConfigError(unknown_key("command line", "option", name, sorted(known)))


def _not_chosen(setting: Setting, owners: list[str]) -> ConfigError:
    none = "which is not one" if len(owners) == 1 else "none of which is one"
    return ConfigError(
        f"command line: {setting.source} must belong to a chosen method, got an option of "
        f"{', '.join(owners)}, {none}; add --method {' or --method '.join(owners)}"
    )


def _refuse_twice(name: str, sources: list[str]) -> None:
    if len(sources) > 1:
        raise ConfigError(
            f"command line: {name} must be given once, got {' and '.join(sources)}; leave one out"
        )


def _method_options(method: str) -> dict[str, dict[str, Any]]:
    from leantune.core import registry

    return {row["name"]: row for row in registry.get(method).config.describe()}


def _list_of_methods(value: Any) -> list[Any]:
    if not isinstance(value, list | tuple):
        raise ConfigError(
            f"recipe: {METHODS} must be a list of method entries, got {value!r}; for example "
            "methods: [{method: wta_crs, keep_ratio: 0.3}]"
        )
    return list(value)


def _entry(item: Any) -> dict[str, Any]:
    """Return one method entry with its registry name; a bare name means the defaults."""
    from leantune.core import registry

    entry = {"method": item} if isinstance(item, str) else item
    if not isinstance(entry, Mapping) or "method" not in entry:
        raise ConfigError(
            f"recipe: each entry of {METHODS} must have a 'method' name, got {item!r}; "
            f"methods: {', '.join(registry.methods())}"
        )
    return {**entry, "method": registry.get(_registry_name(str(entry["method"]))).name}


def _choose(entries: list[dict[str, Any]], names: Sequence[str]) -> list[dict[str, Any]]:
    """Return the entries of the named methods: the recipe's own, else with default options."""
    chosen = []
    for name in dict.fromkeys(_registry_name(name) for name in names):
        chosen += [e for e in entries if e["method"] == name] or [_entry(name)]
    return chosen


def _registry_name(typed: str) -> str:
    return typed.replace("-", "_")


def _parse(value: str | bool, rule: str) -> Any:
    """Return the value that a text spells, with YAML's words for numbers, booleans and lists."""
    if isinstance(value, bool):
        return value
    words = re.findall(r"\w+", rule)
    if "str" in words:
        return None if value.lower() in ("null", "none") and "None" in words else value
    try:
        parsed = _load_yaml(value)
    except yaml.YAMLError:
        return value
    if parsed is None and value.strip().lower() not in ("null", "~"):
        return value
    return value if isinstance(parsed, Mapping) else parsed


class _Loader(yaml.SafeLoader):
    """YAML with the scalars of its version 1.2: ``5e-5`` is a number, ``no`` and ``on`` are words.

    A key that occurs twice is an error.
    """

    yaml_implicit_resolvers: dict = {}  # noqa: RUF012 (the base class's name)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]  # type: ignore
        for position, key in enumerate(keys):
            if key in keys[:position]:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {key!r} twice", node.value[position][0].start_mark
                )
        return super().construct_mapping(node, deep)


for _tag, _pattern, _first in (
    ("bool", r"true|True|TRUE|false|False|FALSE", "tTfF"),
    ("null", r"~|null|Null|NULL|", "~nN"),
    ("int", r"[-+]?(?:0|[1-9][0-9]*)", "-+0123456789"),
    (
        "float",
        r"[-+]?(?:(?:\.[0-9]+|[0-9]+\.[0-9]*)(?:[eE][-+]?[0-9]+)?|[0-9]+[eE][-+]?[0-9]+)"
        r"|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)",
        "-+.0123456789",
    ),
):
    _Loader.add_implicit_resolver(
        f"tag:yaml.org,2002:{_tag}",
        re.compile(rf"^(?:{_pattern})$"),
        [*_first, ""] if _tag == "null" else list(_first),
    )


def _load_yaml(text: str) -> Any:
    return yaml.load(text, _Loader)
