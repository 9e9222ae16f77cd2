"""SmolLM2's tables and what its kept keys hold."""

import pytest
import torch

from bench.cases import spt_smollm, spt_smollm_recall


def test_the_difference_to_dense_is_that_of_the_same_windows() -> None:
    base = {"recipe": "dense", "losses": [1.0, 3.0], "perplexity": 7.39, "bits_per_byte": 1.0}
    row = base | {"recipe": "x", "losses": [1.02, 3.02]}
    assert spt_smollm._cell(row, base) == "7.39, 1.000 bits per byte (+2.0%, s.e. 0.0%)"
    assert spt_smollm._cell(base, base) == "7.39, 1.000 bits per byte"


def test_exact_keys_hold_the_most_and_all_hold_everything(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(spt_smollm_recall, "_LENGTH", 32)
    monkeypatch.setattr(spt_smollm_recall, "RATIOS", {"1/4": 1 / 4, "all": 1.0})
    torch.manual_seed(0)
    q, k = torch.randn(1, 4, 32, 16), torch.randn(1, 2, 32, 16)
    hidden = torch.ones(32, 32, dtype=torch.bool).triu(1)
    scores = spt_smollm_recall._grouped(q, k).masked_fill(hidden, -torch.inf)
    mass = scores.softmax(-1)
    seen = {
        choice: spt_smollm_recall._seen(mass, score.masked_fill(hidden, -torch.inf))
        for choice, score in spt_smollm_recall._choices((q, k), q, k, scores)
    }
    assert all(shares["all"] == pytest.approx(1) for shares in seen.values())
    assert max(seen, key=lambda choice: seen[choice]["1/4"]) == "exact"
    assert seen["adc"]["1/4"] > seen["match"]["1/4"] > seen["random"]["1/4"]
