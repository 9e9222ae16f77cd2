"""``leantune fidelity``: how far the methods' gradient is from the exact one, site by site."""

from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape

from leantune.cli.measure import convert, load_step
from leantune.cli.options import ArgumentsOption, DebugFlag, JsonFlag, MethodOption
from leantune.cli.output import loading, note, out, print_figures, print_json, reported_errors
from leantune.errors import ConfigError

if TYPE_CHECKING:
    from leantune.measure.fidelity import Fidelity


def fidelity(
    arguments: ArgumentsOption = None,
    method: MethodOption = None,
    num_draws: Annotated[
        int, typer.Option(min=2, help="draws; at least 32 tell a bias from chance")
    ] = 64,
    num_batches: Annotated[
        int, typer.Option(min=1, help="batches to take the training's noise from")
    ] = 4,
    json: JsonFlag = False,
    debug: DebugFlag = False,
) -> None:
    """Compare the methods' gradient with the exact one: bias, variance and cosine of each site.

    The batches are taken from the training data; without data they are random token ids.
    """
    with reported_errors(debug):
        note("loading torch")
        from leantune.cli.recipe import build_recipe
        from leantune.training.recipe import MeasureRecipe

        recipe = build_recipe(MeasureRecipe, arguments or [], method or [])
        if not recipe.methods:
            raise ConfigError(
                "fidelity: methods must name at least one, got none; add --method wta_crs"
            )
        doing = f"measuring {num_draws} draws of {recipe.model}: loading transformers"
        with loading(recipe.model, doing):
            import leantune
            from leantune.training.trainers import autocast

            model, batches = load_step(recipe, num_batches)
            convert(model, recipe, batches)
            with autocast(recipe.precision):
                found = leantune.fidelity(model, batches[0], num_draws, batches=batches[1:])
        suspects = [item.name for item in found.parameters if item.looks_biased]
        if json:
            print_json({**found.to_dict(), "looks_biased": suspects})
        else:
            _print(found, suspects)


def _print(found: "Fidelity", suspects: list[str]) -> None:
    header, *rows = found.rows()
    if rows:
        cells = [[escape(row[0]), *row[1:]] for row in rows]
        print_figures("Gradient, relative to the exact one", header, cells)
    names = escape(", ".join(suspects)) or "no gradient"
    text = (
        f"{found.num_draws} draws on {found.num_batches} batches; {len(found.exact_parameters)} "
        f"parameters have an exact gradient. Biased beyond chance: {names}."
    )
    out().print(text, soft_wrap=True)
