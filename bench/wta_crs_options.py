"""Two options of WTA-CRS against its defaults: five epochs, five seeds, draws in forward.

``norms="cache"`` needs several epochs to know a sample from its last visit. ``residual_rank``
spends bytes on a part that is exact for all rows, so that at equal storage it keeps fewer rows.

Legend: n rows of an input, d_in its width.
"""

import itertools
import os
import time
from collections.abc import Iterator
from dataclasses import replace
from statistics import fmean, median, stdev
from typing import Any

import torch

import leantune as lt
from bench import quality, rows
from bench.quality import Encoded, Recipe, Run, Setting
from leantune.methods.wta_crs import maths

RESULT = "wta_crs_options"
TIMES = "wta_crs_options_time"
DEFAULT, EXACT = "WTA-CRS 0.1", "exact"
CACHED, RANKED = "WTA-CRS 0.1, cached norms", "WTA-CRS 0.1, rank 4, equal storage"
KEEP_RATIO, RANK, MIN_ROWS = 0.1, 4, 10
WIDTHS = (384, 384, 384, 1536)
"""d_in of the samples that a block of MiniLM keeps: of q, k and v, attention's output, the MLP."""

SETTINGS = {
    "stsb": Setting("stsb", 2000, 5, batch_size=8),
    "sst2": Setting("sst2", 2000, 5),
    "cola": Setting("cola", 4000, 5, batch_size=8),
}


def main(order: str, seconds: float = 1e9, num_train: int = 0) -> None:
    """Measure runs that no other worker has claimed, until none would end in time.

    Args:
        order: tasks with their seeds, as in ``"sst2:01234,stsb:43210"``.
        seconds: from now; a run that would take longer, by the pace so far, is not begun.
        num_train: rows of each training set, for a trial; 0 for all.
    """
    end = time.monotonic() + seconds
    device = "cuda" if torch.cuda.is_available() else "cpu"
    data: dict[str, Encoded] = {}
    pace = 0.0  # seconds per step of the slowest run so far
    for task, seed, name in _runs(order):
        setting = SETTINGS[task]
        setting = replace(setting, num_train=num_train or setting.num_train)
        num_steps = setting.num_epochs * -(-setting.num_train // setting.batch_size)
        if time.monotonic() + pace * num_steps > end or not _claim(task, seed, name, device):
            continue
        if task not in data:
            data[task] = Encoded(setting)
        recipe = make_recipes(data[task])[name]
        facts = _facts(recipe, data[task])
        start = time.monotonic()
        row = quality.measure(Run(setting, name, recipe, seed, setting.learning_rate), data[task])
        pace = max(pace, (time.monotonic() - start) / num_steps)
        quality.append(RESULT, row | facts)


def _runs(order: str) -> Iterator[tuple[str, int, str]]:
    """Yield (task, seed, recipe), seed by seed, so that a run cut off has whole seeds."""
    for part in order.split(","):
        task, seeds = part.split(":")
        yield from itertools.product((task,), map(int, seeds), (DEFAULT, CACHED, RANKED, EXACT))


def _claim(task: str, seed: int, name: str, device: str) -> bool:
    """Take one run, unless it is taken, or its seed runs on the other kind of device.

    Dropout's stream differs between kinds of device, and recipes are compared seed by seed.
    """
    folder = rows.RESULTS / "claims"
    folder.mkdir(parents=True, exist_ok=True)
    owner = folder / f"{task} {seed}"
    try:
        os.symlink(device, owner)  # made and filled at once, whoever else tries
    except FileExistsError:
        if os.readlink(owner) != device:
            return False
    try:
        (folder / f"{task} {seed} {name}").touch(exist_ok=False)
    except FileExistsError:
        return False
    return True


def make_recipes(encoded: Encoded) -> dict[str, Recipe]:
    """Return the recipes for one task; rank 4 keeps as many bytes as the default on its batches."""
    ratio = equal_storage_ratio(_row_counts(encoded))
    return {
        DEFAULT: (lt.WTACRS(keep_ratio=KEEP_RATIO, min_rows=MIN_ROWS),),
        CACHED: (lt.WTACRS(keep_ratio=KEEP_RATIO, min_rows=MIN_ROWS, norms="cache"),),
        RANKED: (lt.WTACRS(keep_ratio=ratio, min_rows=1, residual_rank=RANK),),
        EXACT: (),
    }


def equal_storage_ratio(num_rows: list[int]) -> float:
    """Return the keep_ratio at which rank 4 keeps the bytes of the default over these batches."""

    def excess(ratio: float) -> int:
        return sum(
            kept_bytes(n, ratio, 1, RANK) - kept_bytes(n, KEEP_RATIO, MIN_ROWS, 0) for n in num_rows
        )

    low, high = 0.0, KEEP_RATIO
    for _ in range(30):
        middle = (low + high) / 2
        low, high = (middle, high) if excess(middle) < 0 else (low, middle)
    return min(low, high, key=lambda ratio: abs(excess(ratio)))


def kept_bytes(n: int, keep_ratio: float, min_rows: int, rank: int) -> int:
    """Return the bytes that a block keeps of n rows: k rows with index and weight, and n + d_in."""
    k = maths.budget(n, keep_ratio, min_rows)
    return sum(k * (4 * d_in + 8) + 4 * rank * (n + d_in) for d_in in WIDTHS)


def _row_counts(encoded: Encoded) -> list[int]:
    return [batch["input_ids"].numel() for batch in encoded.batches(0)]


def _facts(recipe: Recipe, encoded: Encoded) -> dict[str, Any]:
    """Say what rows are kept and how their bytes over an epoch compare with the default's."""
    if not recipe:
        return {}
    config: Any = recipe[0]
    counts = _row_counts(encoded)
    chosen = config.keep_ratio, config.min_rows, config.residual_rank
    kept = sum(kept_bytes(n, *chosen) for n in counts)
    base = sum(kept_bytes(n, KEEP_RATIO, MIN_ROWS, 0) for n in counts)
    return {"keep_ratio": config.keep_ratio, "bytes_over_default": kept / base}


def measure_time(task: str = "stsb", num_rounds: int = 60) -> None:
    """Time whole steps of every recipe in turn, so that all meet the same machine."""
    encoded = Encoded(SETTINGS[task])
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    steps = {n: _stepper(r, encoded, device) for n, r in make_recipes(encoded).items()}
    found: dict[str, list[float]] = {name: [] for name in steps}
    stream = itertools.cycle(encoded.batches(0))
    for number, batch in zip(range(num_rounds + 5), stream, strict=False):
        for name, step in steps.items():
            start = time.perf_counter()
            step(batch)
            if number >= 5:
                found[name].append(time.perf_counter() - start)
    base = found[DEFAULT]
    for name, times in found.items():
        ratios = [t / b for t, b in zip(times, base, strict=True)]
        row = {"task": task, "recipe": name, "median_ms": round(1000 * median(times), 2)}
        row |= {"over_default": round(median(ratios), 3), "num_rounds": num_rounds}
        rows.append(TIMES, row)
        print(row, flush=True)


def _stepper(recipe: Recipe, encoded: Encoded, device: torch.device) -> Any:
    model, _ = quality.minilm(encoded.data.num_labels, 0)
    model.to(device).train().get_submodule("bert.embeddings").requires_grad_(False)
    session = lt.apply(model, *recipe, seed=0)
    session.num_samples = len(encoded.train)
    optimizer = session.optimizer(torch.optim.AdamW, lr=1e-4, fused=True)

    def step(batch: dict[str, torch.Tensor]) -> None:
        keys = [k for k in batch if k != "sample_id" or session.needs_sample_ids]
        model(**{k: batch[k].to(device) for k in keys}).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        session.on_step()
        if device.type == "cuda":
            torch.cuda.synchronize()

    return step


def summary() -> str:
    """Return each option's difference to the default by task, and the mean over tasks."""
    found = {(r["task"], r["recipe"], r["seed"]): 100 * r["metric"] for r in rows.read(RESULT)}
    lines = []
    for name in (CACHED, RANKED, EXACT):
        line: dict[str, Any] = {"recipe": name}
        means, errors = [], []
        for task in SETTINGS:
            change = [
                value - found[task, DEFAULT, seed]
                for (t, recipe, seed), value in found.items()
                if (t, recipe) == (task, name) and (task, DEFAULT, seed) in found
            ]
            if len(change) < 2:
                continue
            error = stdev(change) / len(change) ** 0.5
            line[task] = f"{fmean(change):+.2f} (s.e. {error:.2f}, {len(change)} seeds)"
            means.append(fmean(change))
            errors.append(error)
        if means:
            error = sum(e * e for e in errors) ** 0.5 / len(means)
            line["mean"] = f"{fmean(means):+.2f} (s.e. {error:.2f})"
        lines.append(line)
    heads = {"recipe": f"recipe, minus {DEFAULT}", **quality.HEADS, "mean": "mean over tasks"}
    return rows.table(lines, heads)
