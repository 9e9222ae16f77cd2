"""What a run is given: recipes, command lines, data files."""

from pathlib import Path

from integration.tiny import bert, tokenizer, write_sentences

from bench.hostile.case import Cases, command

CASES = Cases("runs")


def write_inputs(folder: Path) -> list[str]:
    """Write a tiny model and its data; return the options of a run of two steps on them."""
    bert().bert.save_pretrained(folder / "model")
    tokenizer().save_pretrained(folder / "model")
    write_sentences(folder / "data", lambda good: str(int(good)))
    options = ("task=text", "model=model", "data=data", "output=run", "max_steps=2")
    return [*options, "batch_size=4", "max_length=32"]


@CASES.works
def plain(folder: Path) -> str:
    """A plain run of two steps."""
    command("train", *write_inputs(folder))
    assert (folder / "run" / "model" / "model.safetensors").is_file()
    return "trained"


@CASES.refused
def recipe_is_a_list(folder: Path) -> None:
    """A recipe file that holds a list."""
    (folder / "recipe.yaml").write_text("- a\n- b\n")
    command("train", "recipe.yaml")


@CASES.refused
def recipe_is_missing(folder: Path) -> None:
    """A recipe that is no file."""
    command("train", "recipe.yaml")


@CASES.refused
def misspelt_option(folder: Path) -> None:
    """An option with a typing error."""
    command("train", *write_inputs(folder), "batch_szie=3")


@CASES.refused
def no_such_model(folder: Path) -> None:
    """A model that is no folder, without a network."""
    command("train", *write_inputs(folder), "model=nowhere")
