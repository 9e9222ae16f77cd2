"""A run with a budget plans, tries its longest batch first, and plans again if that takes more."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from integration.tiny import cut_off, same, saved_weights

import leantune as lt
from leantune.training import budget, first_step
from leantune.training.recipe import RunRecipe
from leantune.training.results import RunResult

LORA = lt.LoRA(rank=2)


@pytest.fixture
def base(model_folder: Path, data_folder: Path, tmp_path: Path) -> dict[str, Any]:
    """Options of a run of four steps that has a budget."""
    return {
        "model": str(model_folder),
        "task": "text",
        "data": str(data_folder),
        "output": str(tmp_path / "run"),
        # What recomputes already is planned in micro-batches alone, which is quick.
        "methods": [lt.Checkpoint()],
        "max_steps": 4,
        "batch_size": 8,
        "learning_rate": 1e-2,
        "max_length": 32,
        "budget": "140KiB",
    }


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """Note what is measured, and on which batch."""
    calls: list[dict[str, Any]] = []
    real = first_step.measure_step

    def measure_step(trainer: Any, backward: Any, batch: Any, context: Any) -> dict[str, int]:
        found = real(trainer, backward, batch, context)
        shape = tuple(batch["input_ids"].shape)
        calls.append({**found, "shape": shape, "folder": Path(trainer.args.output_dir)})
        return found

    monkeypatch.setattr(first_step, "measure_step", measure_step)
    return calls


def test_what_is_planned_is_tried_on_the_longest_batch_and_trained(
    base: dict[str, Any], measured: list[dict[str, Any]], capsys: pytest.CaptureFixture[str]
) -> None:
    result = lt.train(base)
    (tried,) = measured
    assert tried["shape"] == (2, 10) and not tried["folder"].exists()
    plan = result.plan
    assert plan is not None and (plan["budget"], plan["replanned"]) == (140 * 1024, False)
    for name in ("weights", "gradients", "optimizer"):
        assert plan["predicted"][name] == plan["measured"][name] == tried[name]
    # The forecast's batch keeps a mask, which the longest rows need not have; and one scalar more
    # lives in a real update.
    assert plan["predicted"]["activations"] == pytest.approx(tried["activations"], abs=1024)
    assert plan["predicted"]["peak"] == pytest.approx(tried["peak"], abs=64)
    assert tried["peak"] <= plan["budget"]
    output = Path(base["output"])
    kept = RunRecipe.from_dict(json.loads((output / "recipe.json").read_text()))
    assert (kept.batch_size, kept.gradient_accumulation_steps, kept.budget) == (2, 4, "140KiB")
    assert RunResult.read(output) == result
    told = capsys.readouterr().err
    assert "budget 140KiB: planned Checkpoint() on 4 x 2 rows of at most 10 tokens" in told
    assert "budget 140KiB: predicted / measured: weights" in told


def test_a_resumed_run_goes_on_as_planned(base: dict[str, Any]) -> None:
    whole = lt.train(base, output=base["output"] + "-whole", save_steps=2)
    cut_off(base["output"] + "-whole", base["output"], 2)
    with pytest.raises(lt.ConfigError, match=r"must be .* to resume the run"):
        lt.train(base, methods=[LORA], resume=True, save_steps=2)
    with pytest.raises(lt.ConfigError, match="budget must be '140KiB' to resume"):
        lt.train(base, budget="1GiB", resume=True, save_steps=2)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("leantune.training.budget.plan", None)  # it is not planned again
        resumed = lt.train(base, resume=True, save_steps=2)
    assert same(saved_weights(base["output"]), saved_weights(base["output"] + "-whole"))
    assert resumed.plan == whole.plan
    lt.train(base, overwrite=True, budget=None, max_steps=1)
    assert not (Path(base["output"]) / "plan.json").exists()


@pytest.fixture(scope="module")
def planned() -> dict[Any, Any]:
    """The plans that ``fit`` has made: all are of one model, methods and batch."""
    return {}


@pytest.fixture
def fit(base: dict[str, Any], planned: dict[Any, Any], monkeypatch: pytest.MonkeyPatch) -> Any:
    """Fit a recipe whose steps take so many times what is predicted, one factor for each try."""
    real, found = budget.plan, []

    def plan(*args: Any, **options: Any) -> Any:
        left = options["budget"]
        if left not in planned:
            planned[left] = real(*args, **options)
        found.append(planned[left])
        return found[-1]

    def fit(text: str, *factors: int) -> tuple[RunRecipe, dict[str, Any]]:
        left = list(factors)

        def try_step(recipe: RunRecipe) -> dict[str, int]:
            assert recipe.methods == found[-1].methods
            return {**found[-1].num_bytes, "peak": found[-1].num_bytes["peak"] * left.pop(0)}

        return budget.fit_budget(RunRecipe.read(base, {"budget": text}), model, 32, try_step)

    monkeypatch.setattr(budget, "plan", plan)
    with torch.device("meta"):
        config = transformers.GPT2Config(vocab_size=64, n_embd=32, n_head=2, n_layer=1)
        model = transformers.GPT2LMHeadModel(config)
    return fit


def test_more_than_predicted_is_planned_once_more(
    fit: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe, once = fit("2MiB", 1)
    assert (recipe.batch_size, once["replanned"]) == (8, False)
    recipe, twice = fit("2MiB", 2, 2)
    assert recipe.batch_size < 8 and twice["replanned"]
    assert twice["predicted"]["peak"] <= 2**20 < twice["measured"]["peak"] <= 2**21
    told = capsys.readouterr().err
    assert "budget 2MiB: the step takes more; planning once more, for 1 MiB" in told


def test_a_second_plan_that_does_not_hold_says_what_would(fit: Any) -> None:
    with pytest.raises(lt.ConfigError, match=r"got 2MiB .*the smallest, Checkpoint\(\) on \d rows"):
        fit("2MiB", 2, 4)
    with pytest.raises(lt.ConfigError, match=r"got 204\.\d+ KiB.*is left of budget 2MiB"):
        fit("2MiB", 10)
    with pytest.raises(lt.ConfigError, match=r"at least 1MiB .*got 10kB, below its weights' .*KiB"):
        fit("10kB")


def test_lora_is_not_trained_where_all_weights_are_asked_for(fit: Any) -> None:
    with pytest.raises(lt.ConfigError, match=r"fits but LoRA\(\) \+ Checkpoint.*add lora"):
        fit("600KiB")


def test_a_rival_that_is_what_was_planned_is_trained_once(base: dict[str, Any]) -> None:
    options = {"methods": [], "compare": ["baseline"], "budget": "1GiB", "max_steps": 1}
    monkey = pytest.MonkeyPatch()
    monkey.setattr("leantune.planner.plan._ADDED", ((),))
    result = lt.train(base, **options)
    monkey.undo()
    assert [variant.name for variant in result.runs] == ["baseline"]


@pytest.mark.parametrize("text", ["22", "0GiB", "GiB", "", 22, 0, True])
def test_what_is_no_budget_is_named_before_anything_is_read(text: Any) -> None:
    with pytest.raises(lt.ConfigError, match="RunRecipe: budget must be"):
        RunRecipe(model="none", task="text", data="none", output="none", budget=text)
