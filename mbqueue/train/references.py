"""Element references (CHGNet's AtomRef), fitted in closed form.

CHGNet predicts a total energy: an interaction energy plus one reference energy per element. For another target, such
as the formation energy, the references that go best with a fixed interaction energy are a linear least-squares fit of
target − interaction energy on the composition.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

#: Elements that CHGNet knows, H to Pu.
N_ELEMENTS = 94


@dataclass(frozen=True, kw_only=True)
class References:
    """Reference energy of each element.

    Attributes:
        energies: eV/atom, float64 [94], element Z at Z − 1; 0 for elements that were not in the fit.
        absent: atomic numbers of those elements, ascending.
    """

    energies: NDArray[np.float64]
    absent: tuple[int, ...]


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
    """References that minimise the squared error of interaction energy + references against the targets.

    Of elements that always come in a fixed ratio, only the sum is determined; the smallest solution is taken.

    Args:
        shares: share of each element in each crystal, [N, 94] (see `compositions`).
        targets: formation energy, eV/atom, [N].
        interaction: interaction energy, eV/atom, [N].
    """
    present = np.flatnonzero(shares.any(axis=0))
    energies = np.zeros(N_ELEMENTS)
    if len(present):
        rest = targets.astype(np.float64) - interaction.astype(np.float64)
        energies[present] = np.linalg.lstsq(shares[:, present], rest, rcond=None)[0]
    absent = np.setdiff1d(np.arange(N_ELEMENTS), present) + 1
    return References(energies=energies, absent=tuple(int(z) for z in absent))
