"""Method configurations: frozen, validated, and round-tripping through plain dictionaries."""

import dataclasses
import difflib
import math
import types
import typing
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, Self, cast

from leantune.errors import ConfigError, shown

Axis = Literal["trained", "evaluated", "rows", "bits", "recompute"]
"""What a method changes: what gets a gradient, what forward computes, which rows of a linear's
input backward keeps, in how many bits what is kept is kept, and what is computed again instead."""

SiteFilter = tuple[str, ...] | Callable[[Any], bool] | None


def option(
    default: Any,
    *,
    help: str,
    gt: float | None = None,
    ge: float | None = None,
    lt: float | None = None,
    le: float | None = None,
) -> Any:
    """Declare one option: its default, its help and its range, in one place.

    Types and choices come from the field's annotation (``Literal`` lists choices), so the command
    line, the documentation and the error messages read everything from here. An option without a
    default has ``dataclasses.MISSING`` for one.
    """
    bounds = {"gt": gt, "ge": ge, "lt": lt, "le": le}
    return field(default=default, metadata={"help": help, "bounds": bounds})


@dataclass(frozen=True, kw_only=True)
class Options:
    """Base of every set of options: frozen, keyword-only, each field made by :func:`option`.

    Construction validates every field, except those that ``own_rules`` names with their rule in
    words: the subclass checks them itself.

    Raises:
        ConfigError: an option is out of range, of the wrong type, or not a listed choice.
    """

    own_rules: ClassVar[Mapping[str, str]] = {}

    def __post_init__(self) -> None:
        hints = typing.get_type_hints(type(self))
        for spec in dataclasses.fields(self):
            if spec.name not in self.own_rules:
                self._check(spec, hints[spec.name])

    def _check(self, spec: dataclasses.Field[Any], hint: Any) -> None:
        value: Any = getattr(self, spec.name)
        kinds, choices, nullable = _accepted(hint)
        who = f"{type(self).__name__}: {spec.name}"
        bounds = spec.metadata["bounds"]
        rule = _rule(kinds, choices, bounds, nullable)
        if value is None and nullable:
            return
        if isinstance(value, str) and value in choices:
            return
        if float in kinds and value is not None and (type(value) is int or _is_spelled(value)):
            # YAML reads 5e-5 as text; what is too large for a float is infinite.
            value = float(value) if _is_short(value) else math.inf
            object.__setattr__(self, spec.name, value)
        if type(value) not in kinds:
            raise ConfigError(f"{who} must be {rule}, got {shown(value)}")
        if isinstance(value, int | float) and not isinstance(value, bool):
            is_number = _is_short(value) if isinstance(value, int) else math.isfinite(value)
            inside = is_number and all(
                limit is None or _COMPARE[name](value, limit) for name, limit in bounds.items()
            )
            if not inside:
                raise ConfigError(f"{who} must be {rule}, got {shown(value)}")

    @classmethod
    def describe(cls) -> list[dict[str, Any]]:
        """List the options: name, rule, default and help, as the command line shows them."""
        hints = typing.get_type_hints(cls)
        rows: list[dict[str, Any]] = []
        for spec in dataclasses.fields(cls):
            rule = cls.own_rules.get(spec.name)
            if rule is None:
                kinds, choices, nullable = _accepted(hints[spec.name])
                rule = _rule(kinds, choices, spec.metadata["bounds"], nullable)
            rows.append(
                {
                    "name": spec.name,
                    "rule": rule,
                    "default": spec.default,
                    "help": spec.metadata["help"],
                }
            )
        return rows

    @classmethod
    def refuse_unknown(cls, keys: Iterable[str]) -> None:
        """Raise for the first key that is no option, with the nearest one.

        Raises:
            ConfigError: there is such a key.
        """
        known = [spec.name for spec in dataclasses.fields(cls)]
        for key in keys:
            if key not in known:
                raise ConfigError(unknown_key(cls.__name__, "option", key, known))


@dataclass(frozen=True, kw_only=True)
class MethodConfig(Options):
    """Base of every method's configuration; it names its registry entry in ``method``."""

    method: ClassVar[str] = ""
    version: ClassVar[int] = 1
    own_rules: ClassVar[Mapping[str, str]] = {"sites": "roles, patterns or a predicate"}

    sites: SiteFilter = option(  # noqa: RUF009, it returns dataclasses.field()
        None,
        help="where to act: role names, glob patterns or 're:' regular expressions on module "
        "names, or a predicate on Site; default: the method's own choice",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        given: Any = (self.sites,) if isinstance(self.sites, str) else self.sites
        is_list = False
        if isinstance(given, Sequence):
            names = tuple(cast(Sequence[Any], given))
            is_list = bool(names) and all(isinstance(name, str) and name for name in names)
            object.__setattr__(self, "sites", names)
        if not (is_list or self.sites is None or callable(self.sites)):
            raise ConfigError(
                f"{type(self).__name__}: sites must be a non-empty list of role names or patterns, "
                f"or a predicate, got {shown(self.sites)}; leave it out for the method's own choice"
            )

    def to_dict(self) -> dict[str, Any]:
        """Return ``{"method": ..., "version": ..., option: value}`` for JSON or YAML.

        Every option is written, so that another version's defaults cannot change what a file says.

        Raises:
            ConfigError: ``sites`` is a predicate, which no file can hold.
        """
        if callable(self.sites):
            raise ConfigError(
                f"{type(self).__name__}: sites must be patterns to be written to a file, got a "
                "predicate; name the modules or use a glob pattern instead"
            )
        out: dict[str, Any] = {"method": self.method, "version": self.version}
        for spec in dataclasses.fields(self):
            value = getattr(self, spec.name)
            is_list = isinstance(value, tuple)
            out[spec.name] = list(cast(tuple[Any, ...], value)) if is_list else value
        return out

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Self:
        """Build a config from :meth:`to_dict`'s form; an unknown key is an error.

        Raises:
            ConfigError: an unknown option, or a version newer than this library knows.
        """
        data = dict(data)
        data.pop("method", None)
        version = data.pop("version", cls.version)
        if type(version) is not int or version != cls.version:
            raise ConfigError(
                f"{cls.__name__}: version must be {cls.version}, got {shown(version)}; the recipe "
                "was written by another version of leantune: install that one, or write it anew"
            )
        cls.refuse_unknown(data)
        return cls(**data)


def unknown_key(who: str, what: str, got: str, known: Sequence[str]) -> str:
    """Word the error for a name that is not in ``known``, with the nearest match."""
    near = difflib.get_close_matches(str(got), known, n=1)
    hint = f"did you mean {near[0]!r}? " if near else ""
    names = ", ".join(sorted(known))
    return f"{who}: {what} must be one of {names}, got {shown(got)}; {hint}".rstrip("; ")


_COMPARE: dict[str, Callable[[float, float], bool]] = {
    "gt": lambda v, b: v > b,
    "ge": lambda v, b: v >= b,
    "lt": lambda v, b: v < b,
    "le": lambda v, b: v <= b,
}
_SIGN = {"gt": ">", "ge": ">=", "lt": "<", "le": "<="}


def _accepted(hint: Any) -> tuple[set[type], tuple[str, ...], bool]:
    """Split an annotation into accepted types, literal choices and whether None is allowed."""
    kinds: set[type] = set()
    choices: tuple[str, ...] = ()
    nullable = False
    union = typing.get_origin(hint) in (typing.Union, types.UnionType)
    for part in typing.get_args(hint) if union else (hint,):
        if part is type(None):
            nullable = True
        elif typing.get_origin(part) is Literal:
            choices += typing.get_args(part)
        else:
            kinds.add(part)
    return kinds, choices, nullable


def _is_short(value: Any) -> bool:
    """Return whether a value is no whole number of more than 64 bits."""
    return not isinstance(value, int) or -(2**63) <= value < 2**63


def _is_spelled(value: Any) -> bool:
    """Tell whether a text spells a number."""
    try:
        return isinstance(value, str) and float(value) == float(value)
    except ValueError:
        return False


def _rule(
    kinds: set[type], choices: tuple[str, ...], bounds: Mapping[str, Any], nullable: bool
) -> str:
    """Word the constraint on one option, as errors and help print it."""
    parts: list[str] = []
    if kinds:
        name = " or ".join(
            sorted({"float": "number", "int": "integer"}.get(k.__name__, k.__name__) for k in kinds)
        )
        limits = " and ".join(f"{_SIGN[b]} {v:,}" for b, v in bounds.items() if v is not None)
        parts.append(f"{name} {limits}".strip())
    if choices:
        parts.append("one of " + ", ".join(repr(c) for c in choices))
    if nullable:
        parts.append("None")
    return " or ".join(parts)
