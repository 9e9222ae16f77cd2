"""Quality of sparse attention and routed FFNs: LoRA on GLUE tasks, all rows from one command.

Under the paper's settings (an eighth of the keys, two of four groups of hidden units as they lie)
and softer ones. GLUE rows are short: at least four keys are kept, so that attention is sparse there
at all.
"""

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
_SPT = lt.SPTAttention(min_keys=4)
_SPT_SOFT = lt.SPTAttention(keep_ratio=0.5, min_keys=4)
_ROUTED = lt.RoutedFFN(split="contiguous")
_ROUTED_SOFT = lt.RoutedFFN(num_active=3, split="coactivation")
RECIPES: dict[str, Recipe] = {
    "LoRA": (_LORA,),
    "LoRA + routed 2 of 4": (_LORA, _ROUTED),
    "LoRA + routed 2 of 4, coactivation": (_LORA, lt.RoutedFFN(split="coactivation")),
    "LoRA + routed 2 of 4, coactivation, all but the last two layers": (
        _LORA,
        lt.RoutedFFN(split="coactivation", sites=["layer.[0-3].*"]),
    ),
    "LoRA + routed 3 of 4, coactivation": (_LORA, _ROUTED_SOFT),
    "LoRA + routed 2 of 4, coactivation, low-rank guess": (
        _LORA,
        lt.RoutedFFN(split="coactivation", compensate="lowrank"),
    ),
    "LoRA + routed 3 of 4, coactivation, mean guess": (
        _LORA,
        lt.RoutedFFN(num_active=3, split="coactivation", compensate="mean"),
    ),
    "LoRA + routed 3 of 4, coactivation, low-rank guess": (
        _LORA,
        lt.RoutedFFN(num_active=3, split="coactivation", compensate="lowrank"),
    ),
    # As choose_layers has it for three quarters of all groups (routed_ffn_error.jsonl).
    "LoRA + routed 1 of 4 in the last two layers, coactivation, low-rank guess": (
        _LORA,
        lt.RoutedFFN(
            num_active=1, split="coactivation", compensate="lowrank", sites=["layer.[45].*"]
        ),
    ),
    "LoRA + SPT 1/8": (_LORA, _SPT),
    "LoRA + SPT 1/2": (_LORA, _SPT_SOFT),
    "LoRA + SPT 1/8 + routed 2 of 4": (_LORA, _SPT, _ROUTED),
    "LoRA + SPT 1/2 + routed 3 of 4, coactivation": (_LORA, _SPT_SOFT, _ROUTED_SOFT),
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
