"""What every quality bench shares: MiniLM on GLUE tasks, same seeds and steps for all recipes.

Embeddings are frozen in every recipe, which spares most of the optimiser's time on a CPU; the
encoder and the head train in full, or as the recipe says. The pooler counts as part of the head:
this checkpoint was trained without it, so that LoRA, which freezes it, could not use it as it is.
"""

import random
import re
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice, product
from statistics import fmean, stdev
from typing import Any, Literal

import datasets
import numpy as np
import torch
from torch import Tensor

import leantune as lt
from bench import rivals, rows
from bench.models import collate, glue, minilm, minilm_weights
from leantune.core.config import MethodConfig
from leantune.training.data import get_task
from leantune.training.metrics import compute

Recipe = tuple[MethodConfig, ...]
NO_ROWS = "Not measured yet."
HEADS = {"sst2": "SST-2 accuracy", "cola": "CoLA Matthews", "stsb": "STS-B Pearson"}


@dataclass(frozen=True)
class Setting:
    """One task's fixed subset and schedule; every recipe and seed gets the same."""

    task: str
    num_train: int
    num_epochs: int
    batch_size: int = 32
    learning_rate: float = 1e-4
    lora_learning_rate: float = 1e-3
    max_length: int = 128
    pooling: Literal["first", "mean"] = "first"


@dataclass(frozen=True)
class Run:
    """One training run: a task, a recipe, a seed and a learning rate."""

    setting: Setting
    name: str
    recipe: Recipe
    seed: int
    rate: float
    num_calibration: int = 0
    is_rest_trained: bool = False
    """Whether LoRA leaves everything but the weights it adapts trainable, as other methods do."""
    frozen: str | None = None
    """A regular expression; parameters in whose names it is found do not train."""
    rival: str | None = None
    """One of :mod:`bench.rivals` and its rank, such as "GaLore 8"; the recipe is empty then."""
    matrices: str = ""
    """A regular expression; the rival acts on parameters in whose names it is found."""

    @property
    def rival_rank(self) -> int:
        """The number at the end of ``rival``."""
        return int((self.rival or "").rpartition(" ")[2])


def by_cost(settings: Sequence[Setting]) -> list[Setting]:
    """Return the settings, those with the fewest steps first."""
    return sorted(settings, key=lambda s: s.num_epochs * s.num_train // s.batch_size)


def fixed_rate(setting: Setting, recipe: Recipe) -> float:
    """Return the setting's learning rate, or that for LoRA."""
    uses_lora = any(isinstance(m, lt.LoRA) for m in recipe)
    return setting.lora_learning_rate if uses_lora else setting.learning_rate


def measure_missing(
    result: str,
    settings: Sequence[Setting],
    recipes: Mapping[str, Recipe],
    seeds: Sequence[int],
    worker: int = 0,
    num_workers: int = 1,
    num_calibration: int = 0,
) -> None:
    """Measure every row that is not there yet, seed by seed, the cheap tasks first.

    Several workers, each with its own threads, may share the work: each takes every
    ``num_workers``-th row.
    """
    done = {(r["task"], r["recipe"], r["seed"]) for r in rows.read(result)}
    data: dict[str, Encoded] = {}
    wanted = list(product(by_cost(settings), seeds, recipes))
    for setting, seed, name in wanted[worker::num_workers]:
        if (setting.task, name, seed) in done:
            continue
        if setting.task not in data:
            data[setting.task] = Encoded(setting)
        recipe = recipes[name]
        run = Run(setting, name, recipe, seed, fixed_rate(setting, recipe), num_calibration)
        append(result, measure(run, data[setting.task]))


def append(result: str, row: dict[str, Any]) -> None:
    """Write one row and say so."""
    rows.append(result, row)
    print(
        f"{row['task']} {row['recipe']} seed {row['seed']} at {row['learning_rate']:g}: "
        f"{row['metric']:.4f} ({row['cpu_seconds']:.0f} s of CPU)",
        flush=True,
    )


def table(
    result: str,
    settings: Sequence[Setting],
    recipes: Mapping[str, Recipe],
    seeds: Sequence[int],
    reference: str,
    columns: Mapping[str, str] | None = None,
) -> str:
    """Return mean, spread and difference to ``reference`` of each measured recipe, as Markdown.

    Rows from several devices give a table for each: dropout draws other numbers on a GPU, so that
    a seed is not the same run there.

    Args:
        columns: further row keys, taken from an SST-2 row, each with its heading.
    """
    found = [r for r in rows.read(result) if r["seed"] in seeds and r["recipe"] in recipes]
    lay_out = partial(
        _table, settings=settings, recipes=recipes, reference=reference, columns=columns or {}
    )
    return rows.by_device(found, lay_out) or NO_ROWS


def _table(
    found: list[dict[str, Any]],
    settings: Sequence[Setting],
    recipes: Iterable[str],
    reference: str,
    columns: Mapping[str, str],
) -> str:
    lines = []
    for name in recipes:
        line: dict[str, Any] = {"recipe": name}
        for setting in settings:
            ours, base = (
                {r["seed"]: r for r in found if (r["task"], r["recipe"]) == (setting.task, n)}
                for n in (name, reference)
            )
            if not ours:
                continue
            values, others = ({s: 100 * r["metric"] for s, r in x.items()} for x in (ours, base))
            line[setting.task] = cell(values, None if name == reference else others)
            line.setdefault("seeds", set()).add(len(ours))
            if setting.task == "sst2":
                first = ours[min(ours)]
                line["saved"] = f"{first['saved_bytes'] / 2**20:.1f}"
                line.update({k: first.get(k) for k in columns})
        if "seeds" in line:
            fewest, most = min(line["seeds"]), max(line["seeds"])
            line["seeds"] = fewest if fewest == most else f"{fewest} to {most}"
            lines.append(line)
    measured = {r["task"] for r in found}
    heads = {"recipe": "recipe"} | {s.task: HEADS[s.task] for s in settings if s.task in measured}
    if "sst2" in measured:
        heads |= {"saved": "saved MiB (an SST-2 batch)", **columns}
    return rows.table(lines, heads | {"seeds": "seeds"})


def cell(values: Mapping[int, float], base: Mapping[int, float] | None, digits: int = 1) -> str:
    """Return mean and spread of what seeds gave, with the paired difference to ``base``."""
    several = list(values.values())
    spread = f" ± {stdev(several):.{digits}f}" if len(several) > 1 else ""
    text = f"{fmean(several):.{digits}f}{spread}"
    change = [value - base[seed] for seed, value in values.items() if base and seed in base]
    if not change:
        return text
    text += f" ({fmean(change):+.{digits}f}"
    if len(change) > 1:
        text += f", s.e. {stdev(change) / len(change) ** 0.5:.{digits}f}"
    return text + ")"


class Encoded:
    """One task's rows, tokenized once; batches are padded to their longest row."""

    def __init__(self, setting: Setting) -> None:
        self.setting = setting
        self.data = glue(setting.task, max_train=setting.num_train)
        _, tokenizer = minilm()
        self.train = self._encode(self.data["train"], tokenizer)
        self.validation = self._encode(self.data["validation"], tokenizer)

    def _encode(self, table: datasets.Dataset, tokenizer: Any) -> list[dict[str, Tensor]]:
        """Return one dictionary of unpadded tensors per row."""
        encoded = []
        for i in range(len(table)):
            row = collate(table, [i], tokenizer, self.setting.max_length)
            encoded.append({k: v[0] for k, v in row.items()} | {"sample_id": torch.tensor(i)})
        return encoded

    def batches(self, seed: int) -> Iterator[dict[str, Tensor]]:
        """Yield one shuffled epoch of batches of like length, so that little is padding."""
        rng = random.Random(seed)
        order = rng.sample(range(len(self.train)), len(self.train))
        size, pool = self.setting.batch_size, 50 * self.setting.batch_size
        groups = []
        for first in range(0, len(order), pool):
            near = sorted(
                order[first : first + pool], key=lambda i: len(self.train[i]["input_ids"])
            )
            groups += [near[i : i + size] for i in range(0, len(near), size)]
        for ids in rng.sample(groups, len(groups)):
            yield _pad([self.train[i] for i in ids])

    def evaluation(self) -> Iterator[dict[str, Tensor]]:
        """Yield the validation rows in order of length, so that little is padding."""
        by_length = sorted(self.validation, key=lambda row: len(row["input_ids"]))
        for first in range(0, len(by_length), 64):
            yield _pad(by_length[first : first + 64])


def _pad(encoded: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    out = {}
    for key in encoded[0]:
        values = [row[key] for row in encoded]
        is_sequence = values[0].ndim == 1
        pad = torch.nn.utils.rnn.pad_sequence
        out[key] = pad(values, batch_first=True) if is_sequence else torch.stack(values)
    return out


def measure(run: Run, encoded: Encoded) -> dict[str, Any]:
    """Train one recipe with one seed and score it once, at the end; on a GPU where there is one."""
    setting = run.setting
    random.seed(run.seed)
    np.random.seed(run.seed)
    trainee = _Trainee(run, encoded)
    calibration_seconds = trainee.calibrate()
    first = trainee.usable(next(encoded.batches(run.seed * 1000)))
    saved = lt.ledger(trainee.model, first).activations
    start, wall_start = time.process_time(), time.perf_counter()
    losses = trainee.train()
    train_loss = torch.stack(losses[-50:]).mean().item()  # waits for a GPU
    seconds, wall_seconds = time.process_time() - start, time.perf_counter() - wall_start
    return {
        "task": setting.task,
        "recipe": run.name,
        "seed": run.seed,
        **score(trainee.model, encoded),
        "train_loss": train_loss,
        "saved_bytes": saved,
        "num_steps": len(losses),
        "num_train": len(encoded.train),
        "num_epochs": setting.num_epochs,
        "batch_size": setting.batch_size,
        "learning_rate": run.rate,
        "weights": minilm_weights(),
        "cpu_seconds": round(seconds, 1),
        "wall_seconds": round(wall_seconds, 1),
        "calibration_cpu_seconds": round(calibration_seconds, 1),
    }


class _Trainee:
    """MiniLM under one recipe, on this machine's device, and the loop that trains it."""

    def __init__(self, run: Run, encoded: Encoded) -> None:
        self.run, self.encoded = run, encoded
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        label = encoded.data["train"].features["label"]
        num_labels = getattr(label, "num_classes", 1)
        self.model, _ = minilm(num_labels, run.seed, run.setting.pooling)
        self.model.to(self.device).get_submodule("bert.embeddings").requires_grad_(False)
        self.session: lt.Session | None = None
        for name, parameter in self.model.named_parameters():
            if run.frozen is not None and re.search(run.frozen, name):
                parameter.requires_grad_(False)
        if run.rival is not None and run.rival.startswith("SHiRA"):
            rivals.shira(self.model, run.matrices, rank=run.rival_rank, seed=run.seed)
        if run.recipe:
            self.session = lt.apply(self.model, *run.recipe, seed=run.seed)
        if any(isinstance(m, lt.LoRA) for m in run.recipe):
            _train_beside_lora(self.model, run.is_rest_trained)

    def usable(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return what the model takes of a batch, on its device."""
        conversions = [] if self.session is None else self.session.conversions
        keeps_ids = any(c.needs_sample_ids for c in conversions)
        return {k: v.to(self.device) for k, v in batch.items() if k != "sample_id" or keeps_ids}

    def calibrate(self) -> float:
        """Show the run's number of batches where a method asks for them; return CPU seconds."""
        if self.session is None or not self.run.num_calibration:
            return 0.0
        stream = self.encoded.batches(self.run.seed * 1000 + 999)
        start = time.process_time()
        shown = islice(stream, self.run.num_calibration)
        self.session.calibrate([self.usable(batch) for batch in shown])
        return time.process_time() - start

    def train(self) -> list[Tensor]:
        """Train for all epochs under a warm-up and a linear decay; return the loss of each step."""
        optimizer, clipped = self._optimizer()
        setting, seed = self.run.setting, self.run.seed
        num_steps = setting.num_epochs * -(-len(self.encoded.train) // setting.batch_size)
        warmup = max(1, num_steps // 10)
        schedule = torch.optim.lr_scheduler.LambdaLR(
            optimizer,
            lambda s: min((s + 1) / warmup, (num_steps - s) / (num_steps - warmup)),
        )
        torch.manual_seed(seed)  # dropout: the same stream for every recipe
        self.model.train()
        losses = []
        for epoch in range(setting.num_epochs):
            for batch in self.encoded.batches(seed * 1000 + epoch):
                loss = self.model(**self.usable(batch)).loss
                if self.session is not None:
                    loss = loss + self.session.auxiliary_loss()
                loss.backward()
                torch.nn.utils.clip_grad_norm_(clipped, 1.0)
                optimizer.step()
                schedule.step()
                optimizer.zero_grad()
                if self.session is not None:
                    self.session.on_step()
                losses.append(loss.detach())
        return losses

    def _optimizer(self) -> tuple[torch.optim.Optimizer, list[torch.nn.Parameter]]:
        """Return AdamW over what trains, and the parameters whose gradients are clipped."""
        run = self.run
        options: dict[str, Any] = {"lr": run.rate, "weight_decay": 0.0}
        trained = [p for p in self.model.parameters() if p.requires_grad]
        kind = (run.rival or "").partition(" ")[0]
        if kind in rivals.PROJECTED:
            how = {"rank": run.rival_rank, **options}
            return rivals.projected(kind, self.model, run.matrices, **how), trained
        options["fused"] = True
        if self.session is None:
            return torch.optim.AdamW(trained, **options), trained
        # torch clips no sparse gradients.
        sparse = {p for c in self.session.conversions for p in c.sparse_parameters}
        optimizer = self.session.optimizer(torch.optim.AdamW, **options)
        return optimizer, [p for p in trained if p not in sparse]


def _train_beside_lora(model: torch.nn.Module, is_rest_trained: bool) -> None:
    for name, parameter in model.named_parameters():
        is_adapted = name.endswith("base_layer.weight") or ".original_module." in name
        is_rest = not (is_adapted or name.startswith("bert.embeddings."))
        if name.startswith("bert.pooler.") or (is_rest_trained and is_rest):
            parameter.requires_grad_(True)


@torch.no_grad()
def score(model: torch.nn.Module, encoded: Encoded) -> dict[str, Any]:
    """Evaluate on the whole validation split: the main metric and all of the task's."""
    model.eval()
    device = next(model.parameters()).device
    predictions, references = [], []
    for batch in encoded.evaluation():
        references.append(batch.pop("labels"))
        batch.pop("sample_id")
        logits = model(**{k: v.to(device) for k, v in batch.items()}).logits.cpu()
        predictions.append(logits.squeeze(-1) if logits.shape[-1] == 1 else logits.argmax(-1))
    task = get_task(encoded.setting.task)
    scores = compute(task, torch.cat(predictions).numpy(), torch.cat(references).numpy())
    return {"metric": scores[task.main_metric], "main_metric": task.main_metric, "metrics": scores}
