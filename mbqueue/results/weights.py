"""Fit the weights of a blend on crystals that none of its members was trained on."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import optimize, sparse

from mbqueue.errors import ResultsError

#: Probabilities are clipped to stay at least this far from 0 and 1, so that no single crystal dominates.
_SUREST = 1e-6


def fitted_weights(
    predictions: Mapping[str, NDArray[np.float64]], targets: NDArray[np.float64], *, is_class: bool
) -> dict[str, float]:
    """Fit non-negative weights that add up to one, so that the blend fits the targets best.

    For numeric targets, minimise the mean absolute error with a linear program, whose variables are the weights and a
    bound on each crystal's error. For classes, minimise the log loss, which is convex in the weights.

    Args:
        predictions: member → its predictions for crystals that it was not trained on, [V].
        targets: the crystals' targets, [V].

    Raises:
        ResultsError: if the solver fails.
    """
    columns = np.stack(list(predictions.values()), axis=1)
    found = _likeliest(columns, targets) if is_class else _nearest(columns, targets)
    if not found.success:
        raise ResultsError(f"No weights can be fitted to these predictions ({found.message}). Use --weights mean.")
    weights = np.clip(found.x[: columns.shape[1]], 0.0, None)
    return dict(zip(predictions, (weights / weights.sum()).tolist(), strict=True))


def _nearest(columns: NDArray[np.float64], targets: NDArray[np.float64]) -> Any:
    n, members = columns.shape
    error = sparse.identity(n, format="csr")
    values = sparse.csr_matrix(columns)
    return optimize.linprog(
        np.concatenate([np.zeros(members), np.full(n, 1 / n)]),
        A_ub=sparse.vstack([sparse.hstack([values, -error]), sparse.hstack([-values, -error])], format="csr"),
        b_ub=np.concatenate([targets, -targets]),
        A_eq=np.concatenate([np.ones(members), np.zeros(n)])[None],
        b_eq=[1.0],
        bounds=[(0, 1)] * members + [(0, None)] * n,
        method="highs",
    )


def _likeliest(columns: NDArray[np.float64], targets: NDArray[np.float64]) -> Any:
    members, is_one = columns.shape[1], targets == 1

    def log_loss(weights: NDArray[np.float64]) -> tuple[float, NDArray[np.float64]]:
        blend = np.clip(columns @ weights, _SUREST, 1 - _SUREST)
        right = np.where(is_one, blend, 1 - blend)
        slope = np.where(is_one, -1.0, 1.0) / right
        return float(-np.log(right).mean()), columns.T @ slope / len(targets)

    return optimize.minimize(
        log_loss,
        np.full(members, 1 / members),
        jac=True,
        method="SLSQP",
        bounds=[(0, 1)] * members,
        constraints={
            "type": "eq",
            "fun": lambda weights: weights.sum() - 1,
            "jac": np.ones_like,
        },
    )
