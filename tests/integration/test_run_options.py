"""What a recipe hands to transformers and asks of the weights, from its options to the folder."""

from pathlib import Path
from typing import Any

import pytest
from integration.tiny import Interrupt, same, saved_weights

import leantune as lt
from leantune.cli.recipe import build_recipe
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
        check_trainer(RunRecipe(**OPTIONS | {"task": task}, trainer=trainer))


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
    for wrong in ("adafactor", ["optim"], {1: 2}, {"optim": object()}):
        with pytest.raises(lt.ConfigError, match="trainer must be a mapping of names to plain"):
            RunRecipe(**OPTIONS, trainer=wrong)  # type: ignore[arg-type]


def test_the_command_line_sets_one_or_all(tmp_path: Path) -> None:
    file = tmp_path / "r.yaml"
    file.write_text("model: m\ntask: text\ndata: d\noutput: o\ntrainer: {optim: sgd}\n")
    more = build_recipe(RunRecipe, [str(file), "trainer.adam_epsilon=1e-9"], [])
    assert more.trainer == {"optim": "sgd", "adam_epsilon": "1e-9"}
    assert build_recipe(RunRecipe, [str(file), "trainer={optim: lomo}"], []).trainer == {
        "optim": "lomo"
    }


def test_another_optimiser_is_measured_trained_and_resumed_to_the_bit(
    base: dict[str, Any],
) -> None:
    base |= {"trainer": {"optim": "adafactor", "neftune_noise_alpha": 5}, "save_steps": 3}
    whole = lt.train(base, output=base["output"] + "-whole")
    with pytest.raises(KeyboardInterrupt):
        lt.train(base, callbacks=[Interrupt(5)])
    lt.train(base, resume=True)
    assert same(saved_weights(base["output"]), saved_weights(base["output"] + "-whole"))
    found = whole.runs[0].ledger
    assert 0 < found["optimizer"] < found["gradients"]  # AdamW's state is twice as large.
