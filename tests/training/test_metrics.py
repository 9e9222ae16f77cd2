"""GLUE's metrics agree with their definitions and stay finite."""

import math
from types import SimpleNamespace

import numpy as np
import pytest

from leantune.training.data import TASKS, Task
from leantune.training.metrics import compute, floor_score, metrics_of_logits

ALL = Task("all", "classification", metrics=("accuracy", "f1", "matthews"))
SCORES = TASKS["stsb"]


def test_values_by_hand() -> None:
    # Two true positives, one false positive, one false negative, one true negative.
    found = compute(ALL, [1, 1, 1, 0, 0], [1, 1, 0, 1, 0])
    assert found["accuracy"] == 0.6 and found["f1"] == pytest.approx(2 / 3)
    assert found["matthews"] == pytest.approx((2 * 1 - 1 * 1) / math.sqrt(3 * 3 * 2 * 2))
    found = compute(SCORES, [1.0, 2.0, 4.0], [1.0, 3.0, 3.5])
    expected = np.corrcoef([1.0, 2.0, 4.0], [1.0, 3.0, 3.5])[0, 1]
    assert found["pearson"] == pytest.approx(expected) and found["spearman"] == pytest.approx(1.0)
    three = compute(ALL, [0, 1, 2, 2], [0, 1, 2, 1])
    assert three["f1"] == pytest.approx((1 + 2 / 3 + 2 / 3) / 3)


@pytest.mark.parametrize("predictions", [[1, 1, 1], [0, 0, 0]])
def test_a_constant_has_no_correlation(predictions: list[int]) -> None:
    assert compute(ALL, predictions, [0, 1, 0])["matthews"] == 0.0
    assert compute(SCORES, [0.1 + 0.2] * 3, [1.0, 2.0, 3.0]) == {"pearson": 0.0, "spearman": 0.0}


def test_logits_are_reduced_and_those_that_are_no_numbers_score_none() -> None:
    score = metrics_of_logits(TASKS["sst2"])
    assert score is not None and metrics_of_logits(TASKS["causal_lm"]) is None
    logits, labels = np.array([[2.0, 1.0], [0.0, 3.0]]), np.array([0, 0])
    assert score(SimpleNamespace(predictions=(logits,), label_ids=labels)) == {"accuracy": 0.5}  # type: ignore[arg-type]
    logits[1, 0] = np.nan
    bad = score(SimpleNamespace(predictions=logits, label_ids=labels))  # type: ignore[arg-type]
    assert math.isnan(bad["accuracy"])


def test_the_floor_is_what_needs_no_learning() -> None:
    sst2 = floor_score(TASKS["sst2"], [0, 1, 1], [1, 0, 1, 1])
    assert sst2 == {"name": "majority", "value": 0.75}
    assert floor_score(SCORES, [1.0, 2.0], [1.0, 5.0]) == {"name": "mean", "value": 0.0}
