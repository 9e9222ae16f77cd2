"""What it is worth to move SPT's codebooks along in training: LoRA and an eighth of the keys.

The settings are those of :mod:`bench.cases.spt_quality`. Both recipes start from the same codebooks
and see the same rows in the same order.
"""

import leantune as lt
from bench import quality
from bench.cases import spt_quality
from bench.quality import Recipe

RESULT = "spt_refresh"
WITHOUT = "LoRA + SPT 1/8, codebooks as calibrated"
SETTINGS = tuple(s for s in spt_quality.SETTINGS if s.task in ("sst2", "stsb"))
RECIPES: dict[str, Recipe] = {
    WITHOUT: (lt.LoRA(rank=8), lt.SPTAttention(min_keys=4, refresh=False)),
    "LoRA + SPT 1/8, a step of the codebooks every 20 forwards": (
        lt.LoRA(rank=8),
        lt.SPTAttention(min_keys=4),
    ),
}


def main() -> None:
    """Measure every row that is not there yet, then print the table."""
    seeds, num_shown = spt_quality.SEEDS, spt_quality.NUM_CALIBRATION
    quality.measure_missing(RESULT, SETTINGS, RECIPES, seeds, num_calibration=num_shown)
    print(quality.table(RESULT, SETTINGS, RECIPES, seeds, WITHOUT))
