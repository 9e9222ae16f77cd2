"""GLUE's metrics agree with their definitions and stay finite on constants."""

import dataclasses
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import EvalPrediction

from leantune.errors import ConfigError
from leantune.train.metrics import compute, compute_metrics_fn, majority_scores
from leantune.train.tasks import get_task

ALL_CLASS = dataclasses.replace(get_task("cola"), metrics=("accuracy", "f1", "matthews"))
STSB = get_task("stsb")


def _message(call, *args) -> str:
    with pytest.raises(ConfigError) as caught:
        call(*args)
    return str(caught.value)


def _metrics_fn(task):
    function = compute_metrics_fn(task)
    assert function is not None
    return function


def _textbook_classes(predicted: list[int], expected: list[int]) -> dict[str, float]:
    pairs = list(zip(predicted, expected, strict=True))
    tp, tn = pairs.count((1, 1)), pairs.count((0, 0))
    fp, fn = pairs.count((1, 0)), pairs.count((0, 1))
    root = math.sqrt((tp + fp) * (tp + fn) * (tn + fp) * (tn + fn))
    return {
        "accuracy": (tp + tn) / len(pairs),
        "f1": 2 * tp / (2 * tp + fp + fn) if tp else 0.0,
        "matthews": (tp * tn - fp * fn) / root if root else 0.0,
    }


def _textbook_pearson(x: list[float], y: list[float]) -> float:
    mean_x, mean_y = math.fsum(x) / len(x), math.fsum(y) / len(y)
    dx, dy = [v - mean_x for v in x], [v - mean_y for v in y]
    product = math.fsum(a * b for a, b in zip(dx, dy, strict=True))
    return product / math.sqrt(math.fsum(a * a for a in dx) * math.fsum(b * b for b in dy))


def _textbook_ranks(x: list[float]) -> list[float]:
    return [sum(v < w for v in x) + (sum(v == w for v in x) + 1) / 2 for w in x]


@settings(deadline=None)  # the first example imports scikit-learn
@given(st.lists(st.tuples(st.integers(0, 1), st.integers(0, 1)), min_size=1, max_size=30))
def test_class_metrics_follow_the_textbook_and_are_never_nan(pairs):
    predicted, expected = [p for p, _ in pairs], [e for _, e in pairs]
    assert compute(ALL_CLASS, predicted, expected) == pytest.approx(
        _textbook_classes(predicted, expected), abs=1e-12
    )


def test_correlations_follow_the_textbook():
    generator = np.random.default_rng(0)
    expected = generator.integers(0, 11, 60) / 2  # with ties
    predicted = expected + generator.normal(size=60)
    x, y = predicted.tolist(), expected.tolist()
    scores = compute(STSB, predicted, expected)
    assert scores == pytest.approx(
        {
            "pearson": _textbook_pearson(x, y),
            "spearman": _textbook_pearson(_textbook_ranks(x), _textbook_ranks(y)),
        },
        abs=1e-12,
    )
    assert abs(scores["pearson"] - scores["spearman"]) > 1e-3, "the two must not be one"


def test_f1_of_more_than_two_classes_is_macro():
    task = dataclasses.replace(get_task("mnli"), metrics=("f1",))
    predicted, expected = [0, 0, 1, 2], [0, 1, 1, 1]
    # Per class: 2/3, 1/2 and 0.
    assert compute(task, predicted, expected)["f1"] == pytest.approx((2 / 3 + 1 / 2) / 3)


@pytest.mark.parametrize("constant", [0, 1])
def test_constant_classes_score_zero_matthews(constant):
    scores = compute(ALL_CLASS, [constant] * 4, [0, 1, 1, 1])
    assert scores["matthews"] == 0.0
    assert scores["accuracy"] == (0.25, 0.75)[constant]
    assert compute(ALL_CLASS, [1, 1], [1, 1])["matthews"] == 0.0


@pytest.mark.parametrize("value", [0.0, 0.1, -3.5, 1e9])
def test_correlation_of_a_constant_is_zero(value):
    assert compute(STSB, [value] * 5, [1.0, 2.0, 3.0, 4.0, 5.0]) == {"pearson": 0, "spearman": 0}
    assert compute(STSB, [1.0, 2.0], [value] * 2) == {"pearson": 0, "spearman": 0}
    rounding = np.full(5, 1e9) + np.arange(5) * 1e-7
    assert compute(STSB, rounding, np.arange(5))["pearson"] == 0.0


def test_a_single_example_has_no_correlation():
    assert compute(STSB, [2.5], [1.0]) == {"pearson": 0.0, "spearman": 0.0}


@pytest.mark.parametrize("task", [STSB, ALL_CLASS])
def test_empty_is_refused(task):
    message = _message(compute, task, np.zeros(0), np.zeros(0))
    assert "predictions must hold at least one value, got none" in message


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_not_finite_is_refused(bad):
    message = _message(compute, STSB, [1.0, bad, 2.0], [1.0, 2.0, 3.0])
    assert f"predictions must be finite, got {bad} in row 1 (1 of 3 values)" in message
    assert "learning rate" in message
    assert "references must be finite" in _message(compute, STSB, [1.0, 2.0], [1.0, bad])


def test_shapes_and_types_are_checked():
    assert "one value per reference (2), got 3" in _message(compute, STSB, [1, 2, 3], [1, 2])
    assert "got shape (2, 2)" in _message(compute, ALL_CLASS, np.eye(2), [0, 1])
    assert "class ids, got 0.5" in _message(compute, ALL_CLASS, [0.5, 1], [0, 1])
    assert "of <U1" in _message(compute, ALL_CLASS, ["a", "b"], [0, 1])
    assert "classification or a regression" in _message(compute, get_task("causal_lm"), [1], [1])
    odd = dataclasses.replace(STSB, metrics=("bleu",))
    assert "metric must be one of accuracy" in _message(compute, odd, [1, 2], [1, 2])


def test_trainer_function_takes_the_arg_max():
    logits = np.array([[0.1, 0.9], [2.0, -1.0], [0.0, 1.0]], dtype=np.float32)
    labels = np.array([1, 0, 0])
    function = _metrics_fn(get_task("sst2"))
    assert function(EvalPrediction(logits, labels)) == pytest.approx({"accuracy": 2 / 3})
    states = np.zeros((3, 4, 5))
    with_states = EvalPrediction((logits, states), labels)  # pyright: ignore[reportArgumentType]
    assert function(with_states) == pytest.approx({"accuracy": 2 / 3})


@pytest.mark.parametrize("shape", [(4, 1), (4,)])
def test_trainer_function_squeezes_scores(shape):
    function = _metrics_fn(STSB)
    scores = np.array([1.0, 2.0, 3.0, 4.0], dtype=np.float32).reshape(shape)
    found = function(EvalPrediction(scores, np.array([2.0, 4.0, 6.0, 8.0], dtype=np.float32)))
    assert found == pytest.approx({"pearson": 1.0, "spearman": 1.0})


def test_trainer_function_refuses_bad_logits():
    labels = np.array([0, 1])
    classes = _metrics_fn(get_task("sst2"))
    logits = np.array([[0.0, 1.0], [np.nan, 0.0]])
    assert "must be finite, got nan in row 1" in _message(classes, EvalPrediction(logits, labels))
    empty = EvalPrediction(np.zeros((0, 2)), np.zeros(0))
    assert "at least one value" in _message(classes, empty)
    two = EvalPrediction(np.zeros((2, 2)), labels)
    assert "load the model with num_labels=1" in _message(_metrics_fn(STSB), two)


def test_no_function_for_language_models():
    assert compute_metrics_fn(get_task("causal_lm")) is None


def test_majority_ignores_the_input():
    task = dataclasses.replace(get_task("sst2"), metrics=("accuracy",))
    assert majority_scores(task, [1, 1, 0], [1, 0, 0, 0]) == {"accuracy": 0.25}
    assert majority_scores(task, [1, 0], [0, 0, 1, 0]) == {"accuracy": 0.75}, "ties go to class 0"
    assert majority_scores(STSB, [1.0, 4.0], [1.0, 2.0]) == {"pearson": 0.0, "spearman": 0.0}
    assert "train_labels must hold at least one" in _message(majority_scores, task, [], [1])
