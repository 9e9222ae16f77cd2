"""One recipe format: every option round-trips, every slip names itself."""

import dataclasses
import json
import math
import os
from pathlib import Path
from typing import Any

import pytest

import leantune as lt
from leantune.core.recipe import Recipe
from leantune.training.recipe import MeasureRecipe, RunRecipe

BASE = {"model": "m", "task": "text", "data": "d", "output": "o"}
SAMPLED = lt.WTACRS(keep_ratio=0.3)


def test_every_option_is_written_and_read_again() -> None:
    recipe = RunRecipe(**BASE, methods=(SAMPLED, lt.LoRA()), compare=((), (SAMPLED,)), epochs=2)
    data = json.loads(json.dumps(recipe.to_dict()))
    names = {spec.name for spec in dataclasses.fields(RunRecipe)} - {
        "resume",
        "resume_from",
        "overwrite",
    }
    assert data.keys() == {"format", *names} and data["format"] == 2
    options = {spec.name for spec in dataclasses.fields(lt.WTACRS)}
    assert data["methods"][0].keys() == {"method", "version", *options}
    assert RunRecipe.from_dict(data) == recipe
    assert Recipe.from_dict({k: data[k] for k in ("format", "seed", "methods")}).methods == (
        SAMPLED,
        lt.LoRA(),
    )


def test_yaml_json_mapping_and_recipe_say_the_same(tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    path.write_text(
        "format: 2\nmodel: m\ntask: text\ndata: d\noutput: o\nlearning_rate: 5e-5\n"
        "methods: [wta-crs, {method: lora, rank: 4}]\ncompare: baseline\n"
    )
    recipe = RunRecipe.read(path, {"seed": 3})
    assert recipe.learning_rate == 5e-5 and recipe.seed == 3 and recipe.compare == ((),)
    assert recipe.methods == (lt.WTACRS(), lt.LoRA(rank=4))
    (tmp_path / "r.json").write_text(json.dumps(recipe.to_dict()))
    assert RunRecipe.read(str(tmp_path / "r.json"), {}) == recipe
    assert RunRecipe.read(recipe.to_dict(), {}) == recipe
    again = RunRecipe.read(dataclasses.replace(recipe, overwrite=True), {"seed": 4})
    assert again.overwrite and again == dataclasses.replace(recipe, seed=4, overwrite=True)


def test_variants_are_named_and_the_recipe_is_last() -> None:
    both = (lt.Checkpoint(), SAMPLED)
    recipe = RunRecipe(**BASE, methods=both, compare=(["checkpoint"], "baseline"))  # type: ignore[arg-type]
    variants = recipe.variants()
    assert list(variants.items()) == [
        ("baseline", ()),
        ("checkpoint", (lt.Checkpoint(),)),
        ("checkpoint+wta_crs", both),
    ]
    near = RunRecipe(**BASE, methods=[SAMPLED], compare=[lt.WTACRS(keep_ratio=0.1)])  # type: ignore[arg-type]
    assert list(near.variants()) == ["wta_crs#2", "wta_crs"]
    assert list(RunRecipe(**BASE, compare=[SAMPLED]).variants()) == ["wta_crs", "baseline"]  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"batch_size": 0},
            "RunRecipe: batch_size must be integer >= 1 and <= 1,000,000,000, got 0",
        ),
        (
            {"batch_size": "many"},
            "batch_size must be integer >= 1 and <= 1,000,000,000, got 'many'",
        ),
        ({"learning_rate": math.nan}, "learning_rate must be number > 0, got nan"),
        ({"learning_rate": "fast"}, "learning_rate must be number > 0, got 'fast'"),
        ({"methods": "wta_crs"}, "methods must be a list of methods, got 'wta_crs'"),
        ({"methods": [{"keep_ratio": 1}]}, "must have a 'method' name"),
        ({"methods": ["wtacrs"]}, "method must be one of .* got 'wtacrs'"),
        ({"methods": [{"method": "wta_crs", "keep": 1}]}, "WTACRS: option .* got 'keep'"),
        ({"compare": "baseline"}, "compare must name recipes other than methods, each once"),
        ({"data": None}, "data must be str, got None"),
        ({"resume": True, "overwrite": True}, "overwrite must be False where resume is True"),
        ({"batch_size": 2**63}, "batch_size must be integer >= 1 and <= 1,000,000,000"),
        ({"max_steps": 10**5000}, "max_steps must be .* got a int that cannot be shown"),
        ({"epochs": 10**400}, "epochs must be number > 0 and <= 1,000,000,000"),
        ({"methods": [{"method": "lora", "rank": 2**63}]}, "LoRA: rank must be integer"),
        *(({"model": m}, "model must be a path or a name") for m in ("", " ", "a\0b", "m" * 256)),
        ({"output": "\ud800"}, "output must be a path or a name"),
        ({"epoch": 3}, "option must be one of .* got 'epoch'; did you mean 'epochs'"),
        *(({"format": f}, f"format must be 2, got {f!r}") for f in (-5, 1, 3, True, "2", 2.0)),
    ],
)
def test_a_slip_names_itself(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(lt.ConfigError, match=message):
        RunRecipe.from_dict({**BASE, **changes})


def test_missing_options_and_bad_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(lt.ConfigError, match="RunRecipe: output must be given, got none"):
        RunRecipe.from_dict({key: value for key, value in BASE.items() if key != "output"})
    assert MeasureRecipe().data is None
    path = tmp_path / "r.yaml"
    for content, message in (("a: [", "must be valid YAML"), ("words", "must be a mapping")):
        path.write_text(content)
        with pytest.raises(lt.ConfigError, match=message):
            RunRecipe.read(path, {})
    os.mkfifo(tmp_path / "pipe")
    for bad in (tmp_path, tmp_path / "pipe", Path("/dev/zero"), tmp_path / "none.yaml"):
        with pytest.raises(lt.ConfigError, match="file must exist"):
            RunRecipe.read(bad, {})
