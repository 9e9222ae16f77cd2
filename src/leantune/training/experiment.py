"""A run's experiment: its data and tokenizer, and what is made of them anew for each variant."""

import math
import platform
from collections.abc import Mapping, Sequence
from copy import deepcopy
from functools import cached_property
from pathlib import Path
from typing import Any

import datasets
import torch
import transformers

from leantune._version import __version__
from leantune.core.apply import apply
from leantune.core.session import Session
from leantune.integrations.trainer import TrainerCallback
from leantune.ops.backend import on_gpu, own_device
from leantune.training.answers import ScoreAnswers
from leantune.training.data import check_ids, get_task, load_task, tokenize
from leantune.training.metrics import floor_score
from leantune.training.models import load_model, load_tokenizer
from leantune.training.packing import check_segments
from leantune.training.progress import ProgressLines, has_screen, say, scores
from leantune.training.recipe import RunRecipe
from leantune.training.results import RunResult, VariantResult
from leantune.training.trainers import make_trainer, training_arguments
from leantune.training.weights import check_frozen, freeze, quantise, train_factors_in_full


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
