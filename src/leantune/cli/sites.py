"""``leantune sites``: what a model is made of, what each method takes of it, and what none does."""

from collections.abc import Iterable
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape

from leantune.cli.options import DebugFlag, JsonFlag
from leantune.cli.output import loading, out, print_json, print_text, reported_errors

if TYPE_CHECKING:
    from leantune.core.survey import Found, Survey


def sites(
    model: Annotated[
        str, typer.Argument(help="a folder, with or without weights, a name on the hub, or demo")
    ],
    json: JsonFlag = False,
    debug: DebugFlag = False,
) -> None:
    """Show what is found in a model, what each method takes of it, and what none can reach.

    The model is built from its configuration; no weights are read or downloaded.
    """
    with reported_errors(debug):
        with loading(model, f"building {model} from its configuration"):
            from leantune.core.survey import survey
            from leantune.training.models import build_model

            found = survey(build_model(model))
        if json:
            print_json({"name": model, **asdict(found)})
        else:
            print_survey(found)


def print_survey(survey: "Survey") -> None:
    """Print tables: each kind of block, what lies outside, the methods, and what none takes."""
    out().print(f"{escape(survey.model)}, {survey.num_parameters:,} parameters\n", soft_wrap=True)
    blocks = dict.fromkeys(row.block for row in survey.found)
    for block in sorted(blocks, key=lambda block: block is None):
        _print_block(block, [row for row in survey.found if row.block == block])
    rows = [
        (c.method, str(c.num_sites), f"{c.share:.1%}" if c.share else "", escape(c.why_not or ""))
        for c in survey.choices
    ]
    print_text("By their own choice", ("method", "sites", "weights", "why not"), rows)
    left = sorted(survey.left, key=lambda left: -left.share)
    rows = [(escape(item.name), f"{item.share:.1%}", escape(item.why)) for item in left]
    print_text("Taken by none", ("parameter", "weights", "what it is"), rows)


def _print_block(block: str | None, found: "Iterable[Found]") -> None:
    title = "outside blocks"
    rows: list[tuple[str, ...]] = []
    for row in found:
        name = row.name
        if block is not None:
            name = name.removeprefix(block).removeprefix(".") or "(block)"
            if row.role == "block":
                title = f"{block}: {row.count} x {row.kind}"
        shape = " x ".join(map(str, row.shape))
        what = f"{row.part or row.role}{', ' * bool(shape)}{shape}"
        rows.append((escape(name), what, ", ".join(row.methods) or "-"))
    print_text(escape(title), ("module", "what", "taken by"), rows)
