"""From a recipe file, ``KEY=VALUE`` pairs and ``--method NAME`` to one checked recipe."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

from leantune.core import registry
from leantune.core.config import Options, unknown_key
from leantune.errors import ConfigError
from leantune.training.parse import parse_yaml
from leantune.training.recipe import MeasureRecipe, RunRecipe, read_recipe_file

R = TypeVar("R", bound=MeasureRecipe)
_PAIR = re.compile(r"([A-Za-z_][\w-]*(?:\.[A-Za-z_][\w-]*)?)=(.*)", re.DOTALL)


def build_recipe(kind: type[R], arguments: Sequence[str], methods: Sequence[str]) -> R:
    """Merge file and command line (which wins) into a recipe.

    Args:
        kind: which options there are; a run's others may stand in the file.
        arguments: at most one file, and pairs ``KEY=VALUE``.
        methods: names to take in place of the recipe's; one that is named there as well keeps the
            options that it has there.

    Raises:
        ConfigError: an option is unknown, ambiguous, of a method that is not chosen, or bad.
    """
    pairs = {m[1].replace("-", "_"): m[2] for a in arguments if (m := _PAIR.fullmatch(a))}
    files = [argument for argument in arguments if not _PAIR.fullmatch(argument)]
    if len(files) > 1:
        raise ConfigError(
            f"command line: recipe must be one file, got {' and '.join(files)}; write options as "
            "KEY=VALUE, without spaces around the ="
        )
    values = read_recipe_file(Path(files[0])) if files else {}
    rules, run_rules = _rules(kind), _rules(RunRecipe)
    values = {key: v for key, v in values.items() if key in rules or key not in run_rules}
    values |= {key: _parse(text, rules[key]) for key, text in pairs.items() if key in rules}
    listed = values.get("methods", [])
    entries = [_entry(item) for item in listed] if isinstance(listed, list) else []
    if methods:
        names = dict.fromkeys(name.replace("-", "_") for name in methods)
        kept = {name: [e for e in entries if e["method"] == name] for name in names}
        entries = [entry for name in names for entry in kept[name] or [{"method": name}]]
    for key, text in pairs.items():
        start, _, name = key.partition(".")
        if start in rules and name:
            values[start] = {**(values.get(start) or {}), name: _parse(text, "")}
        elif key not in rules:
            _set(entries, key, text, list(rules))
    return kind.from_dict(values | ({"methods": entries} if entries else {}))


def parse_pairs(pairs: Sequence[str]) -> dict[str, Any]:
    """Return option -> value of arguments ``KEY=VALUE`` of a run.

    Raises:
        ConfigError: an option is unknown.
    """
    split = (pair.partition("=") for pair in pairs)
    named = {key.replace("-", "_"): text for key, _, text in split}
    RunRecipe.refuse_unknown(named)
    rules = _rules(RunRecipe)
    return {key: _parse(text, rules[key]) for key, text in named.items()}


def with_seeds(recipe: RunRecipe, seeds: str) -> list[RunRecipe]:
    """Return the recipe with each seed, in a folder of its own; only what is there is resumed.

    Raises:
        ConfigError: no list of different seeds.
    """
    numbers = seeds.split(",")
    if not all(map(str.isdecimal, numbers)) or len({*map(int, numbers)}) < len(numbers):
        raise ConfigError(
            f"command line: seeds must be different whole numbers, got {seeds!r}; for example 0,1,2"
        )
    folders = {int(number): Path(recipe.output) / f"seed-{int(number)}" for number in numbers}
    return [
        replace(recipe, seed=seed, output=str(folder), resume=recipe.resume and folder.exists())
        for seed, folder in folders.items()
    ]


def _set(entries: list[dict[str, Any]], key: str, text: str, run_options: list[str]) -> None:
    """Set one method's option, which ``method.option`` or the option alone names."""
    method, _, name = key.rpartition(".")
    all_rules = {m: _rules(spec.config) for m, spec in registry.list_methods().items()}
    if method:
        all_rules = {method: _rules(registry.get(method).config)}
    owners = [entry for entry in entries if name in all_rules.get(entry["method"], {})]
    if len(owners) == 1:
        owners[0][name] = _parse(text, all_rules[owners[0]["method"]][name])
        return
    if owners:
        places = " and ".join(f"{entry['method']}.{name}" for entry in owners)
        raise ConfigError(
            f"command line: {key} must name one option, got {places}; write one in full, or set it "
            "in the recipe"
        )
    others = [method for method, rules in all_rules.items() if name in rules]
    if not others:
        known = {option for rules in all_rules.values() for option in rules} | set(run_options)
        raise ConfigError(unknown_key("command line", "option", name, sorted(known)))
    raise ConfigError(
        f"command line: {key} must belong to a chosen method, got an option of "
        f"{', '.join(others)}; add --method {' or --method '.join(others)}"
    )


def _entry(item: Any) -> dict[str, Any]:
    """Return a method's entry as a mapping of its own; the recipe judges it."""
    return dict(item) if isinstance(item, Mapping) else {"method": str(item).replace("-", "_")}


def _rules(kind: type[Options]) -> dict[str, str]:
    return {row["name"]: row["rule"] for row in kind.describe()}


def _parse(text: str, rule: str) -> Any:
    """Return the value that a text spells in YAML; what must be text stays as it was typed."""
    if re.search(r"\bstr\b", rule):
        return None if text.lower() in ("null", "none") and "None" in rule else text
    try:
        value = parse_yaml(text)
    except ValueError:
        return text
    return text if isinstance(value, Mapping) and "mapping" not in rule else value
