"""The registry: the static facts that every method declares, so that shared code needs no names."""

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, cast

from torch import nn

from leantune.core.config import Axis, MethodConfig, unknown_key
from leantune.core.conversion import Conversion
from leantune.core.runtime import Runtime
from leantune.core.sites import Site
from leantune.errors import ConfigError, shown

Convert = Callable[[nn.Module, list[Site], Any, Runtime], Conversion]


@dataclass(frozen=True, kw_only=True)
class MethodSpec:
    """A method spec says what one method is; nothing in it changes while a model trains.

    Registering a method is enough to be tested, saved, listed, documented and offered by the
    command line.

    Args:
        config: the option class; its ``method`` attribute is the registry name.
        axis: at most one method per axis and site, nested sites included; the whole compatibility
            rule.
        roles: site roles it can act on.
        summary: one line for lists and help.
        source: paper and section.
        convert: (model, sites, config, runtime) -> the conversion; changes the model in place, or
            raises and leaves it as it was.
        default_sites: (site, config) -> whether the method takes this site unless told otherwise.
        trains_weight: whether it trains its sites' own weights, so that frozen ones are refused,
            and left out of its own choice.
        suits_quantised: whether a linear's weight may be quantised, since it is not read at all.
        check: (site, config) -> why the method cannot act there, or None.
        identity_options: options under which output and gradients equal the plain model's; None
            where no options do that.
        needs_parts: config -> whether the method asks which parts a block has.
        needs_gpu: whether it acts on models on an NVIDIA GPU alone, so that others are refused.
        test_options: options that exercise the method on a tiny model.
    """

    config: type[MethodConfig]
    axis: Axis
    roles: tuple[str, ...]
    summary: str
    source: str
    convert: Convert
    default_sites: Callable[[Site, Any], bool] = lambda site, config: True
    trains_weight: bool = False
    suits_quantised: bool = False
    check: Callable[[Site, Any], str | None] = lambda site, config: None
    identity_options: Mapping[str, Any] | None = None
    needs_parts: Callable[[Any], bool] = lambda config: False
    needs_gpu: bool = False
    test_options: Mapping[str, Any] = field(default_factory=dict[str, Any])

    @property
    def name(self) -> str:
        """The registry name: the paper's short name, lower case."""
        return self.config.method

    @property
    def acts_on_weight(self) -> bool:
        """Whether it acts on the gradient of its sites' own weights alone."""
        return self.trains_weight or self.axis == "rows"


_METHODS: dict[str, MethodSpec] = {}


def register(spec: MethodSpec) -> None:
    """Add one method.

    Raises:
        ConfigError: the name is empty or taken.
    """
    if not spec.name or spec.name in _METHODS:
        raise ConfigError(f"register: method must be new, got {spec.name!r}, which is taken")
    _METHODS[spec.name] = spec


def get(name: str) -> MethodSpec:
    """Return the spec registered under ``name``.

    Raises:
        ConfigError: no such method; the message lists those there are.
    """
    methods = list_methods()
    if name not in methods:
        raise ConfigError(unknown_key("leantune", "method", name, list(methods)))
    return methods[name]


def list_methods() -> dict[str, MethodSpec]:
    """Return every method that can be applied: name -> spec, in order of name."""
    # Whoever asks first, the library's own are there; by name, since core depends on no method.
    importlib.import_module("leantune.methods")
    return dict(sorted(_METHODS.items()))


def config_from_dict(data: Any) -> MethodConfig:
    """Build the config that ``data["method"]`` names.

    Raises:
        ConfigError: ``method`` is missing or unknown, or an option is.
    """
    if not isinstance(data, Mapping) or "method" not in data:
        raise ConfigError(
            f"recipe: each entry of methods must have a 'method' name, got {shown(data)}; "
            f"methods: {', '.join(list_methods())}"
        )
    entry = cast(Mapping[str, Any], data)
    return get(str(entry["method"])).config.from_dict(entry)
