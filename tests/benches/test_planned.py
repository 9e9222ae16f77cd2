"""What was planned stands beside what its step took."""

from pathlib import Path
from typing import Any

import pytest
import transformers
from torch import nn

from bench import rows
from bench.cases import planned
from bench.timing import Bench


def tiny() -> nn.Module:
    # Its logits are large enough for a step that holds them too long to be seen.
    shape: dict[str, Any] = {"n_embd": 64, "n_head": 2, "n_layer": 2}
    config = transformers.GPT2Config(vocab_size=4096, **shape)
    return transformers.GPT2LMHeadModel(config)


def test_what_is_planned_is_what_a_step_holds(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(rows, "RESULTS", tmp_path)
    case = planned.Case("tiny", tiny, tuple, 8, 32)
    Bench("planned", lambda tiny: [case], planned._measure, planned.COLUMNS).run()
    plain, *ours = rows.read("planned")
    assert (plain["methods"], plain["ratio"], plain["planned_ratio"]) == ("plain", 1, 1)
    for row, share in zip(ours, planned.SHARES.values(), strict=True):
        assert row["planned_peak_mib"] <= share * plain["planned_peak_mib"]
        assert row["methods"] != "plain" or row["batch"] != "1 x 8"
    for row in (plain, *ours):
        assert row["peak_mib"] == pytest.approx(row["planned_peak_mib"], abs=0.21)
