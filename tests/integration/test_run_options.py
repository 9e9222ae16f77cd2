"""What a recipe hands to transformers and asks of the weights, from its options to the folder."""

import json
from pathlib import Path
from typing import Any

import pytest
from integration.tiny import Interrupt, Steps, cut_off, same, saved_weights
from safetensors.torch import load_file
from typer.testing import CliRunner

import leantune as lt
from leantune.cli.app import app
from leantune.cli.recipe import build_recipe
from leantune.core.files import STATE_FILE
from leantune.integrations.trainer import SESSION_FILE
from leantune.training.recipe import RunRecipe
from leantune.training.trainers import check_trainer, training_arguments

OPTIONS: dict[str, Any] = {"model": "m", "task": "text", "data": "d", "output": "o"}


@pytest.mark.parametrize("task", ["text", "chat"])
@pytest.mark.parametrize(
    ("trainer", "message"),
    [
        ({"optm": "sgd"}, r"names of \w+, got 'optm'; the nearest is optim"),
        ({"output_dir": "x"}, "leave output_dir to the run, got 'x'; set the recipe's output"),
        ({"num_train_epochs": 1}, "set the recipe's epochs"),
        ({"learning_rate": 1}, "set the recipe's learning_rate"),
        ({"label_names": []}, r"leave label_names to the run, got \[\]; leave it out"),
        ({"optim": "sgdd"}, "what transformers accepts, .*sgdd is not a valid Opt"),
        ({"optim": 3}, r"\.optim must be .* got 3"),
        ({"dataloader_num_workers": "two"}, "dataloader_num_workers must be int, got 'two'"),
        ({"dataloader_num_workers": -1}, "what transformers accepts, .*num_workers"),
        ({"neftune_noise_alpha": "much"}, r"must be float \| None, got 'much'"),
        ({"lr_scheduler_kwargs": {"a": 1}}, "unexpected keyword argument 'a'"),
        ({"report_to": "nobody"}, "nobody is not supported"),
        ({"adam_beta1": 7}, "Invalid beta"),
    ],
    ids=str,
)
def test_a_slip_in_what_the_trainer_is_given_names_itself(
    task: str, trainer: dict[str, Any], message: str
) -> None:
    with pytest.raises(lt.ConfigError, match=f"RunRecipe: trainer.*{message}"):
        check_trainer(RunRecipe(**{**OPTIONS, "task": task}, trainer=trainer))


def test_what_the_trainer_is_given_arrives(tmp_path: Path) -> None:
    given = {"optim": "adafactor", "adam_epsilon": "1e-9", "neftune_noise_alpha": 5}
    recipe = RunRecipe(**OPTIONS, trainer=given)
    assert RunRecipe.from_dict(recipe.to_dict()) == recipe
    check_trainer(recipe)
    arguments = training_arguments(recipe, "", tmp_path)
    assert (arguments.optim, arguments.adam_epsilon) == ("adafactor", 1e-9)
    assert arguments.neftune_noise_alpha == 5 and arguments.report_to == []
    assert arguments.lr_scheduler_type == "linear"
    other = RunRecipe(**OPTIONS, trainer={"lr_scheduler_type": "polynomial"})
    assert training_arguments(other, "", tmp_path).lr_scheduler_type == "polynomial"
    with pytest.raises(lt.ConfigError, match="set the recipe's schedule"):
        check_trainer(RunRecipe(**OPTIONS, schedule="cosine", trainer=other.trainer))
    wrong: Any
    for wrong in ("adafactor", ["optim"], {1: 2}, {"optim": object()}):
        with pytest.raises(lt.ConfigError, match="trainer must be a mapping of names to plain"):
            RunRecipe(**OPTIONS, trainer=wrong)


def test_the_command_line_sets_one_or_all(tmp_path: Path) -> None:
    file = tmp_path / "r.yaml"
    file.write_text("model: m\ntask: text\ndata: d\noutput: o\ntrainer: {optim: sgd}\n")
    more = build_recipe(RunRecipe, [str(file), "trainer.adam_epsilon=1e-9"], [])
    assert more.trainer == {"optim": "sgd", "adam_epsilon": "1e-9"}
    assert build_recipe(RunRecipe, [str(file), "trainer={optim: lomo}"], []).trainer == {
        "optim": "lomo"
    }


def test_another_optimiser_is_measured_trained_and_resumed_to_the_bit(
    base: dict[str, Any], tmp_path: Path
) -> None:
    base |= {"trainer": {"optim": "adafactor", "neftune_noise_alpha": 5}, "save_steps": 7}
    whole = lt.train(base)
    cut_off(base["output"], tmp_path / "again", 7)
    lt.train(base, output=tmp_path / "again", resume=True)
    assert same(saved_weights(base["output"]), saved_weights(tmp_path / "again"))
    found = whole.runs[0].ledger
    assert 0 < found["optimizer"] < found["gradients"]  # AdamW's state is twice as large.


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*:FutureWarning")
@pytest.mark.parametrize("methods", [[], [lt.LoRA(rank=2), lt.WTACRS(min_rows=2)]])
def test_early_stopping_keeps_the_best_weights_and_survives_a_resumption(
    base: dict[str, Any], methods: list[Any], tmp_path: Path
) -> None:
    base |= {"methods": methods, "early_stopping_patience": 3, "eval_steps": 2, "max_steps": 40}
    base |= {"learning_rate": 3e-2, "warmup_ratio": 0.0, "schedule": "constant"}
    whole = lt.train(base, output=tmp_path / "whole").runs[0]
    assert whole.best_step is not None
    assert whole.num_steps == whole.best_step + 6 < 40
    assert whole.metrics == next(m for at, m in whole.evaluations if at == whole.best_step)
    assert whole.metrics["accuracy"] == max(m["accuracy"] for _, m in whole.evaluations)
    kept = {path.name for path in (tmp_path / "whole" / "checkpoints").glob("checkpoint-*")}
    steps = (whole.best_step, whole.num_steps - 2, whole.num_steps)
    assert kept == {f"checkpoint-{step}" for step in steps}
    best = tmp_path / "whole" / "checkpoints" / f"checkpoint-{whole.best_step}"
    if methods:
        state = load_file(tmp_path / "whole" / "session" / STATE_FILE)
        assert same(state, load_file(best / SESSION_FILE))
    else:
        assert same(saved_weights(tmp_path / "whole"), load_file(best / "model.safetensors"))

    moved = tmp_path / "moved"
    cut_off(tmp_path / "whole", moved, whole.num_steps - 2)
    # What is resumed finds its best weights where it lies now.
    ended = (tmp_path / "whole").rename(tmp_path / "elsewhere")
    again = lt.train(base, output=moved, resume=True).runs[0]
    assert (again.best_step, again.num_steps) == (whole.best_step, whole.num_steps)
    assert again.evaluations == whole.evaluations and again.metrics == whole.metrics
    assert same(saved_weights(moved), saved_weights(ended))
    # A crash after the last step: what is left of the way is gone again.
    (moved / "metrics.json").unlink()
    again = lt.train(base, output=moved, resume=True).runs[0]
    assert (again.best_step, again.num_steps) == (whole.best_step, whole.num_steps)
    assert same(saved_weights(moved), saved_weights(ended))


def test_each_evaluation_has_its_checkpoint_where_the_best_is_kept() -> None:
    options = {**OPTIONS, "early_stopping_patience": 1, "eval_steps": 4}
    with pytest.raises(lt.ConfigError, match="save_steps must be as eval_steps where early"):
        RunRecipe(**options, save_steps=8)
    for task, metric, greater in (("text", "accuracy", True), ("chat", "loss", False)):
        arguments = training_arguments(RunRecipe(**{**options, "task": task}), "", Path("o"))
        assert (arguments.metric_for_best_model, arguments.greater_is_better) == (metric, greater)
        assert arguments.save_steps == arguments.eval_steps == 4


@pytest.mark.parametrize(
    ("length", "less", "short", "long"), [("epochs", 0.5, 1, 2), ("max_steps", 1, 5, 8)]
)
def test_an_ended_run_goes_on_for_longer(
    base: dict[str, Any], tmp_path: Path, length: str, less: float, short: int, long: int
) -> None:
    """Where the schedule does not depend on the length the weights are those of one long run."""
    longer: Any = {length: long}
    base |= {"schedule": "constant", "warmup_ratio": 0.0, "compare": ["baseline"], length: short}
    lt.train(base, output=tmp_path / "long", **longer)
    output = Path(base["output"])
    before = lt.train(base)
    weights = saved_weights(output)
    with pytest.raises(lt.ConfigError, match=rf"{length} must be {short}.* to resume the run"):
        lt.train(base, resume=True, **{length: less})
    # Cut off when the first variant is through; the old result is there until the new one is.
    first = Interrupt(before.runs[-1].num_steps + 2)
    with pytest.raises(KeyboardInterrupt):
        lt.train(base, resume=True, callbacks=[first], **longer)
    assert lt.train(base, resume=True) == before and same(saved_weights(output), weights)
    seen = Steps()
    after = lt.train(base, resume=True, callbacks=[seen], **longer)
    last = after.runs[-1].num_steps
    assert seen.steps == [("wta_crs", n) for n in range(before.runs[-1].num_steps + 3, last + 1)]
    assert same(saved_weights(output), saved_weights(tmp_path / "long"))
    assert [run.num_steps for run in after.runs] == [last, last]
    assert RunRecipe.read(output / "recipe.json", {}) == RunRecipe(**{**base, **longer})
    again = Steps()
    assert lt.train(output / "recipe.json", resume=True, callbacks=[again]) == after
    assert not again.steps


def test_a_dry_run_checks_and_measures_and_writes_nothing(
    base: dict[str, Any], tmp_path: Path
) -> None:
    command = ["train", str(tmp_path / "r.yaml"), "--dry-run"]
    file = tmp_path / "r.yaml"
    file.write_text(json.dumps(RunRecipe(**base, compare=["baseline"]).to_dict()))
    before = sorted(tmp_path.rglob("*"))
    shown = CliRunner().invoke(app, command).stdout
    for words in ("held in all", "step time", "wta_crs", "baseline", "nothing was trained"):
        assert words in shown
    found = json.loads(CliRunner().invoke(app, [*command, "--json"]).stdout)
    for run in found["runs"]:
        assert run["metrics"] == {} and run["ledger"]["held in all"] > 0
        assert run["train_seconds"] == pytest.approx(10 * run["step_ms"] / 1000)
    assert "report" not in found and sorted(tmp_path.rglob("*")) == before
    # What is wrong shows; a run that is there is not touched.
    options: Any
    for options in ({"max_length": 33}, {"trainer": {"optm": "x"}}, {"freeze": ["none"]}):
        with pytest.raises(lt.LeantuneError):
            lt.train(base, dry_run=True, **options)
    lt.train(base, epochs=1)
    times = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    lt.train(base, epochs=1, overwrite=True, dry_run=True)
    assert times == {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
