"""Quality of SparseGrad on real data: MiniLM on GLUE tasks, each recipe at its own learning rate.

Every recipe gets a search of equal size: the same three multiples of its own scale, one seed that
is not among the measured ones, scored on rows of the training split that no run trains on. LoRA,
meProp and SparseGrad act on the MLP matrices alone; everything else trains in full in all recipes.
"""

from dataclasses import replace
from typing import Any

import leantune as lt
from bench import quality, rows
from bench.quality import Encoded, Recipe, Run, Setting

RESULT = "sparse_grad_quality"
SEARCH = "sparse_grad_search"
SEEDS = (0, 1, 2)
SEARCH_SEED = 100
NUM_CALIBRATION = 10
MLP = ("intermediate.dense", "re:layer\\.\\d+\\.output\\.dense")

SETTINGS = (
    Setting("sst2", 2500, 1),
    Setting("cola", 2000, 1, batch_size=8),
    Setting("stsb", 1500, 1, batch_size=8),
)
NUM_SEARCH, NUM_HELD_OUT = 800, 400
FACTORS = (0.5, 1.0, 3.0)

RECIPES: dict[str, Recipe] = {
    "full fine-tuning": (),
    "LoRA 7": (lt.LoRA(rank=7, sites=MLP),),
    "meProp, unified 4 %": (lt.MeProp(sites=MLP),),
    "top-k of dW 1 %": (lt.MeProp(sites=MLP, variant="weight", keep_ratio=0.01),),
    "SparseGrad, fixed": (lt.SparseGrad(),),
    "SparseGrad, refreshed": (lt.SparseGrad(selection="refreshed", refresh_steps=50),),
    "SparseGrad, block": (lt.SparseGrad(selection="block"),),
    "SparseGrad, every step": (lt.SparseGrad(selection="step"),),
    "SparseGrad, block + WTA-CRS 0.3": (
        lt.SparseGrad(selection="block"),
        lt.WTACRS(keep_ratio=0.3),
    ),
}


def main(worker: int = 0, num_workers: int = 1) -> None:
    """Search rates, then measure every row that is not there yet, and print the table."""
    for setting in quality.by_cost(SETTINGS):
        for name in list(RECIPES)[worker::num_workers]:
            _search(setting, name)
            done = {(r["task"], r["recipe"], r["seed"]) for r in rows.read(RESULT)}
            missing = [s for s in SEEDS if (setting.task, name, s) not in done]
            encoded = Encoded(setting) if missing else None
            for seed in missing:
                assert encoded is not None
                rate = best_rate(setting.task, name)
                run = Run(setting, name, RECIPES[name], seed, rate, NUM_CALIBRATION, is_rest_trained=True)
                quality.append(RESULT, quality.measure(run, encoded))
    print(summary())


def summary() -> str:
    """Return mean, spread and difference to full fine-tuning, as Markdown."""
    columns = {"learning_rate": "learning rate (SST-2)"}
    return quality.table(RESULT, SETTINGS, RECIPES, SEEDS, "full fine-tuning", columns)


def best_rate(task: str, name: str) -> float:
    """Return the rate of the best search row; of equal ones the smaller."""
    found = [r for r in rows.read(SEARCH) if (r["task"], r["recipe"]) == (task, name)]
    return max(found, key=lambda r: (r["metric"], -r["learning_rate"]))["learning_rate"]


def _search(setting: Setting, name: str) -> None:
    """Try the rates that have no row yet, on a small part of the training split."""
    base = quality.fixed_rate(setting, RECIPES[name])
    done = {
        r["learning_rate"]
        for r in rows.read(SEARCH)
        if (r["task"], r["recipe"]) == (setting.task, name)
    }
    rates = [base * f for f in FACTORS if base * f not in done]
    if not rates:
        return
    encoded = _held_out(setting)
    for rate in rates:
        run = Run(encoded.setting, name, RECIPES[name], SEARCH_SEED, rate, NUM_CALIBRATION, True)
        row: dict[str, Any] = quality.measure(run, encoded)
        quality.append(SEARCH, row)


def _held_out(setting: Setting) -> Encoded:
    """Return training rows to search on, scored on rows that lie behind all those trained on."""
    needed = setting.num_train + NUM_HELD_OUT
    encoded = Encoded(replace(setting, num_train=needed))
    encoded.validation = encoded.train[setting.num_train :]
    encoded.train = encoded.train[:NUM_SEARCH]
    return encoded
