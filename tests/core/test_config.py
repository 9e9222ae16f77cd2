"""Configs: ranges, kinds, unknown keys and the round trip through JSON and YAML."""

import json
import math
import pickle
from dataclasses import FrozenInstanceError, dataclass
from typing import ClassVar, Literal

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

import leantune as lt
from leantune.core.config import MethodConfig, option
from leantune.core.recipe import Recipe
from leantune.core.registry import config_from_dict
from leantune.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class Sample(MethodConfig):
    method: ClassVar[str] = "sample_of_options"
    version: ClassVar[int] = 3

    ratio: float = option(0.5, gt=0, le=1, help="a share")
    count: int = option(2, ge=1, lt=10, help="a count")
    flag: bool = option(False, help="a switch")
    kind: Literal["a", "b"] = option("a", help="a choice")
    limit: int | Literal["none"] | None = option(None, ge=0, help="a limit")


@pytest.mark.parametrize(
    "ratio", [0, -0.1, 1.1, math.nan, math.inf, -math.inf, "0.3.1", True, [0.3]]
)
def test_bad_number_names_option_rule_and_value(ratio) -> None:
    with pytest.raises(ConfigError) as error:
        Sample(ratio=ratio)
    text = str(error.value)
    shown = float(ratio) if type(ratio) is int else ratio
    assert text == f"Sample: ratio must be number > 0 and <= 1, got {shown!r}"


@pytest.mark.parametrize("count", [0, 10, 2.0, "2", True, None])
def test_bad_integer(count) -> None:
    with pytest.raises(ConfigError, match=r"Sample: count must be integer >= 1 and < 10, got "):
        Sample(count=count)


@pytest.mark.parametrize("flag", [0, 1, "true", None])
def test_bad_switch(flag) -> None:
    with pytest.raises(ConfigError, match=r"Sample: flag must be bool, got "):
        Sample(flag=flag)


@pytest.mark.parametrize("kind", ["c", "", 1, None])
def test_bad_choice_lists_the_choices(kind) -> None:
    with pytest.raises(ConfigError, match=r"Sample: kind must be one of 'a', 'b', got "):
        Sample(kind=kind)


@pytest.mark.parametrize("limit", [-1, "some", 1.5, False])
def test_bad_union(limit) -> None:
    with pytest.raises(ConfigError, match=r"limit must be integer >= 0 or one of 'none' or None"):
        Sample(limit=limit)


def test_good_values_and_integers_for_numbers() -> None:
    config = Sample(ratio=1, count=9, flag=True, kind="b", limit="none")
    assert config.ratio == 1.0 and type(config.ratio) is float
    assert Sample(limit=0).limit == 0 and Sample().limit is None


@pytest.mark.parametrize("sites", [[], (), [""], [1], 3, "", {"a"}])
def test_bad_sites(sites) -> None:
    with pytest.raises(ConfigError, match="sites must be a non-empty list of role names"):
        Sample(sites=sites)


def test_sites_become_a_tuple() -> None:
    assert Sample(sites="query").sites == ("query",)
    assert Sample(sites=["a", "b"]).sites == ("a", "b")


def test_configs_are_frozen_and_keyword_only() -> None:
    with pytest.raises(FrozenInstanceError):
        Sample().ratio = 0.1  # type: ignore[misc]
    with pytest.raises(TypeError):
        Sample(("a",))  # type: ignore[misc]
    assert len({Sample(sites=["a"]), Sample(sites=("a",))}) == 1


@given(
    ratio=st.floats(0, 1, exclude_min=True),
    count=st.integers(1, 9),
    flag=st.booleans(),
    kind=st.sampled_from(["a", "b"]),
    limit=st.none() | st.integers(0, 2**63 - 1) | st.just("none"),
    sites=st.none() | st.lists(st.text("ab*.", min_size=1), min_size=1),
)
def test_round_trip(ratio, count, flag, kind, limit, sites) -> None:
    config = Sample(ratio=ratio, count=count, flag=flag, kind=kind, limit=limit, sites=sites)
    data = config.to_dict()
    assert Sample.from_dict(json.loads(json.dumps(data))) == config
    assert Sample.from_dict(yaml.safe_load(yaml.safe_dump(data))) == config
    assert pickle.loads(pickle.dumps(config)) == config


def test_every_option_is_written_equal_to_its_default_or_not() -> None:
    assert Sample(count=3).to_dict() == {
        "method": "sample_of_options",
        "version": 3,
        "sites": None,
        "ratio": 0.5,
        "count": 3,
        "flag": False,
        "kind": "a",
        "limit": None,
    }


def test_predicate_cannot_be_written() -> None:
    with pytest.raises(ConfigError, match="got a predicate; name the modules or use a glob"):
        Sample(sites=lambda site: True).to_dict()


def test_unknown_option_names_the_nearest() -> None:
    with pytest.raises(ConfigError, match=r"got 'ratoi'; did you mean 'ratio'\?"):
        Sample.from_dict({"ratoi": 0.1})
    with pytest.raises(ConfigError, match=r"option must be one of count, .*, got 7$"):
        Sample.from_dict({7: 0.1})  # type: ignore[dict-item]


@pytest.mark.parametrize("version", [2, 4, "3", None, 2.5])
def test_another_version_is_refused(version) -> None:
    with pytest.raises(ConfigError, match=r"version must be 3, got .*install that one"):
        Sample.from_dict({"version": version})
    assert Sample.from_dict({"version": 3, "count": 4}) == Sample(count=4)


def test_describe_has_one_row_with_help_for_each_option() -> None:
    rows = {row["name"]: row for row in Sample.describe()}
    assert list(rows) == ["sites", "ratio", "count", "flag", "kind", "limit"]
    assert rows["ratio"]["rule"] == "number > 0 and <= 1" and rows["ratio"]["default"] == 0.5
    assert all(row["help"] for row in rows.values())


def test_config_from_dict() -> None:
    assert config_from_dict({"method": "wta_crs", "keep_ratio": 0.1}) == lt.WTACRS(keep_ratio=0.1)
    with pytest.raises(ConfigError, match=r"got 'wta_csr'; did you mean 'wta_crs'\?"):
        config_from_dict({"method": "wta_csr"})
    for bad in ({}, {"keep_ratio": 1}, "wta_crs", None):
        with pytest.raises(ConfigError, match="must have a 'method' name"):
            config_from_dict(bad)  # type: ignore[arg-type]


def test_recipe_round_trip() -> None:
    methods = (lt.LoRA(rank=4), lt.WTACRS(keep_ratio=0.1, sites=["mlp.*"], norms="activation"))
    recipe = Recipe(methods=methods, seed=7)
    assert Recipe.from_dict(json.loads(json.dumps(recipe.to_dict()))) == recipe
    assert Recipe.from_dict(yaml.safe_load(yaml.safe_dump(recipe.to_dict()))) == recipe
    assert Recipe.from_dict({}) == Recipe()


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"format": 1}, "format must be 2, got 1; .*write the recipe anew"),
        ({"format": "2"}, "format must be 2, got '2'"),
        ({"sede": 1}, "option must be one of methods, seed, got 'sede'; did you mean 'seed'"),
        ({"sede": 1, 3: 4}, "option must be one of methods, seed, got 'sede'"),
        ({"seed": 1.5}, "seed must be integer .*, got 1.5"),
        ({"seed": True}, "seed must be integer .*, got True"),
        ({"methods": "wta_crs"}, "methods must be a list"),
        ({"methods": ["wta_csr"]}, "must be one of .*, got 'wta_csr'"),
        ({"methods": [3]}, "must have a 'method' name, got 3"),
        ({"methods": [{"method": "wta_crs", "keep_ratio": 0}]}, "keep_ratio must be"),
    ],
)
def test_bad_recipe(change, match) -> None:
    data = {**Recipe(methods=(lt.WTACRS(),)).to_dict(), **change}
    with pytest.raises(ConfigError, match=match):
        Recipe.from_dict(data)


@pytest.mark.parametrize("data", [None, [], "x", 3])
def test_no_recipe_at_all(data) -> None:
    with pytest.raises(ConfigError, match="recipe must be a mapping of options, got "):
        Recipe.from_dict(data)
