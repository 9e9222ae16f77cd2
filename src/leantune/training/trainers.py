"""The unmodified trainer of a run, transformers' or TRL's, and what it is given."""

import dataclasses
import difflib
import tempfile
import typing
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import datasets
import torch
import transformers
from huggingface_hub.dataclasses import type_validator

from leantune.core.conversion import SAMPLE_ID
from leantune.errors import ConfigError, shown
from leantune.ops.backend import on_gpu, own_device
from leantune.training.data import Task, get_task
from leantune.training.metrics import metrics_of_logits
from leantune.training.preference import make_pairs_trainer
from leantune.training.progress import has_screen
from leantune.training.recipe import RunRecipe


def make_trainer(
    task: Task,
    model: Any,
    args: transformers.TrainingArguments,
    rows: Mapping[str, datasets.Dataset],
    tokenizer: Any,
    callbacks: Sequence[transformers.TrainerCallback],
    *,
    needs_ids: bool,
    reference: Any = None,
) -> transformers.Trainer:
    """Make the trainer of one variant.

    Args:
        args: what ``training_arguments`` returned.
        rows: tokens of both splits.
        needs_ids: whether a method must know which sample is which.
        reference: of preferences: the plain model.

    Raises:
        ConfigError: it must, and the rows are packed or pairs, so that none is a sample.
    """
    if needs_ids and (task.kind == "preference" or getattr(args, "packing", False)):
        what = "task must be another" if task.kind == "preference" else "packing must be False"
        raise ConfigError(
            f"RunRecipe: {what} where a method needs to know each sample, got a row of several; "
            "leave it out, or norms='cache'"
        )
    train_rows = rows["train"]
    if needs_ids:
        train_rows = train_rows.add_column(SAMPLE_ID, list(range(len(train_rows))))  # type: ignore[call-arg]
    same: dict[str, Any] = {
        "args": args,
        "train_dataset": train_rows,
        "eval_dataset": rows["validation"],
        "callbacks": [*callbacks],
    }
    if task.kind == "preference":
        return make_pairs_trainer(model, reference, processing_class=tokenizer, **same)
    if type(args) is not transformers.TrainingArguments:
        from trl.trainer.sft_trainer import SFTTrainer

        trainer: Any = SFTTrainer(model, processing_class=tokenizer, **same)
        if needs_ids:
            trainer.data_collator = _with_ids(trainer.data_collator)
        return trainer
    trainer = transformers.Trainer(
        model,
        data_collator=collator(task, tokenizer),
        compute_metrics=metrics_of_logits(task),
        **same,
    )
    # A head's loss is the mean over the batch, whatever keywords its model takes; where it is
    # taken for a share of the step's, it counts once more per process and micro-batch.
    trainer.model_accepts_loss_kwargs &= task.is_language_model
    return trainer


def collator(task: Task, tokenizer: Any) -> Any:
    """Return what pads rows of tokens to a batch, their labels too where each token has one."""
    if task.is_language_model:
        return transformers.DataCollatorForSeq2Seq(tokenizer)
    return transformers.DataCollatorWithPadding(tokenizer)


def _with_ids(collate: Any) -> Any:
    """Let TRL's collator, which picks what it knows, pass on which sample is which."""

    def collate_with_ids(rows: list[dict[str, Any]]) -> dict[str, Any]:
        batch = collate(rows)
        if SAMPLE_ID in rows[0]:
            batch[SAMPLE_ID] = torch.tensor([row[SAMPLE_ID] for row in rows])
        return batch

    return collate_with_ids


class _SeenError(Exception):
    """Ends a step when its model is called."""


def first_inputs(trainer: transformers.Trainer) -> dict[str, Any]:
    """Return what the trainer calls its model with for the first batch; the model does not run.

    TRL's adds words of its own, which change what is kept for backward.
    """
    seen: dict[str, Any] = {}
    model: Any = trainer.model

    def look(*call: Any) -> None:
        seen.update(call[-1])
        raise _SeenError

    hook = model.register_forward_pre_hook(look, with_kwargs=True, prepend=True)
    with suppress(_SeenError):
        trainer.compute_loss(model, dict(next(iter(trainer.get_train_dataloader()))))
    hook.remove()
    # TRL 1.0 gives none with pairs.
    seen.setdefault("labels", seen["input_ids"])
    return seen


def autocast(precision: str) -> torch.autocast:
    """Return the context that a trainer of this precision computes in."""
    dtype = torch.float16 if precision == "fp16" else torch.bfloat16
    return torch.autocast(own_device().type, dtype=dtype, enabled=precision != "float32")


def checkpoint_blocks(model: Any) -> None:
    """Let a transformers model recompute its blocks in backward."""
    # The older name is deprecated since the newer one exists (transformers 5.23).
    newer = getattr(model, "activation_checkpointing_enable", None)
    (newer or model.gradient_checkpointing_enable)()


_RESTORE = "restore_callback_states_from_checkpoint"
_DECIDED = {
    "output": "output_dir run_name push_to_hub",
    "epochs": "num_train_epochs",
    "batch_size": "per_device_train_batch_size auto_find_batch_size",
    "eval_batch_size": "per_device_eval_batch_size",
    "warmup_ratio": "warmup_steps",
    "precision": "bf16 fp16 bf16_full_eval fp16_full_eval",
    "gradient_checkpointing": "activation_checkpointing",
    "seed": "data_seed full_determinism",
    "eval_steps": "eval_strategy eval_delay eval_on_start",
    "save_steps": "save_strategy save_total_limit save_only_model",
    "early_stopping_patience": "load_best_model_at_end metric_for_best_model greater_is_better",
    "resume": f"resume_from_checkpoint ignore_data_skip {_RESTORE}",
    "data": "dataset_text_field dataset_kwargs dataset_num_proc truncation_mode shuffle_dataset "
    "completion_only_loss assistant_only_loss",
    "packing": "packing_strategy padding_free eval_packing",
    "model": "model_init_kwargs chat_template_path eos_token pad_token",
    "task": "precompute_ref_log_probs precompute_ref_batch_size sync_ref_model",
    # The rest is none's: the loss is the model's own, each row is evaluated, and batches are whole.
    "": "label_names label_smoothing_factor remove_unused_columns use_cpu do_train do_eval "
    "do_predict prediction_loss_only batch_eval_metrics eval_do_concat_batches include_for_metrics "
    "logging_nan_inf_filter",
}
"""Option of a recipe -> the arguments of a trainer that it decides under another name."""


def check_trainer(recipe: RunRecipe) -> None:
    """Let a trainer of one weight take the recipe's arguments, before anything is loaded for them.

    Raises:
        ConfigError: ``trainer`` has a name or a value that is not acceptable.
    """
    if not recipe.trainer:
        return
    try:
        with tempfile.TemporaryDirectory() as folder:
            arguments = training_arguments(recipe, "", Path(folder))
            rows: Any = [{}]
            trainer = transformers.Trainer(
                torch.nn.Linear(1, 1), arguments, train_dataset=rows, eval_dataset=rows
            )
            trainer.get_train_dataloader()
            trainer.create_optimizer_and_scheduler(num_training_steps=10)
    except ConfigError:
        raise
    # The library's checks raise what they like, and so does a package that is missing.
    except Exception as error:
        raise ConfigError(
            f"RunRecipe: trainer must hold what transformers accepts, got {shown(recipe.trainer)} "
            f"({type(error).__name__}: {' '.join(str(error).split())}); correct it"
        ) from error


def _given_arguments(recipe: RunRecipe, kind: Any) -> dict[str, Any]:
    """Return ``trainer`` as arguments of a class, each of its type and none decided elsewhere."""
    hints = typing.get_type_hints(kind)
    decided = {name: option for option, names in _DECIDED.items() for name in names.split()}
    decided |= {name: name for name in hints if hasattr(recipe, name)}
    if recipe.schedule != "linear":
        decided["lr_scheduler_type"] = "schedule"
    given: dict[str, Any] = {}
    for name, value in recipe.trainer.items():
        if name in decided:
            raise ConfigError(
                f"RunRecipe: trainer must leave {name} to the run, got {shown(value)}; "
                + (f"set the recipe's {decided[name]}" if decided[name] else "leave it out")
            )
        if name not in hints:
            near = difflib.get_close_matches(name, hints, n=1) or ["none"]
            raise ConfigError(
                f"RunRecipe: trainer must hold names of {kind.__name__}, got {name!r}; the nearest "
                f"is {near[0]}"
            )
        accepted = {hints[name], *typing.get_args(hints[name])}
        # YAML reads 1e-8 as text.
        if float in accepted and type(value) in {int, str} - accepted:
            with suppress(ValueError):
                value = float(value)
        try:
            type_validator(name, value, hints[name])
        except TypeError as error:
            what = getattr(hints[name], "__name__", hints[name])
            raise ConfigError(
                f"RunRecipe: trainer.{name} must be {what}, got {shown(value)}; correct it"
            ) from error
        given[name] = value
    return given


def _best_options(task: Task) -> dict[str, Any]:
    """Return what makes a trainer keep the best weights, and count on when it is resumed."""
    # A perplexity is made of the loss later.
    metric = "loss" if task.is_language_model else task.main_metric
    options = {"metric_for_best_model": metric, "greater_is_better": metric != "loss"}
    return options | dict.fromkeys(("load_best_model_at_end", _RESTORE), True)


def _kind_of_arguments(recipe: RunRecipe, task: Task) -> tuple[Any, dict[str, Any]]:
    """Return the class of a trainer's arguments, and those that no other class has."""
    if task.kind == "preference":
        from trl.trainer.dpo_config import DPOConfig

        options = {"max_length": recipe.max_length, "precompute_ref_log_probs": True}
        return DPOConfig, options | {"precompute_ref_batch_size": recipe.eval_batch_size}
    if recipe.packing or task.kind == "chat":
        from trl.trainer.sft_config import SFTConfig

        # Rows are tokens already, none too long, with the answers as labels.
        options = {"max_length": None, "dataset_kwargs": {"skip_prepare_dataset": True}}
        return SFTConfig, options | {"packing": recipe.packing}
    return transformers.TrainingArguments, {}


def training_arguments(
    recipe: RunRecipe, name: str, folder: Path
) -> transformers.TrainingArguments:
    """Return a recipe's options in the words of transformers, or of TRL for chats and pairs.

    Raises:
        ConfigError: ``trainer`` has a name that is not acceptable, or a value of another type.
    """
    task = get_task(recipe.task)
    arguments, options = _kind_of_arguments(recipe, task)
    fields = {spec.name for spec in dataclasses.fields(arguments)}
    newer = "activation_checkpointing"
    constant = "constant_with_warmup" if recipe.warmup_ratio else "constant"
    checkpointing = newer if newer in fields else "gradient_checkpointing"
    options[checkpointing] = recipe.gradient_checkpointing
    save_steps = recipe.save_steps
    if recipe.early_stopping_patience:
        save_steps = recipe.eval_steps
        options |= _best_options(task)
    for event, steps in (("eval", recipe.eval_steps), ("save", save_steps)):
        options[f"{event}_strategy"] = "steps" if steps else "epoch"
        options[f"{event}_steps"] = steps or 500
    same = ("gradient_accumulation_steps", "learning_rate", "weight_decay", "max_grad_norm", "seed")
    has_gpu = on_gpu(own_device())
    usual = {
        "lr_scheduler_type": constant if recipe.schedule == "constant" else recipe.schedule,
        # A share of the run: 25 points of the loss curve, and as many lines of the log.
        "logging_steps": 0.04,
        "dataloader_pin_memory": has_gpu,
        "report_to": "none",
        "disable_tqdm": not has_screen(),
    }
    return arguments(
        output_dir=str(folder),
        run_name=name,
        num_train_epochs=recipe.epochs,
        max_steps=recipe.max_steps or -1,
        per_device_train_batch_size=recipe.batch_size,
        per_device_eval_batch_size=recipe.eval_batch_size,
        warmup_steps=recipe.warmup_ratio,
        bf16=recipe.precision == "bf16",
        fp16=recipe.precision == "fp16",
        data_seed=recipe.seed,
        # A loss that is NaN would be logged as the mean of those before.
        logging_nan_inf_filter=False,
        remove_unused_columns=False,
        label_names=["labels"],
        use_cpu=not has_gpu,
        **{option: getattr(recipe, option) for option in same},
        **options,
        **usual | _given_arguments(recipe, arguments),
    )
