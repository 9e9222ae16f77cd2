"""Two options of WTA-CRS against its defaults: five epochs, five seeds, draws in forward.

``norms="cache"`` needs several epochs to know a sample from its last visit. ``residual_rank``
spends bytes on a part that is exact for all rows, so that at equal storage it keeps fewer rows.

Legend: n rows of an input, d_in its width.
"""

import itertools
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from statistics import fmean, median, quantiles, stdev
from typing import Any

import torch
from torch import Tensor, nn

import leantune as lt
from bench import quality, rows
from bench.models import BertBlocks, Gpt2Blocks
from bench.quality import Encoded, Recipe, Run, Setting
from leantune.methods.wta_crs import maths

Batch = dict[str, Tensor]

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
        recipe = make_recipes(_row_counts(data[task]))[name]
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


def make_recipes(num_rows: list[int], widths: tuple[int, ...] = WIDTHS) -> dict[str, Recipe]:
    """Return the recipes; rank 4 keeps the default's bytes over batches of ``num_rows`` rows."""
    ratio = equal_storage_ratio(num_rows, widths)
    return {
        DEFAULT: (lt.WTACRS(keep_ratio=KEEP_RATIO, min_rows=MIN_ROWS),),
        CACHED: (lt.WTACRS(keep_ratio=KEEP_RATIO, min_rows=MIN_ROWS, norms="cache"),),
        RANKED: (lt.WTACRS(keep_ratio=ratio, min_rows=1, residual_rank=RANK),),
        EXACT: (),
    }


def equal_storage_ratio(num_rows: list[int], widths: tuple[int, ...]) -> float:
    """Return the keep_ratio at which rank 4 keeps the bytes of the default over these batches."""

    def excess(ratio: float) -> int:
        ours = sum(kept_bytes(n, widths, ratio, 1, RANK) for n in num_rows)
        return ours - sum(kept_bytes(n, widths, KEEP_RATIO, MIN_ROWS, 0) for n in num_rows)

    low, high = 0.0, KEEP_RATIO
    for _ in range(30):
        middle = (low + high) / 2
        low, high = (middle, high) if excess(middle) < 0 else (low, middle)
    return min(low, high, key=lambda ratio: abs(excess(ratio)))


def kept_bytes(n: int, widths: tuple[int, ...], keep_ratio: float, min_rows: int, rank: int) -> int:
    """Return the bytes that a block keeps of n rows: k rows with index and weight, and n + d_in."""
    k = maths.budget(n, keep_ratio, min_rows)
    return sum(k * (4 * d_in + 8) + 4 * rank * (n + d_in) for d_in in widths)


def _row_counts(encoded: Encoded) -> list[int]:
    return [batch["input_ids"].numel() for batch in encoded.batches(0)]


def _facts(recipe: Recipe, encoded: Encoded) -> dict[str, Any]:
    """Say what rows are kept and how their bytes over an epoch compare with the default's."""
    if not recipe:
        return {}
    config: Any = recipe[0]
    counts = _row_counts(encoded)
    chosen = config.keep_ratio, config.min_rows, config.residual_rank
    kept = sum(kept_bytes(n, WIDTHS, *chosen) for n in counts)
    base = sum(kept_bytes(n, WIDTHS, KEEP_RATIO, MIN_ROWS, 0) for n in counts)
    return {"keep_ratio": config.keep_ratio, "bytes_over_default": kept / base}


def measure_times() -> None:
    """Time whole steps of every recipe in turn, so that all meet the same machine."""
    encoded = Encoded(SETTINGS["stsb"])
    _measure_time(
        "MiniLM, 8 texts of STS-B",
        lambda: quality.minilm(encoded.data.num_labels, 0)[0],
        list(itertools.islice(encoded.batches(0), 40)),
        WIDTHS,
    )
    wide = (768, 768, 768, 3072)
    for name, make in (("BERT, 2 blocks", BertBlocks), ("GPT-2, 2 blocks", Gpt2Blocks)):
        batches = [
            {"x": torch.randn(4, 64, 768), "sample_id": torch.arange(4) + 4 * i} for i in range(4)
        ]
        _measure_time(f"{name}, 4 x 64 tokens", lambda make=make: make(2), batches, wide)


def _measure_time(
    case: str, make: Callable[[], nn.Module], batches: list[Batch], widths: tuple[int, ...]
) -> None:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    # On a CPU that others use, too, seconds of this process; a GPU's steps are waited for.
    clock = time.perf_counter if device.type == "cuda" else time.process_time
    batches = [{k: v.to(device) for k, v in batch.items()} for batch in batches]
    sizes = [next(iter(batch.values())).shape[:2].numel() for batch in batches]
    recipes = make_recipes(sizes, widths)
    steps = {name: _stepper(make().to(device), recipe) for name, recipe in recipes.items()}
    found: dict[str, list[float]] = {name: [] for name in steps}
    for number in range(len(batches) + 40):  # the cache has met every sample once by then
        for name, step in steps.items():
            start = clock()
            step(batches[number % len(batches)])
            if number >= len(batches):
                found[name].append(clock() - start)
    for name, times in found.items():
        ratios = [t / b for t, b in zip(times, found[DEFAULT], strict=True)]
        low, middle, high = quantiles(ratios, n=4)
        row = {"case": case, "recipe": name, "median_ms": round(1000 * median(times), 2)}
        row |= {"over_default": round(middle, 3), "quartiles": [round(low, 3), round(high, 3)]}
        rows.append(TIMES, row)
        print(row, flush=True)


def _stepper(model: nn.Module, recipe: Recipe) -> Callable[[Batch], None]:
    """Return what runs one whole training step."""
    model.train()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("embeddings" not in name)
    session = lt.apply(model, *recipe, seed=0) if recipe else None
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-5, fused=True)
    keeps_ids = session is not None and session.needs_sample_ids

    def step(batch: Batch) -> None:
        out = model(**{k: v for k, v in batch.items() if k != "sample_id" or keeps_ids})
        loss = out if isinstance(out, Tensor) else out.loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if loss.is_cuda:
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
