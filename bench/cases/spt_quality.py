"""Quality of sparse attention and routed FFNs: LoRA on GLUE tasks, all rows from one command.

Under the paper's settings (an eighth of the keys, two of four groups of hidden units as they lie)
and softer ones. GLUE rows are short: at least four or eight keys are kept, so that attention is
sparse there at all.
"""

from dataclasses import replace

import leantune as lt
from bench import quality
from bench.cases import spt_language, spt_smollm
from bench.quality import Recipe, Setting

RESULT = "spt_quality"
SEEDS = (0, 1, 2)
NUM_CALIBRATION = 8

SETTINGS = (
    Setting("sst2", 2500, 1, lora_learning_rate=3e-4, pooling="mean"),
    Setting("cola", 4000, 2, batch_size=8, lora_learning_rate=3e-4, pooling="mean"),
    Setting("stsb", 2000, 2, batch_size=8, lora_learning_rate=3e-4, pooling="mean"),
)

_LORA = lt.LoRA(rank=8)
_GUESSED = lt.RoutedFFN(split="coactivation", compensate="lowrank")
RECIPES: dict[str, Recipe] = {
    "LoRA": (_LORA,),
    "LoRA + routed 2 of 4": (_LORA, lt.RoutedFFN()),
    "LoRA + routed 2 of 4, coactivation": (_LORA, lt.RoutedFFN(split="coactivation")),
    "LoRA + routed 2 of 4, coactivation, low-rank guess": (_LORA, _GUESSED),
    "LoRA + routed 3 of 4, coactivation, low-rank guess": (
        _LORA,
        replace(_GUESSED, num_active=3),
    ),
    # As choose_layers has it for three quarters of all groups (routed_ffn_error.jsonl).
    "LoRA + routed 1 of 4 in the last two layers, coactivation, low-rank guess": (
        _LORA,
        replace(_GUESSED, num_active=1, sites=["layer.[45].*"]),
    ),
    "LoRA + SPT 1/8": (_LORA, lt.SPTAttention(min_keys=4)),
    "LoRA + SPT 1/2": (_LORA, lt.SPTAttention(keep_ratio=0.5, min_keys=4)),
    "LoRA + SPT 1/2, at least 8 keys": (_LORA, lt.SPTAttention(keep_ratio=0.5, min_keys=8)),
}


def main(worker: int = 0, num_workers: int = 1) -> None:
    """Measure every row that is not there yet, then print the tables."""
    quality.measure_missing(RESULT, SETTINGS, RECIPES, SEEDS, worker, num_workers, NUM_CALIBRATION)
    print(summary())
    spt_language.main(worker, num_workers)
    spt_smollm.main(worker, num_workers)


def summary() -> str:
    """Return mean, spread and difference to dense LoRA of each recipe, as Markdown."""
    return quality.table(RESULT, SETTINGS, RECIPES, SEEDS, "LoRA")
