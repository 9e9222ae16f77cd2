"""YAML and JSON as plain values: no key twice, and no more values than a person writes."""

import json
from collections.abc import Iterable
from typing import Any

import yaml

MOST_VALUES = 10_000


def parse_json(text: str) -> Any:
    """Return the value of a JSON text.

    Raises:
        ValueError: it is not valid, names a key twice, or nests too deep.
    """
    try:
        return json.loads(text, object_pairs_hook=_unique)
    except RecursionError as error:
        raise ValueError("brackets that nest too deep") from error


def parse_yaml(text: str) -> Any:
    """Return the value of a YAML text, of plain types alone.

    Raises:
        ValueError: it is not valid, names a key twice, nests too deep, or stands for too much.
    """
    try:
        value = yaml.load(text, _Loader)
    except RecursionError as error:
        raise ValueError("brackets that nest too deep") from error
    except yaml.YAMLError as error:
        # Its message is a drawing of several lines.
        raise ValueError(" ".join(str(error).split())) from error
    left, num_values = [value], 0
    while left:
        found = left.pop()
        # An alias stands for all that it names, itself perhaps.
        num_values += 1
        if num_values > MOST_VALUES:
            raise ValueError(f"more than {MOST_VALUES:,} values, aliases followed")
        if isinstance(found, list | dict):
            left += found if isinstance(found, list) else found.values()
    return value


class _Loader(yaml.SafeLoader):
    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        keys = (key for key, _ in node.value if isinstance(key, yaml.ScalarNode))
        _unique((key.value, None) for key in keys)
        return super().construct_mapping(node, deep)


def _unique(pairs: Iterable[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise ValueError(f"key {key!r} twice")
        found[key] = value
    return found
