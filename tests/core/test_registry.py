"""The registry refuses duplicates and lists what there is."""

from dataclasses import dataclass
from typing import ClassVar

import pytest

import leantune  # noqa: F401  (registers the methods)
from leantune.core import registry
from leantune.core.config import MethodConfig
from leantune.core.conversion import SwapConversion
from leantune.core.registry import MethodSpec, register
from leantune.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class Extra(MethodConfig):
    method: ClassVar[str] = "extra"


def spec() -> MethodSpec:
    return MethodSpec(
        config=Extra,
        axis="evaluated",
        roles=("mlp",),
        summary="s",
        source="s",
        convert=lambda model, sites, config, runtime: SwapConversion([]),
    )


def test_second_registration_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "_METHODS", dict(registry._METHODS))
    register(spec())
    assert registry.list_methods()["extra"].config is Extra
    with pytest.raises(ConfigError, match="method must be new, got 'extra', which is taken"):
        register(spec())


def test_methods_are_sorted_and_a_copy() -> None:
    names = list(registry.list_methods())
    assert names == sorted(names) and {"checkpoint", "lora", "wta_crs"} <= set(names)
    registry.list_methods().clear()
    assert list(registry.list_methods()) == names


def test_unknown_method_lists_those_there_are() -> None:
    with pytest.raises(ConfigError, match=r"method must be one of .*lora.*, got 'nonsense'"):
        registry.get("nonsense")
