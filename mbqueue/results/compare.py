"""Compare experiments by their scores, and by the difference between their errors on each crystal.

For crystals that two experiments both predicted, d = |error of B| − |error of A|, which is negative if B is better. The
interval is mean(d) ± t · s / √n, with Student's t at n − 1 degrees of freedom for the 95 % level. The interval accounts
for the choice of test crystals, but not for the choice of the training seed or for the training data that folds have in
common. So the comparison also shows the difference on each fold.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mbqueue.errors import ResultsError, UsageError, counted
from mbqueue.results.folder import Recorded
from mbqueue.results.tables import Predictions

CONFIDENCE = 0.95


@dataclass(frozen=True, kw_only=True)
class PairedDifference:
    """The difference between experiments ``a`` and ``b`` on the ``n`` crystals that both predicted, in the target's
    unit.

    Attributes:
        mae_a, mae_b: each experiment's MAE on the shared crystals.
        mean, low, high: mean of |error b| − |error a|, and its 95 % interval; None for fewer than two crystals.
        share_better: fraction of the shared crystals on which b's error is smaller.
        per_fold: fold → mean difference, for folds with the same crystals in both experiments.
    """

    a: str
    b: str
    n: int
    mae_a: float
    mae_b: float
    mean: float
    low: float | None
    high: float | None
    share_better: float
    per_fold: dict[int, float]

    @property
    def verdict(self) -> str:
        """A phrase that says which experiment is better, at the 95 % level."""
        if self.low is None or self.high is None:
            return "too few crystals in common to tell"
        if self.high < 0:
            return f"{self.b} is better"
        if self.low > 0:
            return f"{self.a} is better"
        return "no significant difference on these crystals"


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """The compared experiments, in the given order, and the difference for every pair."""

    recorded: tuple[Recorded, ...]
    labels: tuple[str, ...]
    pairs: tuple[PairedDifference, ...]

    @property
    def board(self) -> list[Mapping[str, Any]]:
        """The rows of the leaderboard; empty unless all experiments used the complete dataset of a matbench task."""
        is_official = all(one.content["dataset"]["official"] for one in self.recorded)
        return self.recorded[0].board if is_official else []


def compare(recorded: Sequence[Recorded]) -> Comparison:
    """Compare two or more recorded experiments on the same crystals.

    Raises:
        UsageError: if there are fewer than two experiments.
        ResultsError: if two experiments have different kinds or units of target, share no crystal, or disagree on a
            target value, which means that their data differ.
    """
    if len(recorded) < 2:
        raise UsageError("Name at least two experiments to compare.")
    labels = _labels(recorded)
    first = recorded[0].target
    for label, one in zip(labels, recorded, strict=True):
        if (one.target.kind, one.target.unit) != (first.kind, first.unit):
            raise ResultsError(
                f"The errors of {labels[0]} and {label} cannot be compared. {labels[0]} predicts the {first.axis}, of "
                f"kind {first.kind}, and {label} the {one.target.axis}, of kind {one.target.kind}. Compare experiments "
                "with the same target and unit."
            )
    pairs = [_pair(recorded[i], recorded[j], labels[i], labels[j]) for i, j in combinations(range(len(recorded)), 2)]
    return Comparison(recorded=tuple(recorded), labels=labels, pairs=tuple(pairs))


def _labels(recorded: Sequence[Recorded]) -> tuple[str, ...]:
    """Label each experiment with its name, and with the day if two experiments have the same name."""
    names = [one.name for one in recorded]
    return tuple(
        name if names.count(name) == 1 else f"{name} ({one.content['run']['enqueued_on']})"
        for name, one in zip(names, recorded, strict=True)
    )


def _pair(a: Recorded, b: Recorded, label_a: str, label_b: str) -> PairedDifference:
    rows_a, rows_b = _common_rows(a.all_predictions, b.all_predictions)
    if not len(rows_a):
        raise ResultsError(f"{label_a} and {label_b} have no test crystals in common, so they cannot be compared.")
    all_a, all_b = a.all_predictions, b.all_predictions
    unequal = np.flatnonzero(all_a.y_true[rows_a] != all_b.y_true[rows_b])
    if unequal.size:
        first = rows_a[unequal[0]]
        raise ResultsError(
            f"{label_a} and {label_b} have different targets for {counted(unequal.size, 'crystal')}, such as "
            f"{all_a.ids[first]}. Compare experiments on the same dataset."
        )
    error_a, error_b = all_a.abs_error[rows_a], all_b.abs_error[rows_b]
    differences = error_b - error_a
    margin = _margin(differences)
    mean = float(differences.mean())
    return PairedDifference(
        a=label_a,
        b=label_b,
        n=len(differences),
        mae_a=float(error_a.mean()),
        mae_b=float(error_b.mean()),
        mean=mean,
        low=None if margin is None else mean - margin,
        high=None if margin is None else mean + margin,
        share_better=float((differences < 0).mean()),
        per_fold={
            fold: b.content["folds"][str(fold)]["scores"]["mae"] - a.content["folds"][str(fold)]["scores"]["mae"]
            for fold in sorted(set(a.folds) & set(b.folds))
            if set(a.predictions[fold].ids) == set(b.predictions[fold].ids)
        },
    )


def _common_rows(a: Predictions, b: Predictions) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """For the crystals that ``a`` and ``b`` share, return the row numbers in both, in the order of ``a``."""
    row_in_b = {crystal_id: row for row, crystal_id in enumerate(b.ids)}
    rows = [(row, row_in_b[crystal_id]) for row, crystal_id in enumerate(a.ids) if crystal_id in row_in_b]
    table = np.array(rows, dtype=np.int64).reshape(-1, 2)
    return table[:, 0], table[:, 1]


def _margin(differences: NDArray[np.float64]) -> float | None:
    n = len(differences)
    if n < 2:
        return None
    # scipy is slow to import, and most commands do not need it; its type stubs are a separate package.
    from scipy import stats  # type: ignore[import-untyped, unused-ignore]  # noqa: PLC0415

    quantile = float(stats.t.ppf((1 + CONFIDENCE) / 2, n - 1))
    return quantile * float(differences.std(ddof=1)) / math.sqrt(n)
