"""The forecast of time puts ways to train in the order in which a GPU ran them.

``kernels/test_in_interpreter.py`` runs this file: what would launch is counted, and nothing runs.
"""

import os
from collections.abc import Callable
from itertools import combinations
from typing import Any

import pytest
import torch
from torch import nn

from bench import rows
from bench.cases.wta_crs_speed import ON_GPU as PLAIN
from bench.cases.wta_crs_speed import WITH_LIGER
from bench.models import BertBlocks, LlamaBlocks
from leantune.planner.forecast import Blueprint
from leantune.planner.plan import ON_GPU

pytest.importorskip("liger_kernel")
pytestmark = pytest.mark.skipif(
    os.environ.get("LEANTUNE_KERNELS") != "triton", reason="runs in the interpreter, see its test"
)
RECIPES = PLAIN | WITH_LIGER
CASES: dict[str, tuple[Callable[[], nn.Module], dict[str, Any]]] = {
    "Llama-1B x 16, 8 x 2048, bf16": (
        lambda: LlamaBlocks(16),
        {"input_ids": torch.zeros(8, 2048, dtype=torch.int64)},
    ),
    "BERT-base x 12, 64 x 512, bf16": (
        lambda: BertBlocks(12),
        {"x": torch.zeros(64, 512, 768, dtype=torch.bfloat16)},
    ),
}


def test_nine_of_ten_pairs_that_a_gpu_ran_are_in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("leantune.core.apply.on_gpu", lambda device: True)
    measured = {
        (row["case"], row["variant"]): row["ratio"]
        for row in rows.read("wta_crs_speed")
        if rows.kind(row) == "GPU" and row["variant"] in RECIPES
    }
    is_right: list[bool] = []
    errors: list[float] = []
    for case, (build, batch) in CASES.items():
        with torch.device("meta"):
            model = build().to(torch.bfloat16).train()
        blueprint = Blueprint(model, torch.device("cpu"), ON_GPU)
        names = [name for name in RECIPES if (case, name) in measured]
        seconds = {n: blueprint.forecast(batch, RECIPES[n]()).seconds for n in names}
        for pair in combinations(names, 2):
            fast, slow = sorted(pair, key=lambda name: measured[case, name])
            is_right.append(seconds[fast] < seconds[slow])
        plain = seconds["exact"]
        errors += [seconds[n] / plain / measured[case, n] - 1 for n in names]
    assert len(is_right) >= 60 and sum(is_right) >= 0.9 * len(is_right), sum(is_right)
    assert max(map(abs, errors)) < 0.15, errors
