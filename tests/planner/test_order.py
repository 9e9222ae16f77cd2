"""The forecast of time puts ways to train in the order in which they were measured."""

from importlib.util import find_spec
from itertools import combinations
from typing import Any

import pytest
import torch
from torch import nn

from bench import rows
from bench.cases.frontier import BENCH, EVERYBODYS, OURS
from leantune.planner.forecast import Blueprint
from leantune.planner.plan import ON_CPU
from leantune.training.models import MODEL_PACKAGE

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(find_spec(MODEL_PACKAGE) is None, reason="extra demo is not installed"),
]
RECIPES = EVERYBODYS | OURS


def forecast(model: nn.Module, batch: Any) -> dict[str, float]:
    """Return the seconds of each way's whole step, the optimiser's update included."""
    blueprint = Blueprint(model.train(), torch.device("cpu"), ON_CPU)
    found = {name: blueprint.forecast(batch, recipe()) for name, recipe in RECIPES.items()}
    updates = {n: (3 * f.gradients + 2 * f.optimizer) / ON_CPU.traffic for n, f in found.items()}
    return {name: f.seconds + updates[name] for name, f in found.items()}


def test_nine_of_ten_pairs_that_a_cpu_tells_apart_are_in_order() -> None:
    """Their measured ratios have spreads that do not meet; of all pairs six of seven are."""
    measured = {
        (row["case"], row["variant"]): row
        for row in rows.read("frontier")
        if rows.kind(row) == "CPU" and row["variant"] in RECIPES
    }
    apart: list[bool] = []
    every: list[bool] = []
    for case in (case for case in BENCH.cases(False) if not case.needs_gpu):
        seconds = forecast(case.model(), case.batch())
        pairs = combinations((n for n in RECIPES if (case.name, n) in measured), 2)
        for pair in pairs:
            fast, slow = sorted(pair, key=lambda name: measured[case.name, name]["ratio"])
            is_right = seconds[fast] < seconds[slow]
            every.append(is_right)
            if measured[case.name, fast]["ratio_p80"] < measured[case.name, slow]["ratio_p20"]:
                apart.append(is_right)
    assert len(apart) >= 40 and sum(apart) >= 0.9 * len(apart), (sum(apart), len(apart))
    assert sum(every) >= 0.85 * len(every), (sum(every), len(every))
