"""The metrics of GLUE, finite for every finite input."""

from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np
import scipy.stats
from numpy.typing import ArrayLike
from sklearn import metrics

from leantune.training.data import Task


def compute(task: Task, predictions: ArrayLike, references: ArrayLike) -> dict[str, float]:
    """Return every metric of the task; a constant scores 0 where a correlation is undefined.

    ``f1`` is that of class 1, or the mean over the classes (macro) where there are more than two.

    Args:
        task: of kind classification or regression.
        predictions: (n,) class ids or finite scores; n >= 1.
        references: (n,) class ids or scores.
    """
    predicted, expected = np.asarray(predictions), np.asarray(references)
    return {name: float(_SCORES[name](expected, predicted)) for name in task.metrics}


def metrics_of_logits(task: Task) -> Callable[[Any], dict[str, float]] | None:
    """Return the ``compute_metrics`` of ``transformers.Trainer``; None for a language model.

    Of logits that are not finite every metric is NaN: who watches the training knows the step.
    """

    def compute_metrics(evaluated: Any) -> dict[str, float]:
        outputs = evaluated.predictions
        logits = np.asarray(outputs[0] if isinstance(outputs, tuple) else outputs)
        # The arg max of NaN is a class id like any other.
        if not np.isfinite(logits).all():
            return dict.fromkeys(task.metrics, float("nan"))
        is_score = task.kind == "regression"
        predictions = logits.reshape(-1) if is_score else logits.argmax(axis=-1)
        return compute(task, predictions, evaluated.label_ids)

    return None if task.is_language_model else compute_metrics


def floor_score(task: Task, train_labels: Any, validation_labels: Any) -> dict[str, Any]:
    """Return the main metric of a model that ignores its input, which any result must beat.

    It always answers the most frequent class of train (the first of two), or the mean score.
    """
    train, validation = sorted(train_labels), list(validation_labels)
    if task.kind == "regression":
        name, answer = "mean", float(np.mean(train))
    else:
        name, answer = "majority", Counter(train).most_common(1)[0][0]
    scores = compute(task, np.full(len(validation), answer), validation)
    return {"name": name, "value": scores[task.main_metric]}


def _f1(expected: Any, predicted: Any) -> Any:
    average: Any = "binary" if max(predicted.max(), expected.max()) <= 1 else "macro"
    zero: Any = 0
    return metrics.f1_score(expected, predicted, average=average, zero_division=zero)


def _unless_constant(score: Callable[..., Any]) -> Callable[[Any, Any], Any]:
    def checked(expected: Any, predicted: Any) -> Any:
        for values in (expected, predicted):
            # Below this spread the deviations from the mean are rounding errors of float64.
            if np.ptp(values) <= 1e-12 * np.abs(values).max():
                return 0.0
        found = score(expected, predicted)
        return getattr(found, "statistic", found)

    return checked


_SCORES: dict[str, Callable[[Any, Any], Any]] = {
    "accuracy": metrics.accuracy_score,
    "f1": _f1,
    "matthews": _unless_constant(metrics.matthews_corrcoef),
    "pearson": _unless_constant(scipy.stats.pearsonr),
    "spearman": _unless_constant(scipy.stats.spearmanr),
}
