"""``leantune measure``: the ledger of one training step, exact and with the methods."""

from __future__ import annotations

import contextlib
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.markup import escape

from leantune.cli.output import (
    DebugFlag,
    JsonFlag,
    hide_loading_bars,
    make_table,
    out,
    print_json,
    reported_errors,
)
from leantune.cli.recipe import Setting, build_config, split_arguments
from leantune.cli.train import Arguments, MethodFlag
from leantune.errors import ConfigError

if TYPE_CHECKING:
    from torch import nn

    from leantune.measure import Entry, Ledger
    from leantune.train.config import RunConfig
    from leantune.train.data import TaskData

_RANDOM_IDS = "(random ids)"
_LEDGER_ROWS = ("weights", "gradients", "optimizer", "activations", "total")


@dataclass(frozen=True)
class StillHeld:
    """Inputs of sampled linears that something else keeps for backward, of one kind of place.

    Args:
        linears: names of the linears, block numbers as ``*``.
        holders: (module, operation) of everything that keeps the tensor.
        num_bytes: summed over the blocks, each storage once.
        num_tensors: how many storages.
    """

    linears: tuple[str, ...]
    holders: tuple[tuple[str, str], ...]
    num_bytes: int
    num_tensors: int


def measure(
    arguments: Arguments = None,
    method: MethodFlag = None,
    length: Annotated[
        int | None,
        typer.Option(
            "--length",
            min=1,
            metavar="TOKENS",
            help="tokens in each row of random ids, where no data are given; default: max_length",
            show_default=False,
        ),
    ] = None,
    by_module: Annotated[
        bool, typer.Option("--by-module", help="list blocks and modules as well")
    ] = False,
    json: JsonFlag = False,
    debug: DebugFlag = False,
    settings: list[Setting] = [],  # noqa: B006 (replaced by the generated flags)
) -> None:
    """Count the exact bytes that one training step keeps, exact and with the methods.

    The batch is taken from the training data, or random token ids where no data are given.
    """
    with reported_errors(debug):
        recipe, pairs = split_arguments(arguments or [])
        config = build_config(recipe, [*pairs, *settings], method or [], complete=_complete)
        hide_loading_bars(config.model)
        with contextlib.redirect_stdout(sys.stderr):
            batch, ledgers, held = measure_step(config, length)
        document = _document(batch, ledgers, held, by_module)
        if json:
            print_json(document)
        else:
            _print(document, by_module)


def measure_step(
    config: RunConfig, length: int | None = None
) -> tuple[dict[str, Any], dict[str, Ledger], list[StillHeld]]:
    """Measure one training step of a recipe's model on one batch.

    Args:
        config: the recipe; its data may be the placeholder for random ids.
        length: tokens in each row of a random batch, >= 1; None takes ``max_length``.

    Returns:
        The batch, the ledger by name (``exact``, and the methods' names if there are any), and
        which inputs of sampled linears are not freed.

    Raises:
        ConfigError: no such model or data, or a length given beside data.
    """
    import torch

    import leantune
    from leantune.measure import ledger
    from leantune.train.models import load_model

    has_data = config.data != _RANDOM_IDS
    if has_data and length is not None:
        raise ConfigError(
            f"measure: length must be left out where data are given, got {length}; give "
            "max_length= to cut the rows"
        )
    data = _load_data(config) if has_data else _no_data(config)
    model, tokenizer = load_model(config.model, data, seed=config.seed)
    if has_data:
        batch = _first_batch(config, data, tokenizer)
    else:
        batch = _random_batch(config, data, model, tokenizer, length or config.max_length)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model.to(device)  # type: ignore[arg-type]
    batch = {name: tensor.to(device) for name, tensor in batch.items()}
    if config.gradient_checkpointing:
        # The older name is deprecated since the newer one exists (transformers 5.23).
        newer = getattr(model, "activation_checkpointing_enable", None)
        (newer or model.gradient_checkpointing_enable)()
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(config.precision)
    with torch.autocast(device.type, dtype=dtype, enabled=dtype is not None):
        ledgers = {"exact": ledger(model, batch)}
        held: list[StillHeld] = []
        if config.methods:
            session = leantune.apply(model, *config.methods, seed=config.seed)
            if session.needs_sample_ids:
                batch["sample_id"] = torch.arange(config.batch_size, device=device)
            session.calibrate([batch])
            name = "+".join(m.method for m in config.methods)
            ledgers[name] = ledger(model, batch)
            held = find_still_held(ledgers["exact"], ledgers[name], _sampled(model))
    return batch, ledgers, held


def find_still_held(exact: Ledger, after: Ledger, sampled: Sequence[str]) -> list[StillHeld]:
    """Name what keeps the inputs of sampled linears in memory, largest first.

    Args:
        exact: of the plain model.
        after: of the converted one, on the same batch.
        sampled: names of the linears whose input should go.
    """
    names = set(sampled)
    remaining = [entry for entry in after.entries if entry.ledger == "activations"]
    groups: dict[tuple[Any, Any], list[int]] = {}
    for entry in exact.entries:
        linears = [h.module for h in entry.holders if h.module in names]
        if entry.ledger != "activations" or not linears:
            continue
        twin = next((e for e in remaining if _same_tensor(entry, e, names)), None)
        if twin is not None:
            key = (
                tuple(dict.fromkeys(map(_starred, linears))),
                tuple(dict.fromkeys((_starred(h.module), h.operation) for h in twin.holders)),
            )
            groups.setdefault(key, []).append(entry.num_bytes)
    found = [
        StillHeld(linears, holders, sum(sizes), len(sizes))
        for (linears, holders), sizes in groups.items()
    ]
    return sorted(found, key=lambda held: -held.num_bytes)


def _complete(given: Mapping[str, Any]) -> dict[str, Any]:
    """Fill in what a measurement can do without: the model, the task, the data and the output."""
    filled = {"model": "demo", "task": "text", "output": "(none)"}
    filled = {name: value for name, value in filled.items() if name not in given}
    if given.get("task") != "demo" and given.get("data") is None:
        filled["data"] = _RANDOM_IDS
    return filled


def _same_tensor(before: Entry, after: Entry, sampled: set[str]) -> bool:
    """Tell whether the input of a sampled linear is the tensor of an entry after conversion."""
    if (before.num_bytes, before.dtype) != (after.num_bytes, after.dtype):
        return False
    # A linear that draws in backward keeps its whole input itself, under another operation.
    kept_by_linear = {h.module for h in before.holders} & {h.module for h in after.holders}
    return bool(set(before.holders) & set(after.holders)) or bool(kept_by_linear & sampled)


def _starred(module: str) -> str:
    return re.sub(r"(?<=\.)\d+(?=\.|$)", "*", module)


def _sampled(model: nn.Module) -> list[str]:
    from leantune.core.swap import StoredConv1D, StoredLinear

    return [n for n, m in model.named_modules() if isinstance(m, StoredLinear | StoredConv1D)]


def _load_data(config: RunConfig) -> TaskData:
    from leantune.train.data import load_task
    from leantune.train.demo import demo_data
    from leantune.train.tasks import get_task

    if config.task == "demo":
        return demo_data(num_train=max(2, config.batch_size), num_validation=2, seed=config.seed)
    assert config.data is not None
    is_text = get_task(config.task).kind == "causal_lm"
    # A block of a text takes many of its lines.
    limits = {} if is_text else {"max_train": config.batch_size, "max_validation": 1}
    return load_task(config.task, config.data, subset_seed=config.seed, **limits)


def _no_data(config: RunConfig) -> TaskData:
    from leantune.train.data import Table, TaskData
    from leantune.train.tasks import get_task

    task = get_task(config.task)
    names = task.label_names
    if task.kind == "classification" and names is None:
        names = ("0", "1")
    num_labels = {"regression": 1, "causal_lm": 0}.get(task.kind, len(names or ()))
    return TaskData(task, Table({}), Table({}), num_labels, names)


def _first_batch(config: RunConfig, data: TaskData, tokenizer: Any) -> dict[str, Any]:
    """Return rows of the training data as a batch, padded to the longest."""
    from leantune.train.data import tokenize

    rows, _ = tokenize(data, tokenizer, config.max_length)
    rows = rows.select(range(min(config.batch_size, len(rows))))
    # Padding by itself is what a collator does; the tokenizer's hint is about encoding.
    tokenizer.deprecation_warnings["Asking-to-pad-a-fast-tokenizer"] = True
    return dict(tokenizer.pad(rows.to_dict(), return_tensors="pt"))


def _random_batch(
    config: RunConfig, data: TaskData, model: Any, tokenizer: Any, length: int
) -> dict[str, Any]:
    """Return random ids without padding, of one length."""
    import torch

    longest = getattr(model.config, "max_position_embeddings", None)
    if longest is not None and length > longest:
        raise ConfigError(
            f"measure: length must be at most {longest} (the model's max_position_embeddings), "
            f"got {length}; give --length"
        )
    generator = torch.Generator().manual_seed(config.seed)
    shape = (config.batch_size, length)
    ids = torch.randint(0, model.config.vocab_size, shape, generator=generator)
    # A padding id in a row would end it for models that classify by the last token.
    ids[ids == tokenizer.pad_token_id] = (tokenizer.pad_token_id + 1) % model.config.vocab_size
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if data.task.kind == "causal_lm":
        return batch | {"labels": ids.clone()}
    if data.task.kind == "regression":
        return batch | {"labels": torch.rand(config.batch_size, generator=generator)}
    labels = torch.randint(0, data.num_labels, (config.batch_size,), generator=generator)
    return batch | {"labels": labels}


def _document(
    batch: Mapping[str, Any],
    ledgers: Mapping[str, Ledger],
    held: Sequence[StillHeld],
    by_module: bool,
) -> dict[str, Any]:
    rows, tokens = batch["input_ids"].shape
    runs = []
    for name, ledger in ledgers.items():
        totals = {part: value for part, value in ledger.to_dict().items() if part != "entries"}
        run: dict[str, Any] = {"name": name, **totals}
        run["activations_by_kind"] = ledger.by_kind(ledger="activations")
        if by_module:
            run["activations_by_module"] = ledger.by_module(ledger="activations")
        runs.append(run)
    return {
        "batch": {"rows": rows, "tokens": tokens},
        "runs": runs,
        "still_held": [
            {**vars(item), "holders": [list(holder) for holder in item.holders]} for item in held
        ],
    }


def _print(document: Mapping[str, Any], by_module: bool) -> None:
    console, runs = out(), document["runs"]
    batch = document["batch"]
    console.print(f"One step on {batch['rows']} x {batch['tokens']} tokens; optimizer: AdamW\n")
    parts = [{name: run[name] for name in _LEDGER_ROWS} for run in runs]
    _print_sizes("Ledger", "", runs, parts, in_order=True)
    _print_sizes("Activations by kind", "kind", runs, [r["activations_by_kind"] for r in runs])
    if by_module:
        modules = [run["activations_by_module"] for run in runs]
        _print_sizes("Activations by module", "module", runs, modules)
    _print_held(document["still_held"], sampled=len(runs) > 1)


def _print_sizes(
    title: str,
    what: str,
    runs: Sequence[Mapping[str, Any]],
    columns: Sequence[Mapping[str, int]],
    in_order: bool = False,
) -> None:
    from leantune.measure import format_bytes

    names = list(dict.fromkeys(name for column in columns for name in column))
    if not in_order:
        names.sort(key=lambda name: -max(column.get(name, 0) for column in columns))
    table = make_table(title, [what, *(run["name"] for run in runs), *["ratio"] * (len(runs) > 1)])
    for name in names:
        sizes = [column.get(name, 0) for column in columns]
        cells = [format_bytes(size) for size in sizes]
        if len(sizes) > 1:
            cells.append(f"{sizes[1] / sizes[0]:.3f}" if sizes[0] else "-")
        table.add_row(escape(name or "(model)"), *cells)
    out().print(table)


def _print_held(held: Sequence[Mapping[str, Any]], sampled: bool) -> None:
    from leantune.measure import format_bytes

    if not held:
        if sampled:
            out().print("Every input of a sampled linear is freed.")
        return
    table = make_table("Not freed", ("input of", "still held by", "tensors", "size"), left=2)
    for item in held:
        holders = [f"{module or '(model)'} ({operation})" for module, operation in item["holders"]]
        table.add_row(
            escape("\n".join(item["linears"])),
            escape("\n".join(holders)),
            str(item["num_tensors"]),
            format_bytes(item["num_bytes"]),
        )
    out().print(table)
