"""One training run: from a recipe to a folder with the model, its results and its checkpoints.

Every variant's model is loaded twice, once to be measured before the run folder is touched and once
to be trained, so that no measurement leaves a trace in the training.
"""

import gc
import json
import math
import pickle
import platform
import tempfile
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import datasets
import torch
import transformers

from leantune._version import __version__
from leantune.core.apply import apply
from leantune.core.disk import read_json, write_atomic, writing
from leantune.core.distributed import is_first_process
from leantune.core.manifest import atomic_folder
from leantune.core.recipe import RECIPE_FILE
from leantune.core.saving import writes_plain
from leantune.core.session import Session
from leantune.errors import ConfigError
from leantune.integrations.trainer import TrainerCallback
from leantune.measure.ledger import ledger
from leantune.measure.peak import compare_steps
from leantune.ops.backend import on_gpu, own_device
from leantune.training.answers import ScoreAnswers
from leantune.training.budget import as_planned, by_length, fit_budget, measure_step
from leantune.training.checkpoints import (
    RESULT_FILE,
    SealCheckpoints,
    find_starts,
    read_result,
    variant_folders,
)
from leantune.training.data import check_ids, get_task, load_task, tokenize
from leantune.training.folder import (
    PLAN_FILE,
    RunLock,
    check_folder,
    check_space,
    goes_further,
    make_folder,
    recipe_there,
    write_recipe,
)
from leantune.training.interrupt import handled_by
from leantune.training.metrics import floor_score
from leantune.training.models import load_model, load_tokenizer, model_on_meta
from leantune.training.packing import check_segments
from leantune.training.progress import ProgressLines, has_screen, say, scores
from leantune.training.recipe import RunRecipe
from leantune.training.results import METRICS_FILE, RunResult, VariantResult
from leantune.training.stops import StopOnInterrupt, StopOnNonFinite
from leantune.training.trainers import (
    autocast,
    check_trainer,
    checkpoint_blocks,
    first_inputs,
    make_trainer,
    training_arguments,
)
from leantune.training.weights import check_frozen, freeze, quantise, train_factors_in_full

MEASURED_ROUNDS = 5


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
        if recipe.trainer:
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
            recipe = experiment.fit()
        drafts = experiment.measure()
        check_space(recipe, max(d.ledger["gradients"] + d.ledger["optimizer"] for d in drafts))
        if dry_run:
            return experiment.result(tuple(map(experiment.forecast, drafts)))
        # Making the first trainer was the meeting point: every process has checked the folder now.
        if not recipe.resume and is_first_process():
            make_folder(recipe, lock, experiment.plan)
        runs = tuple(experiment.train(d, starts.get(d.name), past.get(d.name, 0)) for d in drafts)
        result = experiment.result(runs)
        if is_first_process():
            write_atomic(output / METRICS_FILE, json.dumps(result.to_dict(), indent=1) + "\n")
            if past:
                write_recipe(recipe)
        return result


class Experiment:
    """A run's data and tokenizer, from which each variant's model and trainer are made.

    Args:
        data: both splits, as ``load_task`` returns them; None reads the recipe's.
    """

    def __init__(
        self,
        recipe: RunRecipe,
        callbacks: Sequence[transformers.TrainerCallback] = (),
        data: datasets.DatasetDict | None = None,
    ) -> None:
        self.recipe, self.callbacks = recipe, callbacks
        self.variants = recipe.variants()
        self.plan: dict[str, Any] | None = None
        self.task = get_task(recipe.task)
        say(f"reading {recipe.data}")
        self.data = data or load_task(
            recipe.task,
            recipe.data,
            max_train=recipe.max_train,
            max_validation=recipe.max_validation,
        )
        trust = recipe.trust_remote_code
        self.tokenizer = load_tokenizer(recipe.model, trust_remote_code=trust)
        self.rows = tokenize(self.data, self.tokenizer, recipe.max_length, packing=recipe.packing)
        self.scorers: list[transformers.TrainerCallback] = []
        if recipe.score_answers:
            self.scorers.append(ScoreAnswers(self.data, self.tokenizer, recipe.max_length))

    @property
    def labels(self) -> list[str] | None:
        """The names of the classes; None without classes."""
        return getattr(self.data["train"].features.get("label"), "names", None)

    def fit(self) -> RunRecipe:
        """Let the budget choose how to train, as it did already where the run is resumed."""
        recipe, kept = self.recipe, Path(self.recipe.output) / PLAN_FILE
        if recipe.resume:
            self.plan = read_json(kept) if kept.is_file() else None
            return recipe
        how: Any = {"dtype": recipe.dtype, "trust_remote_code": recipe.trust_remote_code}
        model = model_on_meta(recipe.model, self.task, self.labels, **how)
        freeze(model, recipe.freeze)
        if recipe.gradient_checkpointing:
            checkpoint_blocks(model)
        rows, longest = by_length(self.rows["train"])

        def try_step(chosen: RunRecipe) -> dict[str, int]:
            self.recipe, self.variants = chosen, chosen.variants()
            first = rows.select(range(min(chosen.batch_size, len(rows))))
            trainer, batch, backward = self._first_step([*self.variants][-1], first)
            return measure_step(trainer, backward, batch, autocast(recipe.precision))

        chosen, self.plan = fit_budget(recipe, model, longest, try_step)
        return chosen

    def build(
        self, name: str, folder: Path, rows: Any
    ) -> tuple[transformers.Trainer, Session | None]:
        """Load the model anew, apply the variant's methods, and make its trainer."""
        recipe, methods = self.recipe, self.variants[name]
        same = ("max_length", "seed", "dtype", "trust_remote_code")
        how = {option: getattr(recipe, option) for option in same}
        model = load_model(recipe.model, self.task, self.labels, self.tokenizer, **how)
        check_ids(self.rows, self.tokenizer, model)
        frozen = freeze(model, recipe.freeze)
        if recipe.quantize:
            quantise(model, recipe.quantize)
        if recipe.packing:
            check_segments(model, recipe.model)
        # The trainer switches it off; the saved model should generate as the loaded one did.
        self.use_cache = getattr(model.config, "use_cache", None)
        reference = None
        if self.task.kind == "preference":
            # It shares the weights, which are the loaded ones until training begins.
            reference = deepcopy(model, {id(p): p for p in model.parameters()})
        session = None
        if methods:
            # On the device first: the session's counters live where the weights are.
            model.to(own_device())
            session = apply(model, *methods, seed=recipe.seed)
            train_factors_in_full(model)
        check_frozen(model, frozen)
        checks = {"fidelity_steps": recipe.fidelity_steps, "on_bad_site": recipe.on_bad_site}
        callbacks = [*([TrainerCallback(session, **checks)] if session else []), *self.callbacks]
        patience = recipe.early_stopping_patience
        stoppers = [transformers.EarlyStoppingCallback(patience)] if patience else []
        trainer = make_trainer(
            self.task,
            model,
            training_arguments(recipe, name, folder),
            rows,
            self.tokenizer,
            callbacks + self.scorers + stoppers,
            needs_ids=session is not None and any(c.needs_sample_ids for c in session.conversions),
            reference=reference,
        )
        if not has_screen():
            trainer.remove_callback(transformers.PrinterCallback)
            trainer.add_callback(ProgressLines(name))
        return trainer, session

    def measure(self) -> list[VariantResult]:
        """Measure bytes and time of a step on the first batch, all variants side by side."""
        steps: dict[str, Callable[[], None]] = {}
        ledgers: dict[str, dict[str, Any]] = {}
        for name in self.variants:
            say(f"measuring {name}: the bytes of a step")
            trainer, batch, steps[name] = self._first_step(name)
            # Without a choice the state is AdamW's, which the ledger forecasts by itself.
            optimizer = trainer.create_optimizer() if "optim" in self.recipe.trainer else None
            with autocast(self.recipe.precision):
                ledgers[name] = ledger(trainer.model, batch, optimizer=optimizer).to_dict()
        plain = (name for name, methods in self.variants.items() if not methods)
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
                methods=[method.to_dict() for method in self.variants[name]],
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

    def _first_step(
        self, name: str, train_rows: Any = None
    ) -> tuple[Any, dict[str, Any], Callable[..., None]]:
        """Return a trainer, and the batch and step that training of the same seed begins with."""
        rows = self.rows if train_rows is None else {**self.rows, "train": train_rows}
        if self.task.kind == "preference":
            # The reference would say first what it gives every row.
            rows = {split: part.take(self.recipe.batch_size) for split, part in rows.items()}
        # A trainer makes its folder at once; the run's own is not to be touched yet.
        with tempfile.TemporaryDirectory() as folder:
            trainer, session = self.build(name, Path(folder), rows)
        batch, model = first_inputs(trainer), trainer.model
        assert model is not None
        if session is not None:
            # What is measured here is thrown away; training calibrates on more than one batch.
            session.calibrate([batch])
        if self.recipe.gradient_checkpointing:
            checkpoint_blocks(model)

        def step(is_first: bool = True) -> None:
            model.train()
            if is_first:
                model.zero_grad(set_to_none=True)
            with autocast(self.recipe.precision):
                loss = model(**batch).loss
            (loss if session is None else loss + session.auxiliary_loss()).backward()

        return trainer, batch, step

    def forecast(self, draft: VariantResult) -> VariantResult:
        """Say how long a variant's steps would take, without evaluations."""
        recipe = self.recipe
        num_batches = recipe.epochs * math.ceil(len(self.rows["train"]) / recipe.batch_size)
        if recipe.max_steps:
            num_batches = recipe.max_steps * recipe.gradient_accumulation_steps
        return replace(draft, train_seconds=num_batches * draft.step_ms / 1000)

    def train(self, draft: VariantResult, start_from: Path | None, past: int) -> VariantResult:
        """Train one variant, or go on with it; of the last one the model is kept.

        One whose result is there is not trained again, unless it has only the ``past`` steps.
        """
        recipe, folder = self.recipe, variant_folders(self.recipe)[draft.name]
        is_last = draft.name == list(self.variants)[-1]
        if recipe.resume and not is_last and (found := read_result(folder, past)) is not None:
            return found
        trainer, session = self.build(draft.name, folder, self.rows)
        stop = StopOnInterrupt()
        for last in (stop, StopOnNonFinite(), SealCheckpoints()):
            trainer.add_callback(last)
        peak = None
        if on_gpu(own_device()):
            torch.cuda.reset_peak_memory_stats()
        # Whatever was measured or converted before, training starts from the same random stream.
        transformers.set_seed(recipe.seed)
        start = time.perf_counter()
        with stop, writing(folder), _no_code_in(start_from):
            trainer.train(resume_from_checkpoint=None if start_from is None else str(start_from))
        seconds = time.perf_counter() - start
        if on_gpu(own_device()):
            peak = torch.cuda.max_memory_allocated()
        step = trainer.state.global_step
        # With early stopping the trainer has put the best weights back.
        best = trainer.state.best_global_step
        kept_step = best or step
        if not any(e["step"] == kept_step and "eval_loss" in e for e in trainer.state.log_history):
            trainer.evaluate()
        history = trainer.state.log_history
        evaluations = {e["step"]: self.metrics(e) for e in history if "eval_loss" in e}
        result = replace(
            draft,
            metrics=evaluations[kept_step],
            best_step=best,
            train_loss=[[e["step"], e["loss"]] for e in history if "loss" in e],
            evaluations=[[at, metrics] for at, metrics in sorted(evaluations.items())],
            fidelity=[
                {"step": e["step"], "sites": e["fidelity"]} for e in history if "fidelity" in e
            ],
            num_steps=step,
            train_seconds=seconds,
            peak_bytes=peak,
        )
        if not is_first_process():
            return result
        write_atomic(folder / RESULT_FILE, json.dumps(vars(result)) + "\n")
        if is_last:
            say(f"writing {recipe.output}")
            self._save(trainer.model, session, Path(recipe.output))
        return result

    def _save(self, model: Any, session: Session | None, output: Path) -> None:
        if self.use_cache is not None:
            model.config.use_cache = self.use_cache
        if session is not None:
            session.save(output / "session")
            if hasattr(model, "peft_config") and writes_plain(session.conversions):
                with atomic_folder(output / "adapter", "adapter") as fresh:
                    model.save_pretrained(fresh)
                    model.config.save_pretrained(fresh)
                    self.tokenizer.save_pretrained(fresh)
            if not session.can_merge:
                # No plain model computes the same: the session, or the adapter, goes onto the base.
                return
            session.merge()
        with atomic_folder(output / "model", "model") as fresh:
            model.save_pretrained(fresh)
            self.tokenizer.save_pretrained(fresh)

    def metrics(self, entry: Mapping[str, Any]) -> dict[str, float]:
        """Return the metrics of what a trainer's evaluation logs, with those that follow."""
        found = scores(entry)
        if self.task.main_metric == "perplexity":
            # Above e^700 the perplexity is no float any more.
            found["perplexity"] = math.exp(min(found["loss"], 700.0))
        if self.task.kind == "causal_lm":
            found["bits_per_byte"] = found["loss"] / math.log(2) * self._tokens_per_byte
        return found

    @cached_property
    def _tokens_per_byte(self) -> float:
        text = "\n".join(self.data["validation"]["text"])
        tokens: Any = self.tokenizer(text, add_special_tokens=False, verbose=False)
        return len(tokens["input_ids"]) / len(text.encode())

    def result(self, runs: tuple[VariantResult, ...]) -> RunResult:
        """Put the variants together with what they have in common."""
        train, validation = self.data["train"], self.data["validation"]
        return RunResult(
            versions={
                "leantune": __version__,
                "torch": torch.__version__,
                "transformers": transformers.__version__,
                "python": platform.python_version(),
            },
            device=torch.cuda.get_device_name()
            if on_gpu(own_device())
            else f"cpu ({torch.get_num_threads()} threads)",
            model=self.recipe.model,
            task=self.recipe.task,
            main_metric=self.task.main_metric,
            floor=None
            if self.task.is_language_model
            else floor_score(self.task, train["label"], validation["label"]),
            num_train=len(self.rows["train"]),
            num_validation=len(self.rows["validation"]),
            seed=self.recipe.seed,
            runs=runs,
            plan=self.plan,
            labels=self.labels,
        )


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
