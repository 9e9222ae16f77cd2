"""The recipe: a seed, the methods and every option, in the one format that files hold."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Self

from leantune.core.config import MethodConfig, Options, option
from leantune.core.registry import config_from_dict
from leantune.errors import ConfigError, shown

RECIPE_FILE = "recipe.json"
FORMAT = 2


@dataclass(frozen=True, kw_only=True)
class Recipe(Options):
    """A recipe names the methods of one model and the seed of their random choices.

    A session saves one, and a training run extends it by its own options; both are read by
    :meth:`from_dict` alone. An entry of ``methods`` is a config, a mapping with a ``method`` name,
    or a bare name for the defaults.

    Raises:
        ConfigError: an option is out of range, of the wrong type, or names no method.
    """

    own_rules: ClassVar[Mapping[str, str]] = {"methods": "list of methods"}
    not_saved: ClassVar[tuple[str, ...]] = ()

    seed: int = option(0, ge=-(2**63), lt=2**63, help="of every random choice")
    methods: tuple[MethodConfig, ...] = option((), help="the methods; none leaves the model plain")

    def __post_init__(self) -> None:
        object.__setattr__(self, "methods", method_configs(self.methods, type(self).__name__))
        super().__post_init__()

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON form with every option, so that a file says all that decides a run."""
        names = [spec.name for spec in dataclasses.fields(self) if spec.name not in self.not_saved]
        return {"format": FORMAT} | {name: _plain(getattr(self, name)) for name in names}

    @classmethod
    def from_dict(cls, data: Any) -> Self:
        """Read :meth:`to_dict`'s form; options that are left out take their defaults.

        Raises:
            ConfigError: no mapping, another format, an unknown or a missing option, a bad value.
        """
        who = cls.__name__
        if not isinstance(data, Mapping):
            raise ConfigError(f"{who}: recipe must be a mapping of options, got {shown(data)}")
        values = {key: value for key, value in data.items() if key != "format"}
        version = data.get("format", FORMAT)
        if type(version) is not int or version != FORMAT:
            raise ConfigError(
                f"{who}: format must be {FORMAT}, got {shown(version)}; for a larger one upgrade "
                "with pip install -U leantune, for another write the recipe anew with format: "
                f"{FORMAT}"
            )
        cls.refuse_unknown(values)
        for spec in dataclasses.fields(cls):
            if spec.default is dataclasses.MISSING and spec.name not in values:
                raise ConfigError(
                    f"{who}: {spec.name} must be given, got none; it is {spec.metadata['help']}"
                )
        return cls(**values)


def method_configs(entries: Any, who: str) -> tuple[MethodConfig, ...]:
    """Return the configs that a recipe's list of methods names.

    Args:
        entries: configs, mappings with a ``method`` name, or bare names.
        who: the first word of an error.

    Raises:
        ConfigError: no list, an entry of another kind, or an unknown method or option.
    """
    if not isinstance(entries, list | tuple):
        raise ConfigError(
            f"{who}: methods must be a list of methods, got {shown(entries)}; for example "
            "[{method: wta_crs, keep_ratio: 0.3}]"
        )
    return tuple(map(_config, entries))


def _config(entry: Any) -> MethodConfig:
    if isinstance(entry, MethodConfig):
        return entry
    is_name = isinstance(entry, str)
    return config_from_dict({"method": entry.replace("-", "_")} if is_name else entry)


def _plain(value: Any) -> Any:
    if isinstance(value, MethodConfig):
        return value.to_dict()
    return [_plain(item) for item in value] if isinstance(value, list | tuple) else value
