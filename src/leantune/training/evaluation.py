"""A finished run's model, scored again or asked to predict, by the trainer that trained it."""

import math
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import datasets
import torch

from leantune.core.apply import load
from leantune.core.config import unknown_key
from leantune.core.disk import read_json
from leantune.core.files import SESSION
from leantune.core.recipe import RECIPE_FILE
from leantune.errors import ConfigError
from leantune.ops.backend import own_device
from leantune.training.answers import row_loss
from leantune.training.chat import check_prompts, encode_prompt
from leantune.training.data import check_rows, get_task, load_rows, tokenize
from leantune.training.experiment import Experiment
from leantune.training.models import load_model, load_tokenizer
from leantune.training.progress import say
from leantune.training.recipe import BASELINE, RunRecipe
from leantune.training.results import RunResult
from leantune.training.tables import as_text, checked, read_columns
from leantune.training.trainers import make_trainer, training_arguments
from leantune.training.weights import freeze, quantise

MODEL = "model"
MAY_DIFFER = ("data", "eval_batch_size", "score_answers")
"""The options of a run that an evaluation may have its own of."""


def evaluate(run: str | Path, **options: Any) -> dict[str, Any]:
    """Score a finished run's model by the metrics of its training, with the run's trainer.

    Args:
        run: the run's folder.
        options: those of ``MAY_DIFFER``. Of other ``data`` every row of a file counts, or the
            validation split of a folder or hub data set; without it the run's own split does.

    Returns:
        ``data``, ``num_rows`` and ``metrics``.

    Raises:
        ConfigError: the run is not a finished one, its model or the data cannot be read, or an
            option is another.
    """
    for name in options:
        if name not in MAY_DIFFER:
            raise ConfigError(unknown_key("evaluate", "option", name, MAY_DIFFER))
    run = Path(run).expanduser()
    recipe, labels, quantize = _read_run(run)
    recipe = RunRecipe.read(recipe, options)
    both, task = None, get_task(recipe.task)
    if task.kind == "preference":
        raise ConfigError(
            "evaluate: task must be another than preference, got a run whose scores need what the "
            "model said before its training; metrics.json has them"
        )
    if "data" in options:
        rows = load_rows(task, recipe.data, labels)
        both = datasets.DatasetDict({"train": rows, "validation": rows})
    experiment = Experiment(recipe, data=both)
    with tempfile.TemporaryDirectory() as folder:
        trainer, _ = experiment.build(BASELINE, Path(folder), experiment.rows)
        _restore(trainer.model, run, recipe, quantize)
        trainer.evaluate()
    metrics = experiment.metrics(trainer.state.log_history[-1])
    num_rows = len(experiment.rows["validation"])
    return {"data": recipe.data, "num_rows": num_rows, "metrics": metrics}


def predict(
    run: str | Path, data: str | Path, *, max_new_tokens: int = 256
) -> list[dict[str, Any]]:
    """Ask a finished run's model what it makes of each row of a file.

    Args:
        run: the run's folder.
        data: a file in a format of the training data; its rows need no labels and no answers.
        max_new_tokens: where an answer ends at the latest.

    Returns:
        For each row in order: ``label`` and its ``probability``; the ``value`` of a regression; of
        a text its ``loss`` and ``bits_per_byte``, None where it has fewer than two tokens; of a
        chat the ``answer``, each token the likeliest.

    Raises:
        ConfigError: the run is not a finished one, or its model or the file cannot be read.
    """
    run, path = Path(run).expanduser(), Path(data).expanduser()
    recipe, labels, quantize = _read_run(run)
    recipe = replace(recipe, packing=False)
    task, columns = get_task(recipe.task), read_columns(path)
    tokenizer = load_tokenizer(recipe.model, trust_remote_code=recipe.trust_remote_code)
    how = {name: getattr(recipe, name) for name in ("seed", "dtype", "trust_remote_code")}
    model = load_model(recipe.model, task, labels, tokenizer, **how)
    # On the device first: the session's counters live where the weights are.
    model.to(own_device())
    _restore(model, run, recipe, quantize)
    if task.kind == "causal_lm":
        texts = checked(columns, "text", str(path), "text", as_text)
        return _losses(recipe, model, tokenizer, texts)
    if task.is_language_model:
        prompts = [encode_prompt(asked, tokenizer) for asked in check_prompts(columns, str(path))]
        return _answers(model, tokenizer, prompts, recipe.eval_batch_size, max_new_tokens)
    unknown = [labels[0] if labels else 0] * len(next(iter(columns.values())))
    rows = check_rows(task, {**columns, "label": unknown}, str(path), labels)
    both = datasets.DatasetDict({"train": rows.select([0]), "validation": rows})
    tokens = tokenize(both, tokenizer, recipe.max_length)["validation"]
    logits = torch.from_numpy(_outputs(recipe, model, tokenizer, tokens))
    if not labels:
        return [{"value": value} for value in logits.view(-1).tolist()]
    best = logits.float().softmax(-1).max(-1)
    return [
        {"label": labels[index], "probability": share}
        for index, share in zip(best.indices.tolist(), best.values.tolist(), strict=True)
    ]


def _read_run(run: Path) -> tuple[RunRecipe, list[str] | None, str | None]:
    """Return what loads and scores a finished run's model, its classes, and how to quantise it."""
    labels = RunResult.read(run).labels
    recipe = RunRecipe.from_dict(read_json(run / RECIPE_FILE))
    plain = {"model": str(run / MODEL)} if (run / MODEL).is_dir() else {}
    quantize, how = recipe.quantize, {"methods": (), "compare": (), "quantize": None}
    return replace(recipe, **how, **plain), labels, quantize


def _restore(model: Any, run: Path, recipe: RunRecipe, quantize: str | None) -> None:
    """Put what was trained onto the base, where no plain model was loaded."""
    if recipe.model != str(run / MODEL):
        freeze(model, recipe.freeze)
        if quantize:
            quantise(model, quantize)
        load(model, run / SESSION)


def _outputs(
    recipe: RunRecipe, model: Any, tokenizer: Any, rows: datasets.Dataset, reduce: Any = None
) -> Any:
    """Return what the model says of each row of tokens, or what ``reduce`` makes of its logits."""
    with tempfile.TemporaryDirectory() as folder:
        args = training_arguments(recipe, BASELINE, Path(folder))
        splits = {"train": rows, "validation": rows}
        task = get_task(recipe.task)
        trainer = make_trainer(task, model, args, splits, tokenizer, (), needs_ids=False)
        trainer.compute_metrics, trainer.preprocess_logits_for_metrics = None, reduce
        outputs = trainer.predict(rows).predictions  # type: ignore[arg-type]
    return outputs[0] if isinstance(outputs, tuple) else outputs


def _losses(
    recipe: RunRecipe, model: Any, tokenizer: Any, texts: Sequence[str]
) -> list[dict[str, Any]]:
    ids = tokenizer(list(texts), add_special_tokens=False, verbose=False)["input_ids"]
    num_long = sum(len(row) > recipe.max_length for row in ids)
    if num_long:
        say(
            f"{num_long} of {len(ids)} rows are longer than max_length = {recipe.max_length} "
            f"(up to {max(map(len, ids))} tokens); what comes behind does not count"
        )
    cut = {at: row[: recipe.max_length] for at, row in enumerate(ids) if len(row) > 1}
    found: list[dict[str, Any]] = [{"loss": None, "bits_per_byte": None} for _ in ids]
    if cut:
        rows = datasets.Dataset.from_dict({n: [*cut.values()] for n in ("input_ids", "labels")})
        sums = _outputs(recipe, model, tokenizer, rows, row_loss)
        for (at, row), total in zip(cut.items(), sums.tolist(), strict=True):
            loss = total / (len(row) - 1)
            bits = loss / math.log(2) * len(ids[at]) / len(texts[at].encode())
            found[at] = {"loss": loss, "bits_per_byte": bits}
    return found


@torch.no_grad()
def _answers(
    model: Any, tokenizer: Any, prompts: Sequence[list[int]], size: int, max_new_tokens: int
) -> list[dict[str, Any]]:
    longest = max(map(len, prompts)) + max_new_tokens
    most = getattr(model.config, "max_position_embeddings", longest)
    if longest > most:
        row = max(range(len(prompts)), key=lambda at: len(prompts[at]))
        raise ConfigError(
            f"predict: max_new_tokens must be at most {most - len(prompts[row])} behind the "
            f"{len(prompts[row])} tokens of row {row + 1}, got {max_new_tokens}; the model reads "
            f"{most}"
        )
    model.eval()
    found: list[dict[str, Any]] = []
    for at in range(0, len(prompts), size):
        part = {"input_ids": prompts[at : at + size]}
        # Answers begin where all of a batch's questions end.
        batch = tokenizer.pad(part, padding_side="left", return_tensors="pt").to(model.device)
        ids = model.generate(**batch, max_new_tokens=max_new_tokens, do_sample=False)
        new = ids[:, batch["input_ids"].shape[1] :]
        texts = tokenizer.batch_decode(new, skip_special_tokens=True)
        found += [{"answer": text.strip()} for text in texts]
        say(f"{len(found)} of {len(prompts)} rows answered")
    return found
