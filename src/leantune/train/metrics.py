"""The metrics of GLUE, finite for every finite input."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from leantune.errors import ConfigError
from leantune.train.tasks import Task

if TYPE_CHECKING:
    from transformers import EvalPrediction

METRICS = ("accuracy", "f1", "matthews", "pearson", "spearman")


def compute(task: Task, predictions: ArrayLike, references: ArrayLike) -> dict[str, float]:
    """Return every metric of the task; a constant scores 0 where a correlation is undefined.

    ``f1`` is that of class 1, or the mean over the classes (macro) where there are more than two.
    ``matthews``, ``pearson`` and ``spearman`` are 0.0 when predictions or references are all
    equal, and ``f1`` is 0.0 when no class-1 example was predicted or exists.

    Args:
        task: of kind classification or regression.
        predictions: (n,) class ids, or finite scores; n >= 1.
        references: (n,) class ids, or finite scores.

    Returns:
        Metric name to value: ``accuracy`` and ``f1`` in [0, 1], the others in [-1, 1].

    Raises:
        ConfigError: empty, not finite, of other lengths, or class ids that are not integers.
    """
    if task.kind == "causal_lm":
        raise ConfigError(
            f"compute: task must be a classification or a regression, got {task.name!r}; "
            "judge a language model by its evaluation loss"
        )
    predicted = _checked("predictions", predictions, task)
    expected = _checked("references", references, task)
    if predicted.shape != expected.shape:
        raise ConfigError(
            f"compute: predictions must have one value per reference ({expected.size}), "
            f"got {predicted.size}; evaluate on the split whose labels are given"
        )
    return {name: _score(name, predicted, expected) for name in task.metrics}


def compute_metrics_fn(task: Task) -> Callable[[EvalPrediction], dict[str, float]] | None:
    """Return the ``compute_metrics`` of ``transformers.Trainer``; None for ``causal_lm``.

    Class ids are the arg max of the logits, (n, num_labels); scores are logits of (n, 1) or (n,).
    Where the model returns more than logits, they come first.

    Args:
        task: whose metrics are computed.
    """
    if task.kind == "causal_lm":
        return None

    def compute_metrics(evaluated: EvalPrediction) -> dict[str, float]:
        outputs = evaluated.predictions
        logits = np.asarray(outputs[0] if isinstance(outputs, tuple) else outputs)
        # The arg max of NaN is a class id like any other: look at the logits themselves.
        _require_finite("predictions", logits)
        if task.kind == "regression":
            predictions = logits.reshape(len(logits), -1)
            if predictions.shape[1] != 1:
                raise ConfigError(
                    f"compute: predictions must be one score per row for task {task.name!r}, "
                    f"got shape {logits.shape}; load the model with num_labels=1"
                )
            predictions = predictions[:, 0]
        else:
            predictions = logits.argmax(axis=-1)
        return compute(task, predictions, np.asarray(evaluated.label_ids))

    return compute_metrics


def majority_scores(
    task: Task, train_labels: Sequence[float], validation_labels: Sequence[float]
) -> dict[str, float]:
    """Return the metrics of a model that ignores its input: what any result must beat.

    It always answers the most frequent class of train (the smaller id of two), or the mean score.

    Args:
        task: of kind classification or regression.
        train_labels: (m,) class ids or scores, m >= 1.
        validation_labels: (n,) class ids or scores, n >= 1.

    Raises:
        ConfigError: as ``compute``.
    """
    train = _checked("train_labels", train_labels, task)
    if task.kind == "regression":
        answer = train.mean()
    else:
        counts = Counter(train.tolist())
        answer = min(counts, key=lambda label: (-counts[label], label))
    return compute(task, np.full(len(validation_labels), answer), validation_labels)


def _require_finite(field: str, values: NDArray[Any]) -> None:
    if values.size == 0:
        raise ConfigError(f"compute: {field} must hold at least one value, got none; add examples")
    bad = values.size - int(np.isfinite(values).sum())
    if bad:
        first = np.argwhere(~np.isfinite(values))[0]
        raise ConfigError(
            f"compute: {field} must be finite, got {values[tuple(first)]} in row {first[0]} "
            f"({bad} of {values.size} values); lower the learning rate or look for an overflow"
        )


def _checked(field: str, values: ArrayLike, task: Task) -> NDArray[Any]:
    array = np.asarray(values)
    if array.ndim != 1 or array.dtype.kind not in "biuf":
        raise ConfigError(
            f"compute: {field} must be a row of numbers, got shape {array.shape} "
            f"of {array.dtype}; reduce logits to one value per example"
        )
    _require_finite(field, array)
    if task.kind == "regression":
        return array.astype(np.float64)
    ids = array.astype(np.int64)
    if (ids != array).any():
        raise ConfigError(
            f"compute: {field} must be class ids, got {array[ids != array][0]}; "
            "take the arg max of the logits"
        )
    return ids


def _score(name: str, predicted: NDArray[Any], expected: NDArray[Any]) -> float:
    import scipy.stats
    from sklearn import metrics

    if name == "accuracy":
        return float(metrics.accuracy_score(expected, predicted))
    if name == "f1":
        binary = max(predicted.max(), expected.max()) <= 1
        average = "binary" if binary else "macro"
        return float(metrics.f1_score(expected, predicted, average=average, zero_division=0))  # pyright: ignore[reportArgumentType]
    if _is_constant(predicted) or _is_constant(expected):
        return 0.0
    if name == "matthews":
        return float(metrics.matthews_corrcoef(expected, predicted))
    if name == "pearson":
        return float(scipy.stats.pearsonr(predicted, expected).statistic)  # pyright: ignore[reportAttributeAccessIssue]
    if name == "spearman":
        return float(scipy.stats.spearmanr(predicted, expected).statistic)  # pyright: ignore[reportAttributeAccessIssue]
    raise ConfigError(f"compute: metric must be one of {', '.join(METRICS)}, got {name!r}")


def _is_constant(values: NDArray[Any]) -> bool:
    # Below this spread the deviations from the mean are rounding errors of float64.
    return float(np.ptp(values)) <= 1e-12 * float(np.abs(values).max())
