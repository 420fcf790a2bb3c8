"""Scores as people report them, by scikit-learn, and their mean and standard deviation over folds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

#: Scores of which mean and standard deviation over folds are reported.
SUMMED_UP = ("accuracy", "macro_f1", "roc_auc")
#: Where the mean ROC curve is drawn: false positive rates from 0 to 1.
GRID = np.linspace(0, 1, 101)


def score(truth: np.ndarray, probabilities: np.ndarray, classes: Sequence[str]) -> dict[str, Any]:
    """Scores of predictions.

    Parameters
    ----------
    truth
        [n] classes, 0 to K - 1.
    probabilities
        [n, K] that sum to one; the greatest is the prediction, the first of equals.
    classes
        [K] names.

    Returns
    -------
    dict
        JSON values: ``accuracy``; ``macro_f1`` (mean over the classes that occur in truth or prediction); ``roc_auc``
        (area of class 1 for two classes, else the mean of each class against the rest; None if a class is absent);
        ``per_class`` with precision, recall, F1, ROC AUC and number of cells; ``confusion`` [K][K] of counts, rows
        truth, columns prediction; ``n``.
    """
    from sklearn.metrics import accuracy_score, confusion_matrix, f1_score, precision_recall_fscore_support

    predicted = probabilities.argmax(1)
    labels = np.arange(len(classes))
    precision, recall, f1, support = precision_recall_fscore_support(truth, predicted, labels=labels, zero_division=0)
    areas = class_areas(truth, probabilities)
    return {
        "n": len(truth),
        "accuracy": float(accuracy_score(truth, predicted)),
        "macro_f1": float(f1_score(truth, predicted, average="macro", zero_division=0)),
        "roc_auc": overall_area(areas),
        "per_class": {
            str(name): {
                "precision": float(precision[code]),
                "recall": float(recall[code]),
                "f1": float(f1[code]),
                "roc_auc": areas[code],
                "n": int(support[code]),
            }
            for code, name in enumerate(classes)
        },
        "confusion": confusion_matrix(truth, predicted, labels=labels).tolist(),
    }


def class_areas(truth: np.ndarray, probabilities: np.ndarray) -> list[float | None]:
    """[K] area under the ROC curve of each class against the rest; None where there is nothing to compare."""
    from sklearn.metrics import roc_auc_score

    areas: list[float | None] = []
    for code in range(probabilities.shape[1]):
        is_class = truth == code
        if is_class.any() and not is_class.all():
            areas.append(float(roc_auc_score(is_class, probabilities[:, code])))
        else:
            areas.append(None)
    return areas


def overall_area(areas: Sequence[float | None]) -> float | None:
    """One area for all classes: of class 1 where there are two, else the mean; None where one is missing."""
    known = [area for area in areas if area is not None]
    if len(known) < len(areas) or not known:
        return None
    return known[1] if len(known) == 2 else float(np.mean(known))


def over_folds(scores: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """Mean, standard deviation (of a sample: divided by n - 1) and values over folds of each overall score."""
    summary = {}
    for name in SUMMED_UP:
        values = [score[name] for score in scores if score[name] is not None]
        if values:
            spread = float(np.std(values, ddof=1)) if len(values) > 1 else None
            summary[name] = {"mean": float(np.mean(values)), "sd": spread, "folds": values}
    return summary


def roc_on_grid(truth: np.ndarray, probabilities: np.ndarray) -> np.ndarray | None:
    """True positive rates [101] at :data:`GRID`: of class 1 for two classes, else the mean over classes.

    None where a class is absent.
    """
    from sklearn.metrics import roc_curve

    codes = [1] if probabilities.shape[1] == 2 else range(probabilities.shape[1])
    curves = []
    for code in codes:
        is_class = truth == code
        if not is_class.any() or is_class.all():
            return None
        false_rate, true_rate, _ = roc_curve(is_class, probabilities[:, code])
        # Of several points at one false positive rate, the highest counts: interp would take any.
        highest = np.r_[np.diff(false_rate) > 0, True]
        curve = np.interp(GRID, false_rate[highest], true_rate[highest])
        curves.append(np.r_[0.0, curve[1:]])
    return np.mean(curves, axis=0)
