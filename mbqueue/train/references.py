"""Fit the linear model of the composition that every training starts from.

CHGNet's prediction is the mean of its read-out over atoms, plus one number for each element in proportion to its share
(CHGNet's AtomRef). For an energy, the read-out's part is known, and the numbers are reference energies. For any other
target, the numbers come from a regression of the target on the composition.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

#: Elements that CHGNet knows, H to Pu.
N_ELEMENTS = 94
#: Candidate ridge strengths, in crystals.
_RIDGES = 10.0 ** np.arange(-3, 2.01, 0.5)
#: Ridge strength of logistic regression, whose leave-one-out error has no closed form: the weight of one crystal.
_LOGISTIC_RIDGE = 1.0
_NEWTON_STEPS = 30


@dataclass(frozen=True, kw_only=True)
class References:
    """The contribution of each element to a prediction, in proportion to its share.

    Attributes:
        values: contributions in the unit of the model's output, float64 [94], element Z at index Z − 1.
        absent: atomic numbers of the elements that were not in the fit, ascending.
    """

    values: NDArray[np.float64]
    absent: tuple[int, ...]

    def predict(self, shares: NDArray[np.float64]) -> NDArray[np.float64]:
        """The part of the output that depends on the composition, [N], for shares [N, 94]."""
        return shares @ self.values


def compositions(atomic_numbers: NDArray[np.uint8], atom_offsets: NDArray[np.int64]) -> NDArray[np.float64]:
    """Share of each element in each crystal, float64 [N, 94], from Z of each atom [A] and offsets [N + 1]."""
    n = len(atom_offsets) - 1
    sizes = np.diff(atom_offsets)
    owners = np.repeat(np.arange(n), sizes)
    first, last = int(atom_offsets[0]), int(atom_offsets[-1])
    counts = np.bincount(
        owners * N_ELEMENTS + atomic_numbers[first:last].astype(np.int64) - 1, minlength=n * N_ELEMENTS
    )
    return counts.reshape(n, N_ELEMENTS) / sizes[:, None]


def fit_references(
    shares: NDArray[np.float64], targets: NDArray[np.float64], interaction: NDArray[np.floating]
) -> References:
    """Fit references that minimise the squared error of interaction energy + references against the targets.

    For elements that always occur in a fixed ratio, the data determine only the sum; the fit takes the solution of
    smallest norm. Elements missing from all crystals get 0.

    Args:
        shares: share of each element in each crystal, [N, 94] (see `compositions`).
        targets: formation energy, eV/atom, [N].
        interaction: interaction energy, eV/atom, [N].
    """
    present = _present(shares)
    values = np.zeros(N_ELEMENTS)
    if len(present):
        rest = targets.astype(np.float64) - interaction.astype(np.float64)
        values[present] = np.linalg.lstsq(shares[:, present], rest, rcond=None)[0]
    return References(values=values, absent=_absent(present))


def fit_composition(shares: NDArray[np.float64], targets: NDArray[np.float64]) -> References:
    """Ridge regression of a scalar on the composition, regularised towards the mean of the targets.

    Shares add up to one, so adding the mean to every element's value adds the mean to every prediction. An element
    missing from all crystals gets the mean. The strength minimises the leave-one-out squared error, which has a closed
    form: r_i / (1 − h_i), with the residuals r and the diagonal h of the hat matrix.

    Args:
        shares: [N, 94]. targets: [N].
    """
    present = _present(shares)
    mean = float(targets.mean())
    design, rest = shares[:, present], targets - mean
    eigenvalues, vectors = np.linalg.eigh(design.T @ design)
    rotated, projected = design @ vectors, vectors.T @ (design.T @ rest)
    best, values = np.inf, np.full(N_ELEMENTS, mean)
    for ridge in _RIDGES:
        weights = projected / (eigenvalues + ridge)
        leverage = np.square(rotated) @ (1 / (eigenvalues + ridge))
        error = float(np.square((rest - rotated @ weights) / (1 - leverage)).mean())
        if error < best:
            best = error
            values[present] = mean + vectors @ weights
    return References(values=values, absent=_absent(present))


def fit_classes(shares: NDArray[np.float64], classes: NDArray[np.float64]) -> References:
    """Logistic ridge regression of a class on the composition, regularised towards the overall log-odds.

    Newton's method starts from the overall log-odds, and an element missing from all crystals keeps this value.

    Args:
        shares: [N, 94]. classes: 0 or 1, [N]; both must occur.
    """
    present = _present(shares)
    share_of_ones = float(classes.mean())
    base = float(np.log(share_of_ones / (1 - share_of_ones)))
    design, weights = shares[:, present], np.zeros(len(present))
    for _ in range(_NEWTON_STEPS):
        probability = 1 / (1 + np.exp(-(base + design @ weights)))
        gradient = design.T @ (classes - probability) - _LOGISTIC_RIDGE * weights
        curvature = (design * (probability * (1 - probability))[:, None]).T @ design
        step = np.linalg.solve(curvature + _LOGISTIC_RIDGE * np.eye(len(present)), gradient)
        weights += step
        if np.abs(step).max() < 1e-10:
            break
    values = np.full(N_ELEMENTS, base)
    values[present] += weights
    return References(values=values, absent=_absent(present))


def spread_of(residuals: NDArray[np.float64]) -> float:
    """The power of two nearest the standard deviation of normal residuals with this mean absolute value; at least 2⁻³⁰.

    With the mean absolute value, a few outliers (such as a refractive index of 60) do not set the scale for all.
    """
    spread = float(np.abs(residuals).mean()) * np.sqrt(np.pi / 2)
    return float(2.0 ** np.round(np.log2(max(spread, 2.0**-30))))


def _present(shares: NDArray[np.float64]) -> NDArray[np.int64]:
    return np.flatnonzero(shares.any(axis=0))


def _absent(present: NDArray[np.int64]) -> tuple[int, ...]:
    return tuple(int(z) for z in np.setdiff1d(np.arange(N_ELEMENTS), present) + 1)
