"""What a run's config says, in the words of ``transformers.TrainingArguments``."""

import dataclasses
from pathlib import Path
from typing import Any

import torch
from transformers import TrainingArguments

from leantune.train.config import RunConfig


def training_arguments(config: RunConfig, name: str, folder: Path) -> TrainingArguments:
    """Return what the trainer of one variant is given.

    Args:
        config: of the run.
        name: of the variant.
        folder: for its checkpoints.
    """

    def every(steps: int | None) -> tuple[str, int]:
        return ("epoch", 500) if steps is None else ("steps", steps)

    constant = "constant_with_warmup" if config.warmup_ratio else "constant"
    names = {spec.name for spec in dataclasses.fields(TrainingArguments)}
    # The older name is deprecated since the newer one exists (transformers 5.23).
    checkpointing = next(
        n for n in ("activation_checkpointing", "gradient_checkpointing") if n in names
    )
    eval_strategy, eval_steps = every(config.eval_steps)
    save_strategy, save_steps = every(config.save_steps)
    options: dict[str, Any] = {checkpointing: config.gradient_checkpointing}
    return TrainingArguments(
        output_dir=str(folder),
        run_name=name,
        num_train_epochs=config.epochs,
        max_steps=-1 if config.max_steps is None else config.max_steps,
        per_device_train_batch_size=config.batch_size,
        per_device_eval_batch_size=config.eval_batch_size,
        gradient_accumulation_steps=config.gradient_accumulation_steps,
        learning_rate=config.learning_rate,
        weight_decay=config.weight_decay,
        warmup_steps=config.warmup_ratio,
        lr_scheduler_type=constant if config.schedule == "constant" else config.schedule,
        max_grad_norm=config.max_grad_norm,
        bf16=config.precision == "bf16",
        fp16=config.precision == "fp16",
        seed=config.seed,
        data_seed=config.seed,
        # A share of the run: about a hundred points of the loss curve.
        logging_steps=0.01,
        eval_strategy=eval_strategy,
        eval_steps=eval_steps,
        save_strategy=save_strategy,
        save_steps=save_steps,
        # The one before serves where the last was cut off by a crash.
        save_total_limit=2,
        remove_unused_columns=False,
        label_names=["labels"],
        include_num_input_tokens_seen="non_padding",
        dataloader_pin_memory=torch.cuda.is_available(),
        use_cpu=not torch.cuda.is_available(),
        report_to="none",
        disable_tqdm=True,
        **options,
    )
