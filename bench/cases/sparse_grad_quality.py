"""Quality of SparseGrad on real data: MiniLM on GLUE tasks, each recipe at its own learning rate.

Every recipe gets a search of equal size: the same three multiples of its own scale, one seed that
is not among the measured ones, scored on rows of the training split that no run trains on. CoLA,
where runs of a search's length predict the majority, takes the rate that was found on STS-B. LoRA,
meProp and SparseGrad act on the MLP matrices alone; everything else trains in full in all recipes.
"""

from collections.abc import Sequence
from dataclasses import replace
from itertools import product

import leantune as lt
from bench import quality, rows
from bench.models import BERT_MLP
from bench.quality import Encoded, Recipe, Run, Setting

RESULT = "sparse_grad_quality"
SEARCH = "sparse_grad_search"
SEEDS = (0, 1, 2)
SEARCH_SEED = 100
NUM_CALIBRATION = 10

SETTINGS = (
    Setting("sst2", 2500, 1, lora_learning_rate=3e-4, pooling="mean"),
    Setting("cola", 4000, 2, batch_size=8, lora_learning_rate=3e-4, pooling="mean"),
    Setting("stsb", 2000, 1, batch_size=8, lora_learning_rate=3e-4, pooling="mean"),
)
RATE_FROM = {"sst2": "sst2", "stsb": "stsb", "cola": "stsb"}
"""Task -> the one whose search it takes the rate from."""
NUM_HELD_OUT = 500
FACTORS = (0.5, 1.0, 3.0)

FROZEN_MLP = "frozen MLP"
"""Full fine-tuning of everything but the MLP matrices: how much these matter at all."""
MLP_WEIGHTS = r"(intermediate|layer\.\d+\.output)\.dense\.weight$"

RECIPES: dict[str, Recipe] = {
    "full fine-tuning": (),
    "LoRA 7": (lt.LoRA(rank=7, sites=BERT_MLP),),
    "meProp, unified 4 %": (lt.MeProp(sites=BERT_MLP),),
    "top-k of dW 1 %": (lt.MeProp(sites=BERT_MLP, variant="weight", keep_ratio=0.01),),
    "SparseGrad, block": (lt.SparseGrad(),),
    "SparseGrad, every step": (lt.SparseGrad(selection="step"),),
    "SparseGrad, block + WTA-CRS 0.3": (lt.SparseGrad(), lt.WTACRS(keep_ratio=0.3)),
}

RIVALS = ("SHiRA 7", "GaLore 8", "APOLLO 8")
"""At about the price of LoRA 7 and of the entries, in trained numbers or in state."""

# More steps, where training has come further: who catches up with whom.
LONG = "sparse_grad_quality_long"
LONG_SETTINGS = tuple(replace(s, num_epochs=3) for s in SETTINGS if s.task != "sst2")
LONG_RECIPES: dict[str, Recipe] = {
    "full fine-tuning": (),
    FROZEN_MLP: (),
    "LoRA 7": RECIPES["LoRA 7"],
    "SparseGrad, block": RECIPES["SparseGrad, block"],
    **dict.fromkeys(RIVALS, ()),
}
LONG_RATE_FROM = {FROZEN_MLP: "full fine-tuning"}
"""Recipe -> the one whose search it takes the rate from."""


def main(worker: int = 0, num_workers: int = 1) -> None:
    """Search rates, then measure every row that is not there yet, and print the table."""
    names = [*RECIPES, *RIVALS][worker::num_workers]
    for name in names:
        measured = LONG_SETTINGS if name in RIVALS else SETTINGS
        for task in dict.fromkeys(RATE_FROM[s.task] for s in measured):
            _search(next(s for s in SETTINGS if s.task == task), name)
    _measure_missing(RESULT, SETTINGS, list(RECIPES)[worker::num_workers])
    _measure_missing(LONG, LONG_SETTINGS, list(LONG_RECIPES)[worker::num_workers])
    print(summary(), long_summary(), sep="\n\n")


def _measure_missing(result: str, settings: Sequence[Setting], names: Sequence[str]) -> None:
    done = {(r["task"], r["recipe"], r["seed"]) for r in rows.read(result)}
    for setting in quality.by_cost(settings):
        missing = [k for k in product(SEEDS, names) if (setting.task, k[1], k[0]) not in done]
        encoded = Encoded(setting) if missing else None
        for seed, name in missing:
            assert encoded is not None
            rate = best_rate(setting.task, LONG_RATE_FROM.get(name, name))
            quality.append(result, quality.measure(_run(setting, name, seed, rate), encoded))


def summary() -> str:
    """Return mean, spread and difference to full fine-tuning, as Markdown."""
    columns = {"learning_rate": "learning rate (SST-2)"}
    return quality.table(RESULT, SETTINGS, RECIPES, SEEDS, "full fine-tuning", columns)


def long_summary() -> str:
    """Return the same of what has trained for three epochs."""
    return quality.table(LONG, LONG_SETTINGS, LONG_RECIPES, SEEDS, "full fine-tuning")


def best_rate(task: str, name: str) -> float:
    """Return the rate of the best search row; of equal ones the smaller."""
    searched = RATE_FROM[task]
    found = [r for r in rows.read(SEARCH) if (r["task"], r["recipe"]) == (searched, name)]
    return max(found, key=lambda r: (r["metric"], -r["learning_rate"]))["learning_rate"]


def _run(setting: Setting, name: str, seed: int, rate: float) -> Run:
    frozen = MLP_WEIGHTS if name == FROZEN_MLP else None
    recipe, rival = (RECIPES | LONG_RECIPES)[name], name if name in RIVALS else None
    return Run(setting, name, recipe, seed, rate, NUM_CALIBRATION, True, frozen, rival, MLP_WEIGHTS)


def _search(setting: Setting, name: str) -> None:
    """Try the rates that have no row yet, in one epoch."""
    base = quality.fixed_rate(setting, (RECIPES | LONG_RECIPES)[name])
    found = [r for r in rows.read(SEARCH) if (r["task"], r["recipe"]) == (setting.task, name)]
    rates = {base * f for f in FACTORS} - {r["learning_rate"] for r in found}
    encoded = _held_out(setting) if rates else None
    for rate in sorted(rates):
        assert encoded is not None
        run = _run(encoded.setting, name, SEARCH_SEED, rate)
        quality.append(SEARCH, quality.measure(run, encoded))


def _held_out(setting: Setting) -> Encoded:
    """Return the training rows, scored on further ones that no run trains on."""
    more = replace(setting, num_train=setting.num_train + NUM_HELD_OUT, num_epochs=1)
    encoded = Encoded(more)
    encoded.validation = encoded.train[setting.num_train :]
    encoded.train = encoded.train[: setting.num_train]
    return encoded
