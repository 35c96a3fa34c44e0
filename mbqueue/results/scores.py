"""Scores of a fold and of an experiment, as matbench defines them.

    mae        mean |p − t|
    rmse       sqrt(mean (p − t)²)
    median     median |p − t| (not among matbench's)
    max_error  max |p − t|
    mape       mean |(t − p) / t| over |t| > 1e-5           (a share, not per cent)

with targets t and predictions p, all but mape in their unit; over folds: mean and population standard deviation
(``numpy.std``), as in ``MatbenchTask.scores``.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, fields

import numpy as np
from numpy.typing import NDArray

from mbqueue.errors import ResultsError

#: Targets smaller than this do not count in mape (matbench.data_ops.mean_absolute_percentage_error).
MAPE_THRESHOLD = 1e-5


@dataclass(frozen=True, kw_only=True)
class Scores:
    """Scores of one test part; ``mape`` is None when every target is practically zero."""

    n: int
    mae: float
    rmse: float
    median: float
    max_error: float
    mape: float | None

    def to_json(self) -> dict[str, float | int | None]:
        """As plain JSON values."""
        return asdict(self)


SCORE_NAMES = tuple(field.name for field in fields(Scores) if field.name != "n")


def score(y_true: NDArray[np.float64], y_pred: NDArray[np.float64]) -> Scores:
    """Scores of predictions against targets, both float64 [N] in one unit.

    Raises:
        ResultsError: when there is nothing to score.
    """
    if len(y_true) == 0:
        raise ResultsError("A test part without crystals has no scores. Use a dataset of at least five crystals.")
    error = np.abs(y_pred - y_true)
    counted = np.abs(y_true) > MAPE_THRESHOLD
    return Scores(
        n=len(y_true),
        mae=float(error.mean()),
        rmse=float(np.sqrt(np.square(error).mean())),
        median=float(np.median(error)),
        max_error=float(error.max()),
        mape=float((error[counted] / np.abs(y_true[counted])).mean()) if counted.any() else None,
    )


def over_folds(scores: Iterable[Mapping[str, float | int | None]]) -> dict[str, dict[str, float] | None]:
    """``{"mae": {"mean": …, "std": …}, …}`` over folds; None where a fold has no such score."""
    per_fold = list(scores)
    summary: dict[str, dict[str, float] | None] = {}
    for name in SCORE_NAMES:
        values = [value for entry in per_fold if (value := entry[name]) is not None]
        complete = bool(values) and len(values) == len(per_fold)
        summary[name] = {"mean": float(np.mean(values)), "std": float(np.std(values))} if complete else None
    return summary
