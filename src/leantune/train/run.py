"""One training run: from a recipe to a folder with the model, its figures and its checkpoints."""

import gc
import importlib.metadata
import json
import math
import platform
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from leantune.core.apply import apply
from leantune.core.session import Session
from leantune.core.state import atomic_folder, write_atomic
from leantune.errors import ConfigError
from leantune.measure.ledger import ledger
from leantune.measure.peak import StepStats, compare_steps
from leantune.train.config import RunConfig
from leantune.train.results import RunResult, VariantResult
from leantune.train.run_folder import (
    METRICS_FILE,
    RESULT_FILE,
    check_folder,
    last_checkpoint,
    make_folder,
)

__all__ = ["RunConfig", "RunResult", "VariantResult", "run"]

if TYPE_CHECKING:
    import datasets
    from transformers import PreTrainedTokenizerBase, Trainer, TrainerCallback

    from leantune.train.data import TaskData

EXACT = "exact"
MEASURED_ROUNDS = 5


def run(config: RunConfig, *, callbacks: Sequence["TrainerCallback"] = ()) -> RunResult:
    """Train what ``config`` says with an unmodified ``transformers.Trainer``, and write its folder.

    Everything that can be wrong with the input is found before the folder is touched. On Ctrl-C the
    step in progress is finished and a checkpoint kept; ``resume=True`` then ends with the weights
    of an uninterrupted run.

    Args:
        config: what to run.
        callbacks: go to the trainer of every variant; ``args.run_name`` tells which one.

    Raises:
        ConfigError: an option, the data, the model or the run folder is not acceptable.
        KeyboardInterrupt: Ctrl-C was pressed.
    """
    output = Path(config.output)
    check_folder(config, output)
    _check_device(config)
    if config.resume and (output / METRICS_FILE).is_file():
        return RunResult.from_dict(json.loads((output / METRICS_FILE).read_text("utf-8")))
    workshop = _Workshop(config, tuple(callbacks))
    names = [EXACT] if config.compare or not config.methods else []
    if config.methods:
        names.append("+".join(m.method for m in config.methods))
    folders = {name: output / "checkpoints" for name in names}
    if config.compare:
        folders[EXACT] = output / "checkpoints-exact"
    measured = workshop.measure(names)
    make_folder(config, output)
    done = [workshop.train(name, folders[name], measured[name], names[-1]) for name in names]
    result = workshop.result(done)
    write_atomic(output / METRICS_FILE, json.dumps(result.to_dict(), indent=1) + "\n")
    return result


@dataclass(frozen=True)
class _Measured:
    """What was measured before training."""

    ledger: dict[str, Any]
    stats: StepStats


class _Workshop:
    """A run's data and tokenizer, and what is made of them: models, trainers, results."""

    def __init__(self, config: RunConfig, callbacks: tuple["TrainerCallback", ...]) -> None:
        from leantune.train.data import tokenize
        from leantune.train.models import load_tokenizer

        self.config = config
        self.callbacks = callbacks
        self.use_cache: bool | None = None
        self.data = _load_data(config)
        self.tokenizer: PreTrainedTokenizerBase = load_tokenizer(config.model)
        self.train_rows, self.validation_rows = tokenize(
            self.data, self.tokenizer, config.max_length
        )

    def build(self, name: str, folder: Path) -> tuple["Trainer", Session | None]:
        """Load the model anew, convert it unless it is the exact one, and make its trainer."""
        import transformers

        from leantune.train.arguments import training_arguments
        from leantune.train.metrics import compute_metrics_fn
        from leantune.train.models import load_model
        from leantune.train.sample_ids import with_sample_ids

        config = self.config
        model, _ = load_model(config.model, self.data, seed=config.seed)
        _check_length(config, model)
        # The trainer switches it off; the saved model should generate as the loaded one did.
        self.use_cache = getattr(model.config, "use_cache", None)
        session = None
        if name != EXACT:
            # On the device first: the session's counters live where the weights are.
            model.to("cuda" if torch.cuda.is_available() else "cpu")  # type: ignore[arg-type]
            session = apply(model, *config.methods, seed=config.seed)
        rows: datasets.Dataset = self.train_rows
        if session is not None and session.needs_sample_ids:
            rows = with_sample_ids(rows)
        is_language_model = self.data.task.kind == "causal_lm"
        trainer = transformers.Trainer(
            model,
            training_arguments(config, name, folder),
            # Blocks of a language model are of equal length: nothing to pad.
            data_collator=transformers.default_data_collator
            if is_language_model
            else transformers.DataCollatorWithPadding(self.tokenizer),
            train_dataset=rows,
            eval_dataset=self.validation_rows,
            compute_metrics=compute_metrics_fn(self.data.task),
            callbacks=[
                *([session.trainer_callback()] if session is not None else []),
                *self.callbacks,
            ],
        )
        trainer.remove_callback(transformers.PrinterCallback)
        return trainer, session

    def measure(self, names: Sequence[str]) -> dict[str, _Measured]:
        """Measure bytes and time of a step on the first batch, all variants in one run."""
        ledgers: dict[str, dict[str, Any]] = {}
        steps: dict[str, _Step] = {}
        for name in names:
            steps[name] = step = self._first_step(name)
            with step.autocast():
                ledgers[name] = ledger(step.model, step.batch).to_dict()
        stats = compare_steps(steps, reference=names[0], rounds=MEASURED_ROUNDS)
        # A trainer is full of cycles; its model would count towards the peak of the training.
        del step, steps
        gc.collect()
        return {name: _Measured(ledgers[name], stats[name]) for name in names}

    def _first_step(self, name: str) -> "_Step":
        """Make the step that training of the same seed begins with."""
        # A trainer makes its folder at once; the run's own is not to be touched yet.
        with tempfile.TemporaryDirectory() as folder:
            trainer, session = self.build(name, Path(folder))
        batch = dict(next(iter(trainer.get_train_dataloader())))
        model: Any = trainer.model
        if session is not None:
            # What is measured here is thrown away; training calibrates on more than one batch.
            session.calibrate([batch])
        if self.config.gradient_checkpointing:
            newer = getattr(model, "activation_checkpointing_enable", None)
            (newer or model.gradient_checkpointing_enable)()
        return _Step(model, session, batch, self.config.precision)

    def train(self, name: str, folder: Path, measured: _Measured, last: str) -> VariantResult:
        """Train one variant, or go on with it; of the last one the model is kept."""
        import transformers

        from leantune.train.callback import StopOnInterrupt, Stopwatch
        from leantune.train.figures import FiguresCallback

        kept = folder / RESULT_FILE
        if self.config.resume and name != last and kept.is_file():
            return VariantResult(**json.loads(kept.read_text("utf-8")))
        trainer, session = self.build(name, folder)
        stop, stopwatch = StopOnInterrupt(), Stopwatch()
        trainer.add_callback(stop)
        trainer.add_callback(stopwatch)
        figures = FiguresCallback(session, self.validation_rows)
        trainer.add_callback(figures)
        checkpoint = last_checkpoint(folder, session is not None) if self.config.resume else None
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
        # Whatever was measured or converted before, training starts from the same random stream.
        transformers.set_seed(self.config.seed)
        with stop:
            trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
        peak = None
        if torch.cuda.is_available():
            peak = max(figures.peak_bytes, torch.cuda.max_memory_allocated())
        result = self._variant(name, trainer, measured, stopwatch.seconds, peak)
        result = replace(result, figures=figures.figures)
        write_atomic(kept, json.dumps(vars(result)) + "\n")
        if name == last:
            self._save(trainer.model, session)
        return result

    def _save(self, model: Any, session: Session | None) -> None:
        output = Path(self.config.output)
        if self.use_cache is not None:
            model.config.use_cache = self.use_cache
        if session is not None:
            session.save(output / "session")
            if hasattr(model, "peft_config"):
                with atomic_folder(output / "adapter") as fresh:
                    model.save_pretrained(fresh)
            if not session.can_merge:
                # No plain model computes the same: `leantune.load` puts the session onto the base.
                return
            session.merge()
        with atomic_folder(output / "model") as fresh:
            model.save_pretrained(fresh)
            self.tokenizer.save_pretrained(fresh)

    def _variant(
        self,
        name: str,
        trainer: "Trainer",
        measured: _Measured,
        seconds: float,
        peak_bytes: int | None,
    ) -> VariantResult:
        config, stats = self.config, measured.stats
        step = trainer.state.global_step
        if not any(e["step"] == step and "eval_loss" in e for e in trainer.state.log_history):
            trainer.evaluate()
        history = trainer.state.log_history
        evaluations = {e["step"]: self._metrics(e) for e in history if "eval_loss" in e}
        losses = {e["step"]: e["loss"] for e in history if "loss" in e}
        is_compared = config.compare is not None
        return VariantResult(
            name=name,
            methods=[] if name == EXACT else [m.to_dict() for m in config.methods],
            seed=config.seed,
            metrics=evaluations[step],
            train_loss=[[at, loss] for at, loss in sorted(losses.items())],
            evaluations=[[at, metrics] for at, metrics in sorted(evaluations.items())],
            num_steps=step,
            train_seconds=seconds,
            tokens_per_second=trainer.state.num_input_tokens_seen / seconds,
            saved_bytes=measured.ledger["activations"],
            peak_bytes=peak_bytes,
            step_ms=stats.median_ms,
            step_time_ratio=stats.ratio if is_compared else None,
            step_time_ratio_spread=[stats.ratio_p20, stats.ratio_p80] if is_compared else None,
            ledger=measured.ledger,
        )

    def _metrics(self, entry: Mapping[str, Any]) -> dict[str, float]:
        timing = ("runtime", "samples_per_second", "steps_per_second")
        found = {
            key.removeprefix("eval_"): float(value)
            for key, value in entry.items()
            if key.startswith("eval_") and key.removeprefix("eval_") not in timing
        }
        if self.data.task.kind == "causal_lm":
            loss = found["loss"]
            # Above e^700 the perplexity is no float any more.
            found["perplexity"] = math.exp(min(loss, 700.0))
            found["bits_per_byte"] = loss / math.log(2) * self._tokens_per_byte()
        return found

    def _tokens_per_byte(self) -> float:
        text = "\n".join(self.data.validation["text"])
        tokens: Any = self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        return len(tokens) / len(text.encode())

    def result(self, runs: Sequence[VariantResult]) -> RunResult:
        """Put the variants together with what they have in common."""
        import transformers

        task = self.data.task
        return RunResult(
            leantune=importlib.metadata.version("leantune"),
            versions={
                "torch": torch.__version__,
                "transformers": transformers.__version__,
                "python": platform.python_version(),
            },
            device=_device_name(),
            model=self.config.model,
            task=self.config.task,
            main_metric=task.main_metric,
            baseline=_baseline(self.data),
            num_train=len(self.train_rows),
            num_validation=len(self.validation_rows),
            runs=tuple(runs),
        )


@dataclass
class _Step:
    """Forward and backward of a model on one batch."""

    model: Any
    session: Session | None
    batch: dict[str, Any]
    precision: str

    def autocast(self) -> torch.autocast:
        dtype = torch.float16 if self.precision == "fp16" else torch.bfloat16
        device = next(self.model.parameters()).device.type
        return torch.autocast(device, dtype=dtype, enabled=self.precision != "float32")

    def __call__(self) -> None:
        self.model.train()
        self.model.zero_grad(set_to_none=True)
        with self.autocast():
            loss = self.model(**self.batch).loss
        if self.session is not None:
            loss = loss + self.session.auxiliary_loss()
        loss.backward()


def _load_data(config: RunConfig) -> "TaskData":
    if config.task == "demo":
        from leantune.train.demo import demo_data

        given = {"num_train": config.max_train, "num_validation": config.max_validation}
        return demo_data(**{key: value for key, value in given.items() if value is not None})
    from leantune.train.data import load_task

    assert config.data is not None
    # The subset does not depend on the seed: runs of several seeds share their data.
    return load_task(
        config.task,
        config.data,
        max_train=config.max_train,
        max_validation=config.max_validation,
    )


def _check_device(config: RunConfig) -> None:
    if config.precision == "fp16" and not torch.cuda.is_available():
        raise ConfigError(
            "RunConfig: precision must be 'float32' or 'bf16' without an NVIDIA GPU, got 'fp16'; "
            "float16 needs one"
        )
    on_gpu = torch.cuda.is_available()
    if config.precision == "bf16" and on_gpu and not torch.cuda.is_bf16_supported(False):
        raise ConfigError(
            "RunConfig: precision must be 'float32' or 'fp16' on this GPU, got 'bf16', which it "
            "does not compute"
        )


def _check_length(config: RunConfig, model: Any) -> None:
    longest = getattr(model.config, "max_position_embeddings", None)
    if longest is not None and config.max_length > longest:
        raise ConfigError(
            f"RunConfig: max_length must be at most {longest} for this model, got "
            f"{config.max_length}; shorten it"
        )


def _baseline(data: "TaskData") -> dict[str, Any] | None:
    from leantune.train.metrics import majority_scores

    task = data.task
    if task.kind == "causal_lm":
        return None
    scores = majority_scores(task, data.train["label"], data.validation["label"])
    name = "mean" if task.kind == "regression" else "majority"
    return {"name": name, "value": scores[task.main_metric]}


def _device_name() -> str:
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    return f"cpu ({torch.get_num_threads()} threads)"
