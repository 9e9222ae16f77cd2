"""The metrics of GLUE, finite for every finite input."""

from collections import Counter
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
import scipy.stats
from numpy.typing import ArrayLike, NDArray
from sklearn import metrics

from leantune.errors import ConfigError
from leantune.training.data import Task

if TYPE_CHECKING:
    from transformers import EvalPrediction


def compute(task: Task, predictions: ArrayLike, references: ArrayLike) -> dict[str, float]:
    """Return every metric of the task; a constant scores 0 where a correlation is undefined.

    ``f1`` is that of class 1, or the mean over the classes (macro) where there are more than two.

    Args:
        task: of kind classification or regression.
        predictions: (n,) class ids or scores; n >= 1.
        references: (n,) class ids or scores.

    Returns:
        Metric name to value: ``accuracy`` and ``f1`` in [0, 1], the others in [-1, 1].

    Raises:
        ConfigError: empty, not finite, or not one prediction for each reference.
    """
    predicted, expected = np.asarray(predictions), np.asarray(references)
    if predicted.ndim != 1 or predicted.shape != expected.shape or not predicted.size:
        raise ConfigError(
            f"compute: predictions must be one number for each reference, got {predicted.shape} "
            f"for {expected.shape}; reduce logits to one value for each row"
        )
    _require_finite(predicted)
    return {name: float(_SCORES[name](expected, predicted)) for name in task.metrics}


def metrics_of_logits(task: Task) -> "Callable[[EvalPrediction], dict[str, float]] | None":
    """Return the ``compute_metrics`` of ``transformers.Trainer``; None for a language model.

    Args:
        task: whose metrics are computed, from logits of (n, num_labels).
    """

    def compute_metrics(evaluated: "EvalPrediction") -> dict[str, float]:
        outputs = evaluated.predictions
        logits = np.asarray(outputs[0] if isinstance(outputs, tuple) else outputs)
        # The arg max of NaN is a class id like any other.
        _require_finite(logits)
        predictions = logits.reshape(-1) if task.kind == "regression" else logits.argmax(axis=-1)
        return compute(task, predictions, np.asarray(evaluated.label_ids))

    return None if task.kind == "causal_lm" else compute_metrics


def floor_score(task: Task, train_labels: Any, validation_labels: Any) -> dict[str, Any] | None:
    """Return the main metric of a model that ignores its input, which any result must beat.

    It always answers the most frequent class of train, or the mean score.

    Args:
        task: None is returned for a language model.
        train_labels: (m,) class ids or scores, m >= 1.
        validation_labels: (n,) class ids or scores, n >= 1.
    """
    if task.kind == "causal_lm":
        return None
    counts = Counter(train_labels)
    is_regression = task.kind == "regression"
    answer = (
        np.mean(list(train_labels)) if is_regression else min(counts, key=lambda c: (-counts[c], c))
    )
    validation = list(validation_labels)
    scores = compute(task, np.full(len(validation), answer), validation)
    return {"name": "mean" if is_regression else "majority", "value": scores[task.main_metric]}


def _require_finite(values: NDArray[Any]) -> None:
    bad = values.size - int(np.isfinite(values).sum())
    if bad:
        raise ConfigError(
            f"compute: predictions must be finite, got {bad} of {values.size} that are not; lower "
            "the learning rate or look for an overflow"
        )


def _f1(expected: NDArray[Any], predicted: NDArray[Any]) -> float:
    average: Any = "binary" if max(predicted.max(), expected.max()) <= 1 else "macro"
    return metrics.f1_score(expected, predicted, average=average, zero_division=0)  # pyright: ignore


def _unless_constant(score: Callable[..., Any]) -> Callable[[NDArray[Any], NDArray[Any]], float]:
    def checked(expected: NDArray[Any], predicted: NDArray[Any]) -> float:
        for values in (expected, predicted):
            # Below this spread the deviations from the mean are rounding errors of float64.
            if float(np.ptp(values)) <= 1e-12 * float(np.abs(values).max()):
                return 0.0
        found = score(expected.astype(np.float64), predicted.astype(np.float64))
        return float(getattr(found, "statistic", found))

    return checked


_SCORES: dict[str, Callable[[NDArray[Any], NDArray[Any]], Any]] = {
    "accuracy": metrics.accuracy_score,
    "f1": _f1,
    "matthews": _unless_constant(metrics.matthews_corrcoef),
    "pearson": _unless_constant(scipy.stats.pearsonr),
    "spearman": _unless_constant(scipy.stats.spearmanr),
}
