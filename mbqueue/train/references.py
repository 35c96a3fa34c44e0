"""Fit the linear model of the composition that every training run starts from.

CHGNet predicts the mean of its read-out over the atoms, plus a constant for each element, weighted by the element's
fraction of the atoms (CHGNet's AtomRef). For energies, the elements' constants are reference energies, fitted on top
of the pretrained read-out. For other targets, the elements' constants come from a regression of the target on the
composition.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

#: The number of elements that CHGNet supports: H to Pu.
N_ELEMENTS = 94
#: Candidate ridge strengths; at strength 1, the penalty counts as much as one crystal.
_RIDGES = 10.0 ** np.arange(-3, 2.01, 0.5)
#: The ridge strength for logistic regression: the penalty counts as much as one crystal. The strength is fixed, because
#: the leave-one-out error of logistic regression has no closed form.
_LOGISTIC_RIDGE = 1.0
_NEWTON_STEPS = 30


@dataclass(frozen=True, kw_only=True)
class References:
    """The elements' contributions to a prediction, each weighted by the element's fraction of a crystal's atoms.

    Attributes:
        values: contributions in the unit of the model's output, float64 [94], element Z at index Z − 1.
        absent: atomic numbers of the elements missing from the fitted crystals, ascending.
    """

    values: NDArray[np.float64]
    absent: tuple[int, ...]

    def predict(self, shares: NDArray[np.float64]) -> NDArray[np.float64]:
        """Return the part of the output that depends on the composition, [N], from element fractions, [N, 94]."""
        return shares @ self.values


def compositions(atomic_numbers: NDArray[np.uint8], atom_offsets: NDArray[np.int64]) -> NDArray[np.float64]:
    """Compute each element's fraction of each crystal's atoms, float64 [N, 94].

    Args:
        atomic_numbers: atomic number of each atom, [A].
        atom_offsets: index of each crystal's first atom, [N + 1].
    """
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

    If elements always occur in a fixed ratio, many solutions fit equally well, and the function returns the solution
    with the smallest norm. An element missing from all crystals gets a reference of 0.

    Args:
        shares: fraction of each element in each crystal, [N, 94] (see `compositions`).
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
    """Fit a scalar target to the composition by ridge regression, regularised towards the mean of the targets.

    The fractions of a crystal's elements add up to one, so adding the mean to every element's value adds the mean to
    every prediction. An element missing from all crystals gets the mean of the targets. The ridge strength minimises
    the mean squared leave-one-out error. The leave-one-out error of crystal i is r_i / (1 − h_i), where r contains the
    residuals and h is the diagonal of the hat matrix.

    Args:
        shares: fraction of each element in each crystal, [N, 94].
        targets: target of each crystal, [N].
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
    """Fit a class to the composition by logistic ridge regression, regularised towards the overall log-odds.

    Newton's method starts from the overall log-odds. An element missing from all crystals keeps the overall log-odds.

    Args:
        shares: fraction of each element in each crystal, [N, 94].
        classes: class of each crystal, 0 or 1, [N]; both classes must occur.
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
    """Estimate the residuals' standard deviation, rounded to a power of two of at least 2⁻³⁰.

    The estimate uses the mean absolute residual, so that outliers (such as a refractive index of 60) do not dominate.
    """
    spread = float(np.abs(residuals).mean()) * np.sqrt(np.pi / 2)
    return float(2.0 ** np.round(np.log2(max(spread, 2.0**-30))))


def _present(shares: NDArray[np.float64]) -> NDArray[np.int64]:
    return np.flatnonzero(shares.any(axis=0))


def _absent(present: NDArray[np.int64]) -> tuple[int, ...]:
    return tuple(int(z) for z in np.setdiff1d(np.arange(N_ELEMENTS), present) + 1)
