"""A recipe: which methods with which options, and the seed. One format, read in one place."""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Self, cast

from leantune.core.config import MethodConfig, Options, option
from leantune.core.registry import config_from_dict
from leantune.errors import ConfigError

FORMAT = 2
RECIPE_FILE = "recipe.json"


@dataclass(frozen=True, kw_only=True)
class Recipe(Options):
    """A recipe holds everything that decides how a model is converted.

    A run's recipe adds the run's own options to the same mapping, and is read by the same code.

    Raises:
        ConfigError: an option is out of range or of the wrong type.
    """

    own_rules: ClassVar[Mapping[str, str]] = {"methods": "list of method configs"}

    methods: tuple[MethodConfig, ...] = option((), help="what to apply; none trains exactly")
    seed: int = option(0, ge=-(2**63), lt=2**63, help="fixes every random choice")

    def __post_init__(self) -> None:
        given: Any = self.methods
        methods = tuple(cast(Sequence[Any], given)) if isinstance(given, Sequence) else None
        if methods is None or not all(isinstance(m, MethodConfig) for m in methods):
            raise ConfigError(
                f"{type(self).__name__}: methods must be a list of method configs, got "
                f"{self.methods!r}; for example [leantune.WTACRS(keep_ratio=0.3)]"
            )
        object.__setattr__(self, "methods", methods)
        super().__post_init__()

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON form: every option, equal to its default or not."""
        out = {spec.name: getattr(self, spec.name) for spec in dataclasses.fields(self)}
        return {"format": FORMAT, **out, "methods": [m.to_dict() for m in self.methods]}

    @classmethod
    def from_dict(cls, data: Any) -> Self:
        """Read :meth:`to_dict`'s form; options that are left out have their defaults.

        Raises:
            ConfigError: no mapping, another format, an unknown or missing option, or a bad value.
        """
        who = cls.__name__
        if not isinstance(data, Mapping):
            raise ConfigError(
                f"{who}: recipe must be a mapping of options, got {type(data).__name__}; write one "
                "'option: value' on each line"
            )
        values = dict(cast(Mapping[str, Any], data))
        version = values.pop("format", FORMAT)
        if type(version) is not int or version != FORMAT:
            raise ConfigError(
                f"{who}: format must be {FORMAT}, got {version!r}; the recipe was written by "
                "another version of leantune: install that one, or write the recipe anew"
            )
        cls.refuse_unknown(values)
        for spec in dataclasses.fields(cls):
            if spec.default is dataclasses.MISSING and spec.name not in values:
                raise ConfigError(
                    f"{who}: {spec.name} must be given, got none; {spec.metadata['help']}"
                )
        entries: Any = values.pop("methods", ())
        if not isinstance(entries, Sequence) or isinstance(entries, str):
            raise ConfigError(
                f"{who}: methods must be a list of entries, got {entries!r}; for example "
                "methods: [{method: wta_crs, keep_ratio: 0.3}]"
            )
        return cls(
            **values,
            methods=tuple(config_from_dict(entry) for entry in cast(Sequence[Any], entries)),
        )
