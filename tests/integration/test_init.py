"""The recipe to start from is one, and its comments are the options with their defaults."""

import re
from pathlib import Path

import pytest
from integration.test_cli import invoke, plain

import leantune as lt
from leantune.cli.init import starting_recipe
from leantune.training.data import TASKS
from leantune.training.recipe import ONLY_FOR, RunRecipe, read_recipe_file


@pytest.mark.parametrize("task", TASKS)
def test_each_task_has_a_recipe_that_train_reads(task: str, tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    assert invoke("init", "--task", task, path).exit_code == 0
    written = RunRecipe.read(path, {})
    assert written.task == task
    assert written.methods == (lt.Checkpoint(), lt.WTACRS(keep_ratio=0.1))
    # With every comment that holds an option taken away it says the same.
    text = re.sub(r"^# (\w+: )", r"\1", path.read_text(), flags=re.MULTILINE)
    path.write_text(text)
    options = read_recipe_file(path)
    assert RunRecipe.from_dict(options) == written
    others = {name for name, tasks in ONLY_FOR.items() if task not in tasks}
    known = {row["name"] for row in RunRecipe.describe()} - {*RunRecipe.not_saved, *others}
    assert options.keys() == known | {"format"}


def test_every_line_has_its_help() -> None:
    text = starting_recipe("chat")
    for row in RunRecipe.describe():
        if row["name"] not in (*RunRecipe.not_saved, "methods"):
            assert re.search(rf"^(# )?{row['name']}: .*  # .*{re.escape(row['help'])}", text, re.M)


def test_a_file_that_is_there_stays(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text("mine")
    refused = invoke("init", path)
    assert refused.exit_code == 2 and "PATH must be a new file" in plain(refused.stderr)
    assert path.read_text() == "mine"
    assert invoke("init", "--task", "chatt").exit_code == 2
    assert invoke("init", "--task", "chat").stdout == starting_recipe("chat")
