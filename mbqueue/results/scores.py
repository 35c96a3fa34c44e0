"""Scores of a fold and of an experiment, as matbench defines them.

For numeric targets t and predictions p (every score except mape has their unit):

    mae        mean |p − t|
    rmse       sqrt(mean (p − t)²)
    median     median |p − t| (not among matbench's)
    max_error  max |p − t|
    mape       mean |(t − p) / t| over |t| > 1e-5 (a fraction, not per cent)

For classes, with targets 0 or 1 and predicted probabilities p of class 1 (above 0.5 counts as class 1):

    rocauc             area under the curve of true against false positive rate, over all thresholds of p
    accuracy           fraction of crystals whose class is predicted correctly
    balanced_accuracy  mean of the accuracy on class 1 and the accuracy on class 0
    f1                 2 TP / (2 TP + FP + FN)
    log_loss           mean of −log of the probability given to the right class, which counts as at least 1e-12
    mae                mean |p − t|

matbench 0.6 turns probabilities into classes before it computes its ``rocauc``, which therefore equals
`balanced_accuracy` here. Scores over folds are the mean and the population standard deviation (``numpy.std``), as in
``MatbenchTask.scores``.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from mbqueue.errors import ResultsError
from mbqueue.task import Target

#: MAPE leaves out targets within this distance of 0 (matbench.data_ops.mean_absolute_percentage_error).
MAPE_THRESHOLD = 1e-5
#: Above this probability, a crystal counts as class 1 (matbench.constants.CLF_THRESH).
CLASS_THRESHOLD = 0.5
_LEAST_PROBABILITY = 1e-12

#: Score → value, or None if the score is not defined for these crystals. ``n`` is the number of crystals.
Scores = dict[str, float | int | None]


@dataclass(frozen=True, kw_only=True)
class Measure:
    """A score and how to show it.

    Attributes:
        key: key in results.json.
        label: the score's column header.
        is_error: whether lower values are better.
    """

    key: str
    label: str
    is_error: bool


_MAE = Measure(key="mae", label="MAE", is_error=True)
_NUMBER_MEASURES = (
    _MAE,
    Measure(key="rmse", label="RMSE", is_error=True),
    Measure(key="median", label="Median", is_error=True),
    Measure(key="max_error", label="Largest", is_error=True),
    Measure(key="mape", label="MAPE", is_error=True),
)
_CLASS_MEASURES = (
    Measure(key="rocauc", label="ROC-AUC", is_error=False),
    Measure(key="accuracy", label="Accuracy", is_error=False),
    Measure(key="balanced_accuracy", label="Balanced accuracy", is_error=False),
    Measure(key="f1", label="F1", is_error=False),
    Measure(key="log_loss", label="Log loss", is_error=True),
    _MAE,
)


def measures_of(target: Target) -> tuple[Measure, ...]:
    """The scores of a target, the main one first."""
    return _CLASS_MEASURES if target.is_class else _NUMBER_MEASURES


def leaderboard_measure(target: Target) -> Measure:
    """The score that matbench's leaderboard lists."""
    return _CLASS_MEASURES[2] if target.is_class else _MAE


def score(y_true: NDArray[np.float64], y_pred: NDArray[np.float64], target: Target) -> Scores:
    """Compute the scores of predictions against targets, both float64 [N].

    Raises:
        ResultsError: if there are no predictions.
    """
    if len(y_true) == 0:
        raise ResultsError("A test set without crystals has no scores. Use a dataset of at least five crystals.")
    if target.is_class:
        return {"n": len(y_true), **_of_classes(y_true > CLASS_THRESHOLD, y_pred)}
    error = np.abs(y_pred - y_true)
    counted = np.abs(y_true) > MAPE_THRESHOLD
    return {
        "n": len(y_true),
        "mae": float(error.mean()),
        "rmse": float(np.sqrt(np.square(error).mean())),
        "median": float(np.median(error)),
        "max_error": float(error.max()),
        "mape": float((error[counted] / np.abs(y_true[counted])).mean()) if counted.any() else None,
    }


def _of_classes(is_one: NDArray[np.bool_], probability: NDArray[np.float64]) -> Scores:
    said_one = probability > CLASS_THRESHOLD
    right = said_one == is_one
    hits, both = int((said_one & is_one).sum()), 0 < int(is_one.sum()) < len(is_one)
    of_right = np.clip(np.where(is_one, probability, 1 - probability), _LEAST_PROBABILITY, None)
    return {
        "rocauc": roc_auc(is_one, probability) if both else None,
        "accuracy": float(right.mean()),
        "balanced_accuracy": float((right[is_one].mean() + right[~is_one].mean()) / 2) if both else None,
        "f1": 2 * hits / max(1, int(said_one.sum()) + int(is_one.sum())),
        "log_loss": float(-np.log(of_right).mean()),
        "mae": float(np.abs(probability - is_one).mean()),
    }


def roc_auc(is_one: NDArray[np.bool_], probability: NDArray[np.float64]) -> float:
    """Area under the ROC curve (Mann-Whitney).

    The area is the fraction of all pairs of crystals, one of each class, in which the crystal of class 1 has the higher
    probability.

    Args:
        is_one: whether each crystal is of class 1, [N]; both values must occur.
        probability: probability of class 1, [N]; ties count half.
    """
    _, position, counts = np.unique(probability, return_inverse=True, return_counts=True)
    ranks = (np.cumsum(counts) - (counts - 1) / 2)[position]
    ones = int(is_one.sum())
    return float((ranks[is_one].sum() - ones * (ones + 1) / 2) / (ones * (len(is_one) - ones)))


def over_folds(
    scores: Iterable[Mapping[str, float | int | None]], target: Target
) -> dict[str, dict[str, float] | None]:
    """Compute the mean and population standard deviation of each score over folds: score → ``mean`` and ``std``.

    A score is None if it is missing in any fold.
    """
    per_fold = list(scores)
    summary: dict[str, dict[str, float] | None] = {}
    for measure in measures_of(target):
        values = [value for entry in per_fold if (value := entry[measure.key]) is not None]
        complete = bool(values) and len(values) == len(per_fold)
        summary[measure.key] = {"mean": float(np.mean(values)), "std": float(np.std(values))} if complete else None
    return summary
