"""One training run: from a recipe to a folder with the model, its results and its checkpoints."""

import json
import pickle
import time
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import transformers

from leantune.core.disk import write_atomic, writing
from leantune.core.distributed import is_first_process, sum_over_ranks
from leantune.core.manifest import atomic_folder
from leantune.core.recipe import RECIPE_FILE
from leantune.core.saving import writes_plain
from leantune.core.session import Session
from leantune.errors import ConfigError
from leantune.ops.backend import on_gpu, own_device
from leantune.training.budget import as_planned
from leantune.training.checkpoints import (
    RESULT_FILE,
    SealCheckpoints,
    find_starts,
    read_result,
    variant_folders,
)
from leantune.training.experiment import Experiment
from leantune.training.first_step import fit, forecast, measure
from leantune.training.folder import (
    RunLock,
    check_folder,
    check_space,
    goes_further,
    make_folder,
    recipe_there,
    write_recipe,
)
from leantune.training.interrupt import handled_by
from leantune.training.progress import say
from leantune.training.recipe import RunRecipe
from leantune.training.results import METRICS_FILE, RunResult, VariantResult
from leantune.training.stops import StopOnInterrupt, StopOnNonFinite
from leantune.training.trainers import check_trainer


def train(
    recipe: Any,
    *,
    callbacks: Sequence[transformers.TrainerCallback] = (),
    dry_run: bool = False,
    **overrides: Any,
) -> RunResult:
    """Train what a recipe says with an unmodified ``transformers.Trainer``, and write its folder.

    Everything that can be wrong with the input is found before the folder is touched. On Ctrl-C,
    SIGTERM and SIGHUP the step in progress is finished and a checkpoint kept; ``resume=True`` then
    goes on from the last whole checkpoint and ends with the weights of an uninterrupted run. With
    more epochs (or steps) a run that has ended goes on as well; its result stays until then.

    Args:
        recipe: path of a YAML or JSON file, a mapping, or a ``RunRecipe``.
        callbacks: go to the trainer of every variant; ``args.run_name`` tells which one.
        dry_run: check and measure everything, train and write nothing. The result has no metrics,
            and for ``train_seconds`` a forecast: the measured time of a step for each batch.
        overrides: options that win over the recipe's.

    Raises:
        ConfigError: an option, the data, the model or the run folder is not acceptable; another
            process writes into that folder; a checkpoint is damaged.
        WriteError: the disk is full; the recipe and the last whole checkpoint are kept.
        KeyboardInterrupt: Ctrl-C was pressed, or another signal came, whose ``number`` it has.
    """
    recipe = RunRecipe.read(recipe, overrides)
    output = Path(recipe.output)
    with handled_by(), RunLock(recipe) as lock:
        recipe = as_planned(recipe)
        check_folder(recipe)
        _check_device(recipe.precision)
        check_trainer(recipe)
        if (output / RECIPE_FILE).is_file() and not dry_run:
            lock.take()
        past: dict[str, int] = {}
        if recipe.resume and (output / METRICS_FILE).is_file():
            ended = RunResult.read(output)
            if not goes_further(recipe_there(recipe), recipe):
                return ended
            past = {run.name: run.num_steps for run in ended.runs}
        starts = find_starts(recipe, past) if recipe.resume else {}
        experiment = Experiment(recipe, callbacks)
        if recipe.budget is not None:
            recipe = fit(experiment)
        drafts = measure(experiment)
        check_space(recipe, max(d.ledger["gradients"] + d.ledger["optimizer"] for d in drafts))
        if dry_run:
            return experiment.result(tuple(forecast(experiment, draft) for draft in drafts))
        sum_over_ranks(torch.zeros((), device=own_device()))  # all have checked the folder now
        if not recipe.resume and is_first_process():
            make_folder(recipe, lock, experiment.plan)
        runs = tuple(_train(experiment, draft, starts, past) for draft in drafts)
        result = experiment.result(runs)
        if is_first_process():
            write_atomic(output / METRICS_FILE, json.dumps(result.to_dict(), indent=1) + "\n")
            if past:
                write_recipe(recipe)
        return result


def _train(
    experiment: Experiment,
    draft: VariantResult,
    starts: Mapping[str, Path],
    past: Mapping[str, int],
) -> VariantResult:
    """Train one variant, or go on with it; of the last one the model is kept.

    One whose result is there is not trained again, unless it has only the steps of the past.
    """
    recipe, folder = experiment.recipe, variant_folders(experiment.recipe)[draft.name]
    is_last = draft.name == list(experiment.variants)[-1]
    start_from, num_past = starts.get(draft.name), past.get(draft.name, 0)
    if recipe.resume and not is_last and (found := read_result(folder, num_past)) is not None:
        return found
    trainer, session = experiment.build(draft.name, folder, experiment.rows)
    stop = StopOnInterrupt()
    for last in (stop, StopOnNonFinite(), SealCheckpoints()):
        trainer.add_callback(last)
    if on_gpu(own_device()):
        torch.cuda.reset_peak_memory_stats()
    # Whatever was measured or converted before, training starts from the same random stream.
    transformers.set_seed(recipe.seed)
    start = time.perf_counter()
    with stop, writing(folder), _no_code_in(start_from):
        trainer.train(resume_from_checkpoint=None if start_from is None else str(start_from))
    seconds = time.perf_counter() - start
    peak = torch.cuda.max_memory_allocated() if on_gpu(own_device()) else None
    step = trainer.state.global_step
    # With early stopping the trainer has put the best weights back.
    best = trainer.state.best_global_step
    kept_step = best or step
    if not any(e["step"] == kept_step and "eval_loss" in e for e in trainer.state.log_history):
        trainer.evaluate()
    history = trainer.state.log_history
    evaluations = {e["step"]: experiment.metrics(e) for e in history if "eval_loss" in e}
    result = replace(
        draft,
        metrics=evaluations[kept_step],
        best_step=best,
        train_loss=[[e["step"], e["loss"]] for e in history if "loss" in e],
        evaluations=[[at, metrics] for at, metrics in sorted(evaluations.items())],
        fidelity=[{"step": e["step"], "sites": e["fidelity"]} for e in history if "fidelity" in e],
        num_steps=step,
        train_seconds=seconds,
        peak_bytes=peak,
    )
    if not is_first_process():
        return result
    write_atomic(folder / RESULT_FILE, json.dumps(vars(result)) + "\n")
    if is_last:
        say(f"writing {recipe.output}")
        _save(experiment, trainer.model, session, Path(recipe.output))
    return result


def _save(experiment: Experiment, model: Any, session: Session | None, output: Path) -> None:
    if experiment.use_cache is not None:
        model.config.use_cache = experiment.use_cache
    if session is not None:
        session.save(output / "session")
        if hasattr(model, "peft_config") and writes_plain(session.conversions):
            with atomic_folder(output / "adapter", "adapter") as fresh:
                model.save_pretrained(fresh)
                model.config.save_pretrained(fresh)
                experiment.tokenizer.save_pretrained(fresh)
        if not session.can_merge:
            # No plain model computes the same: the session, or the adapter, goes onto the base.
            return
        session.merge()
    with atomic_folder(output / "model", "model") as fresh:
        model.save_pretrained(fresh)
        experiment.tokenizer.save_pretrained(fresh)


@contextmanager
def _no_code_in(checkpoint: Path | None) -> Generator[None]:
    """Name the checkpoint whose pickles hold more than tensors, which torch refuses to run."""
    try:
        yield
    except pickle.UnpicklingError as error:
        raise ConfigError(
            f"RunRecipe: checkpoint must hold tensors and plain values alone, got {checkpoint} "
            "with a pickle of something else, which was not run; take an earlier checkpoint with "
            "resume_from"
        ) from error


def _check_device(precision: str) -> None:
    has_gpu = on_gpu(own_device())
    if (precision == "fp16" and not has_gpu) or (
        precision == "bf16" and has_gpu and not torch.cuda.is_bf16_supported(False)
    ):
        raise ConfigError(
            f"RunRecipe: precision must be one that this device computes, got {precision!r}; take "
            "'float32'"
        )
