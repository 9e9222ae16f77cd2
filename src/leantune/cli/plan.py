"""``leantune plan``: whether a training step fits a budget of memory, and what makes it fit."""

from typing import Annotated

import typer
from rich.markup import escape

from leantune.cli.options import DebugFlag, JsonFlag, MethodOption
from leantune.cli.output import loading, out, print_figures, print_json, reported_errors


def plan(
    model: Annotated[
        str, typer.Option(help="a folder, with or without weights, a name on the hub, or demo")
    ],
    batch_size: Annotated[int, typer.Option(help="samples of an optimiser step")],
    max_length: Annotated[int, typer.Option(help="tokens of the longest sample")],
    budget: Annotated[str, typer.Option(help="memory that the step may take, such as 22GiB")],
    method: MethodOption = None,
    min_keep_ratio: Annotated[
        float, typer.Option(help="least share of rows that WTA-CRS may keep; 1 leaves it out")
    ] = 0.3,
    precision: Annotated[
        str, typer.Option(help="dtype of the products: float32, bf16 or fp16")
    ] = "float32",
    json: JsonFlag = False,
    debug: DebugFlag = False,
) -> None:
    """Say whether a training step fits a budget of memory, and choose what makes it fit.

    The model is built from its configuration; no weights are read or downloaded. A --method is kept
    in any case: lora trains its factors alone. Blocks that run again may keep a third of the rows.
    """
    with reported_errors(debug):
        with loading(model, f"planning a step of {model}: building it from its configuration"):
            import leantune
            from leantune.training.models import load_config

            found = leantune.plan(
                load_config(model, trust_remote_code=False),
                *(method or []),
                batch_size=batch_size,
                max_length=max_length,
                budget=budget,
                min_keep_ratio=min_keep_ratio,
                precision=precision,
            )
        if json:
            print_json({"name": model, **found.to_dict()})
            return
        header, *rows = found.rows()
        print_figures(
            f"Ways to train {escape(model)} in {escape(budget)}, the planned one first",
            header,
            [(escape(row[0]), *row[1:]) for row in rows],
        )
        for methods, why in found.left_out.items():
            out().print(escape(f"left out: {methods} ({why})"), soft_wrap=True)
        out().print("As options of a recipe:")
        print_json(found.recipe())
