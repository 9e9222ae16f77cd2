"""``leantune measure``: the ledger of one training step, plain and with the methods."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.markup import escape

from leantune.cli.options import ArgumentsOption, DebugFlag, JsonFlag, MethodOption
from leantune.cli.output import (
    loading,
    note,
    out,
    print_figures,
    print_json,
    print_text,
    reported_errors,
)
from leantune.measure.text import format_bytes

if TYPE_CHECKING:
    from leantune.measure.ledger import Ledger
    from leantune.measure.still_held import StillHeld
    from leantune.training.recipe import MeasureRecipe

_LEDGER_ROWS = ("weights", "gradients", "optimizer", "activations", "total")


def measure(
    arguments: ArgumentsOption = None,
    method: MethodOption = None,
    by_module: Annotated[
        bool, typer.Option("--by-module", help="list blocks and modules as well")
    ] = False,
    json: JsonFlag = False,
    debug: DebugFlag = False,
) -> None:
    """Count the exact bytes that one training step keeps, plain and with the methods.

    The batch is taken from the training data; without data it is max_length random token ids.
    """
    with reported_errors(debug):
        note("loading torch")
        from leantune.cli.recipe import build_recipe
        from leantune.training.recipe import MeasureRecipe

        recipe = build_recipe(MeasureRecipe, arguments or [], method or [])
        with loading(recipe.model, f"measuring a step of {recipe.model}: loading transformers"):
            batch, ledgers, held = measure_step(recipe)
        document = _document(batch, ledgers, held, by_module)
        if json:
            print_json(document)
        else:
            _print(document, by_module)


def measure_step(
    recipe: "MeasureRecipe",
) -> "tuple[dict[str, Any], dict[str, Ledger], list[StillHeld]]":
    """Measure one training step of a recipe's model on one batch.

    Returns:
        The batch, the ledger by name (``baseline``, and the methods' names if there are any), and
        which inputs of sampled linears are not freed.

    Raises:
        ConfigError: no such model, task or data.
    """
    from leantune.measure.ledger import ledger
    from leantune.measure.still_held import find_still_held, sampled_linears
    from leantune.training.recipe import BASELINE
    from leantune.training.trainers import autocast

    model, (batch,) = load_step(recipe)
    held: list[StillHeld] = []
    with autocast(recipe.precision):
        ledgers = {BASELINE: ledger(model, batch)}
        if recipe.methods:
            convert(model, recipe, [batch])
            after = ledgers["+".join(m.method for m in recipe.methods)] = ledger(model, batch)
            held = find_still_held(ledgers[BASELINE], after, sampled_linears(model))
    return batch, ledgers, held


def load_step(recipe: "MeasureRecipe", num_batches: int = 1) -> tuple[Any, list[dict[str, Any]]]:
    """Load a recipe's model and its first batches, on the device that it would train on.

    Returns:
        The model without the recipe's methods, and at most ``num_batches`` batches, at least one.

    Raises:
        ConfigError: no such model, task or data.
    """
    from leantune.ops.backend import own_device
    from leantune.training.data import check_ids, get_task, load_task, tokenize
    from leantune.training.models import load_model, load_tokenizer
    from leantune.training.trainers import checkpoint_blocks, collator
    from leantune.training.weights import freeze, quantise

    task = get_task(recipe.task)
    tokenizer = load_tokenizer(recipe.model, trust_remote_code=recipe.trust_remote_code)
    labels: Any = task.label_names or ("0", "1")
    tokens = None
    size = recipe.batch_size
    if recipe.data is not None:
        # A block of a text takes many of its lines.
        wanted = size * num_batches
        limit = None if task.kind == "causal_lm" else wanted + wanted % 2
        data = load_task(recipe.task, recipe.data, max_train=limit, max_validation=2)
        labels = getattr(data["train"].features.get("label"), "names", None)
        tokens = tokenize(data, tokenizer, recipe.max_length)
    if task.kind != "classification":
        labels = None
    same = ("max_length", "seed", "dtype", "trust_remote_code")
    how = {option: getattr(recipe, option) for option in same}
    model = load_model(recipe.model, task, labels, tokenizer, **how)
    freeze(model, recipe.freeze)
    if recipe.quantize:
        quantise(model, recipe.quantize)
    if tokens is None:
        seeds = range(recipe.seed, recipe.seed + num_batches)
        batches = [
            _random_batch(recipe, seed, task.kind, model, len(labels or ())) for seed in seeds
        ]
    else:
        check_ids(tokens, tokenizer, model)
        rows = tokens["train"].to_list()[: size * num_batches]
        parts = [rows[i : i + size] for i in range(0, len(rows), size)]
        batches = [dict(collator(task, tokenizer)(part)) for part in parts]
    device = own_device()
    model.to(device)
    if recipe.gradient_checkpointing:
        checkpoint_blocks(model)
    return model, [{name: t.to(device) for name, t in batch.items()} for batch in batches]


def convert(model: Any, recipe: "MeasureRecipe", batches: Sequence[dict[str, Any]]) -> None:
    """Apply a recipe's methods and calibrate them, each sample numbered where one needs that."""
    import torch

    import leantune
    from leantune.core.conversion import SAMPLE_ID
    from leantune.training.weights import train_factors_in_full

    session = leantune.apply(model, *recipe.methods, seed=recipe.seed)
    train_factors_in_full(model)
    if any(conversion.needs_sample_ids for conversion in session.conversions):
        numbers = torch.arange(sum(len(batch["input_ids"]) for batch in batches))
        for batch, part in zip(batches, numbers.split(recipe.batch_size), strict=True):
            batch[SAMPLE_ID] = part
    session.calibrate(batches)


def _random_batch(
    recipe: "MeasureRecipe", seed: int, kind: str, model: Any, num_labels: int
) -> dict[str, Any]:
    """Return random ids without padding."""
    import torch

    config = model.config
    generator = torch.Generator().manual_seed(seed)
    shape = (recipe.batch_size, recipe.max_length)
    ids = torch.randint(0, config.vocab_size, shape, generator=generator)
    # A padding id in a row would end it for models that classify by the last token.
    ids[ids == config.pad_token_id] = (config.pad_token_id + 1) % config.vocab_size
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if kind in ("causal_lm", "chat"):
        return batch | {"labels": ids.clone()}
    if kind == "regression":
        return batch | {"labels": torch.rand(recipe.batch_size, generator=generator)}
    return batch | {"labels": torch.randint(num_labels, (recipe.batch_size,), generator=generator)}


def _document(
    batch: Mapping[str, Any],
    ledgers: "Mapping[str, Ledger]",
    held: "Sequence[StillHeld]",
    by_module: bool,
) -> dict[str, Any]:
    rows, tokens = batch["input_ids"].shape
    runs = []
    for name, found in ledgers.items():
        totals = {part: value for part, value in found.to_dict().items() if part != "entries"}
        run: dict[str, Any] = {"name": name, **totals}
        run["activations_by_kind"] = found.by_kind(ledger="activations")
        if by_module:
            run["activations_by_module"] = found.by_module(ledger="activations")
        runs.append(run)
    still = [vars(item) for item in held]
    return {"batch": {"rows": rows, "tokens": tokens}, "runs": runs, "still_held": still}


def _print(document: Mapping[str, Any], by_module: bool) -> None:
    console, runs, batch = out(), document["runs"], document["batch"]
    console.print(f"One step on {batch['rows']} x {batch['tokens']} tokens; optimizer: AdamW\n")
    parts = [{name: run[name] for name in _LEDGER_ROWS} for run in runs]
    _print_sizes("Ledger", "", runs, parts)
    for what in ("kind", "module") if by_module else ("kind",):
        columns = [run[f"activations_by_{what}"] for run in runs]
        sizes = {name: max(c.get(name, 0) for c in columns) for c in columns for name in c}
        largest = sorted(sizes, key=lambda name: -sizes[name])
        columns = [{name: column.get(name, 0) for name in largest} for column in columns]
        _print_sizes(f"Activations by {what}", what, runs, columns)
    held = document["still_held"]
    if not held and len(runs) > 1:
        console.print("Every input of a sampled linear is freed.")
    if held:
        rows = [
            (
                f"{item['num_tensors']} tensors, {format_bytes(item['num_bytes'])}",
                escape("\n".join(item["linears"])),
                escape("\n".join(f"{name or '(model)'} ({how})" for name, how in item["holders"])),
            )
            for item in held
        ]
        print_text("Not freed", ("size", "input of", "still held by"), rows)


def _print_sizes(
    title: str,
    what: str,
    runs: Sequence[Mapping[str, Any]],
    columns: Sequence[Mapping[str, int]],
) -> None:
    rows: list[list[str]] = []
    for name in columns[0]:
        sizes = [column[name] for column in columns]
        cells = [format_bytes(size) for size in sizes]
        if len(sizes) > 1:
            cells.append(f"{sizes[1] / sizes[0]:.3f}" if sizes[0] else "-")
        rows.append([escape(name or "(model)"), *cells])
    header = [what, *(run["name"] for run in runs), *["ratio"] * (len(runs) > 1)]
    print_figures(title, header, rows)
