"""Blends: weighted means of several experiments' predictions."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from mbqueue.errors import ResultsError, counted
from mbqueue.results.tables import Predictions

#: The minimum number of crystals for fitting weights: in total, and for each member.
FEWEST_CRYSTALS, FEWEST_PER_MEMBER = 30, 10


def require_enough(n: int, members: int, *, fold: int) -> None:
    """Check that there are enough crystals to fit weights for the given number of members.

    Raises:
        ResultsError: if there are too few crystals.
    """
    fewest = max(FEWEST_CRYSTALS, FEWEST_PER_MEMBER * members)
    if n < fewest:
        raise ResultsError(
            f"In fold {fold}, the members' validation sets share {counted(n, 'crystal')}. Fitting the weights of "
            f"{members} members needs at least {fewest} crystals. Blend with --weights mean, or train members that "
            "share train.validation_seed and train.validation."
        )


def blended(tables: Mapping[str, Predictions], weights: Mapping[str, float]) -> Predictions:
    """Compute the weighted mean of several experiments' predictions for one test set.

    For classes, the predictions are probabilities.

    Args:
        tables: experiment → its predictions.
        weights: experiment → its weight; the weights sum to one.

    Raises:
        ResultsError: if the tables have different crystals or targets.
    """
    (first, reference), *others = tables.items()
    for name, table in others:
        if list(table.ids) != list(reference.ids) or not np.array_equal(table.y_true, reference.y_true):
            raise ResultsError(
                f"The test sets of {first} and {name} have different crystals or targets, so they cannot be blended."
            )
    y_pred = np.zeros(len(reference))
    for name, table in tables.items():
        y_pred += weights[name] * table.y_pred
    return Predictions(reference.ids, reference.compositions, reference.n_atoms, reference.y_true, y_pred)
