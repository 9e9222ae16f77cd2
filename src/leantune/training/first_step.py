"""The step that a run begins with: measured, and tried against a budget, before anything is kept.

Every variant's model is loaded for it and thrown away, so that no measurement leaves a trace in the
training.
"""

import gc
import math
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from leantune.core.disk import read_json
from leantune.measure.ledger import ledger
from leantune.measure.peak import compare_steps
from leantune.training.budget import by_length, fit_budget, measure_step
from leantune.training.experiment import Experiment
from leantune.training.folder import PLAN_FILE
from leantune.training.models import model_on_meta
from leantune.training.progress import say
from leantune.training.recipe import RunRecipe
from leantune.training.results import VariantResult
from leantune.training.trainers import autocast, checkpoint_blocks, first_inputs
from leantune.training.weights import freeze

MEASURED_ROUNDS = 5


def fit(experiment: Experiment) -> RunRecipe:
    """Let the budget choose how to train, as it did already where the run is resumed."""
    recipe, kept = experiment.recipe, Path(experiment.recipe.output) / PLAN_FILE
    if recipe.resume:
        experiment.plan = read_json(kept) if kept.is_file() else None
        return recipe
    model = model_on_meta(recipe, experiment.task, experiment.labels)
    freeze(model, recipe.freeze)
    if recipe.gradient_checkpointing:
        checkpoint_blocks(model)
    rows, longest = by_length(experiment.rows["train"])

    def try_step(chosen: RunRecipe) -> dict[str, int]:
        experiment.recipe, experiment.variants = chosen, chosen.variants()
        first = rows.select(range(min(chosen.batch_size, len(rows))))
        trainer, batch, backward = _first_step(experiment, [*experiment.variants][-1], first)
        return measure_step(trainer, backward, batch, autocast(recipe.precision))

    chosen, experiment.plan = fit_budget(recipe, model, longest, try_step)
    return chosen


def measure(experiment: Experiment) -> list[VariantResult]:
    """Measure bytes and time of a step on the first batch, all variants side by side."""
    steps: dict[str, Callable[[], None]] = {}
    ledgers: dict[str, dict[str, Any]] = {}
    for name in experiment.variants:
        say(f"measuring {name}: the bytes of a step")
        trainer, batch, steps[name] = _first_step(experiment, name)
        # Without a choice the state is AdamW's, which the ledger forecasts by itself.
        optimizer = trainer.create_optimizer() if "optim" in experiment.recipe.trainer else None
        with autocast(experiment.recipe.precision):
            ledgers[name] = ledger(trainer.model, batch, optimizer=optimizer).to_dict()
    plain = (name for name, methods in experiment.variants.items() if not methods)
    reference = next(plain, next(iter(steps)))
    say(f"measuring {', '.join(steps)}: the time of a step, {MEASURED_ROUNDS} rounds")
    stats = compare_steps(steps, reference=reference, rounds=MEASURED_ROUNDS)
    # A trainer is full of cycles; its model would count towards the peak of the training.
    steps.clear()
    trainer = optimizer = None
    gc.collect()
    is_compared = len(ledgers) > 1
    return [
        VariantResult(
            name=name,
            methods=[method.to_dict() for method in experiment.variants[name]],
            saved_bytes=found["activations"],
            ledger=found,
            step_ms=stats[name].median_ms,
            step_time_ratio=stats[name].ratio if is_compared else None,
            step_time_ratio_spread=[stats[name].ratio_p20, stats[name].ratio_p80]
            if is_compared
            else None,
        )
        for name, found in ledgers.items()
    ]


def forecast(experiment: Experiment, draft: VariantResult) -> VariantResult:
    """Say how long a variant's steps would take, without evaluations."""
    recipe = experiment.recipe
    num_batches = recipe.epochs * math.ceil(len(experiment.rows["train"]) / recipe.batch_size)
    if recipe.max_steps:
        num_batches = recipe.max_steps * recipe.gradient_accumulation_steps
    return replace(draft, train_seconds=num_batches * draft.step_ms / 1000)


def _first_step(
    experiment: Experiment, name: str, train_rows: Any = None
) -> tuple[Any, dict[str, Any], Callable[..., None]]:
    """Return a trainer, and the batch and step that training of the same seed begins with."""
    rows = experiment.rows if train_rows is None else {**experiment.rows, "train": train_rows}
    if experiment.task.kind == "preference":
        # The reference would say first what it gives every row.
        rows = {split: part.take(experiment.recipe.batch_size) for split, part in rows.items()}
    # A trainer makes its folder at once; the run's own is not to be touched yet.
    with tempfile.TemporaryDirectory() as folder:
        trainer, session = experiment.build(name, Path(folder), rows)
    batch, model = first_inputs(trainer), trainer.model
    assert model is not None
    if session is not None:
        # What is measured here is thrown away; training calibrates on more than one batch.
        session.calibrate([batch])
    if experiment.recipe.gradient_checkpointing:
        checkpoint_blocks(model)

    def step(is_first: bool = True) -> None:
        model.train()
        if is_first:
            model.zero_grad(set_to_none=True)
        with autocast(experiment.recipe.precision):
            loss = model(**batch).loss
        (loss if session is None else loss + session.auxiliary_loss()).backward()

    return trainer, batch, step
