"""A run's budget of memory: a plan from the configuration, tried on the longest batch before it."""

import gc
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any, cast

import numpy as np
import torch
import transformers
from torch import Tensor, nn

from leantune.core.distributed import broadcast
from leantune.core.tensors import iter_tensors
from leantune.errors import ConfigError
from leantune.measure.entries import LEDGERS
from leantune.measure.ledger import ledger
from leantune.measure.text import format_bytes
from leantune.methods import LoRA
from leantune.ops.backend import on_gpu, own_device
from leantune.planner.meter import Meter, Speed
from leantune.planner.plan import describe, plan
from leantune.planner.request import parse_budget
from leantune.training.folder import recipe_there
from leantune.training.progress import say
from leantune.training.recipe import RunRecipe

_SIZES = (*LEDGERS, "peak")


def as_planned(recipe: RunRecipe) -> RunRecipe:
    """Return a recipe with what was planned when its run began, if it goes on with that run.

    What cannot be that run's is left to those who refuse another recipe.
    """
    if recipe.budget is None or not recipe.resume:
        return recipe
    there = recipe_there(recipe)
    is_its = there.methods[: len(recipe.methods)] == recipe.methods
    if not is_its or _num_samples(there) != _num_samples(recipe):
        return recipe
    return _with(recipe, there.methods, there.batch_size, there.gradient_accumulation_steps)


def fit_budget(
    recipe: RunRecipe,
    model: nn.Module,
    max_length: int,
    try_step: Callable[[RunRecipe], dict[str, int]],
) -> tuple[RunRecipe, dict[str, Any]]:
    """Choose methods and micro-batches whose step fits the recipe's budget, and see that it does.

    Args:
        recipe: its methods are kept, and the number of samples of its optimiser step.
        model: on the meta device.
        max_length: tokens of the longest row.
        try_step: returns what a real step of a recipe holds: each ledger, and the ``peak``.

    Returns:
        The recipe with the choice in it, and ``RunResult.plan``.

    Raises:
        ConfigError: nothing fits; the message says what the smallest takes.
    """
    budget, who = parse_budget(recipe.budget, "RunRecipe"), f"budget {recipe.budget}"
    left, why = cast(Any, recipe.budget), ""
    how: Any = {"batch_size": _num_samples(recipe), "max_length": max(2, max_length)}
    for is_again in (False, True):
        try:
            found = plan(model, *recipe.methods, **how, budget=left, precision=recipe.precision)
        except ConfigError as error:
            raise ConfigError(f"{error}{why}") from error
        if any(isinstance(m, LoRA) and m not in recipe.methods for m in found.methods):
            raise ConfigError(
                f"RunRecipe: budget must be what training all weights takes, got {recipe.budget}, "
                f"where nothing fits but {describe(found.methods)} "
                f"({format_bytes(found.num_bytes['peak'])}{why}): add lora to methods, with about "
                "ten times the learning rate, or raise the budget"
            )
        chosen = _with(recipe, found.methods, found.batch_size, found.accumulation_steps)
        say(
            f"{who}: planned {describe(found.methods)} on {found.accumulation_steps} x "
            f"{found.batch_size} rows of at most {max_length} tokens; trying the longest"
        )
        predicted, measured = {k: found.num_bytes[k] for k in _SIZES}, try_step(chosen)
        # A trainer is full of cycles; its model would count towards the peak of what comes next.
        gc.collect()
        sizes = (f"{k} {format_bytes(predicted[k])} / {format_bytes(measured[k])}" for k in _SIZES)
        say(f"{who}: predicted / measured: {', '.join(sizes)}")
        if measured["peak"] <= budget:
            sides = {"budget": budget, "predicted": predicted, "measured": measured}
            return chosen, {**sides, "replanned": is_again, "relative_time": found.relative_time}
        left = budget * predicted["peak"] // measured["peak"]
        why = f"; a step took {format_bytes(measured['peak'])}, so that this is left of {who}"
        if not is_again:
            say(f"{who}: the step takes more; planning once more, for {format_bytes(left)}")
    smallest = min((found, *found.alternatives), key=lambda way: way.num_bytes["peak"])
    takes = smallest.num_bytes["peak"] * measured["peak"] // predicted["peak"]
    raise ConfigError(
        f"RunRecipe: budget must be what a step takes, got {recipe.budget} where the second plan's "
        f"takes {format_bytes(measured['peak'])}; the smallest, {describe(smallest.methods)} on "
        f"{smallest.batch_size} rows at a time, takes about {format_bytes(takes)}: raise it, or "
        "shorten max_length"
    )


def measure_step(
    trainer: transformers.Trainer,
    backward: Callable[[bool], None],
    batch: Mapping[str, Any],
    context: AbstractContextManager[Any],
) -> dict[str, int]:
    """Run two whole optimiser steps, and return what the second holds, in bytes.

    Only then has the optimiser its state. Of gradients that accumulate, the second backward is
    like any further one. Several processes go by what the first one measures.

    Args:
        trainer: of a model that is thrown away.
        backward: a forward and backward on ``batch``, with new gradients or added ones.
        context: of autocast.
    """
    model: Any = trainer.model
    optimizer = trainer.create_optimizer()

    def step() -> None:
        for number in range(min(2, trainer.args.gradient_accumulation_steps)):
            backward(number == 0)
        optimizer.step()

    step()
    with context:
        held = ledger(model, batch, optimizer=optimizer)
    known = iter_tensors([batch, list(optimizer.state.values())])
    peak = peak_of_step(model, step, known, held.weights + held.optimizer)
    sizes = torch.tensor([*(getattr(held, name) for name in LEDGERS), peak])
    return dict(zip(_SIZES, broadcast(sizes.to(trainer.args.device)).tolist(), strict=True))


def peak_of_step(
    model: nn.Module, step: Callable[[], None], known: Iterable[Tensor], resident: int
) -> int:
    """Run a step and return the most bytes held at once: of CUDA's allocator, else of tensors.

    Args:
        model: that the step trains.
        step: to the end of the optimiser's update, whose state exists.
        known: tensors that exist before it, besides the model's own.
        resident: bytes of the model and of that state.
    """
    if on_gpu(own_device()):
        torch.cuda.reset_peak_memory_stats()
        step()
        return torch.cuda.max_memory_allocated()
    with Meter(model, [], known, Speed(1, 1, 1, overlaps=False)) as meter:
        step()
    return resident + max(meter.peaks)


def by_length(rows: Any) -> tuple[Any, int]:
    """Return rows of tokens, those with the most first, and how many the longest has."""
    chunks = rows.data["input_ids"].chunks
    lengths = np.concatenate([chunk.value_lengths().to_numpy() for chunk in chunks])
    return rows.select(np.argsort(-lengths, kind="stable")), int(lengths.max())


def _num_samples(recipe: RunRecipe) -> int:
    return recipe.batch_size * recipe.gradient_accumulation_steps


def _with(recipe: RunRecipe, methods: Any, batch_size: int, num_batches: int) -> RunRecipe:
    """Put a choice into a recipe; a rival that is the very same has nobody to be compared with."""
    rivals = tuple(rival for rival in recipe.compare if rival != methods)
    sizes = {"batch_size": batch_size, "gradient_accumulation_steps": num_batches}
    return replace(recipe, methods=methods, compare=rivals, **sizes)
