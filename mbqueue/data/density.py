"""Compute the density of a cell."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

#: Atomic weights by atomic number, in g/mol: a zero, then the standard values for H to Pu (IUPAC 2005). For an element
#: without a standard value, the weight is that of its longest-lived isotope.
# fmt: off
_MASSES = np.array(
    [
        0.0, 1.0079, 4.0026, 6.941, 9.0122, 10.811, 12.0107, 14.0067, 15.9994, 18.9984, 20.1797, 22.9898,
        24.305, 26.9815, 28.0855, 30.9738, 32.065, 35.453, 39.948, 39.0983, 40.078, 44.9559, 47.867, 50.9415,
        51.9961, 54.938, 55.845, 58.9332, 58.6934, 63.546, 65.409, 69.723, 72.64, 74.9216, 78.96, 79.904,
        83.798, 85.4678, 87.62, 88.9059, 91.224, 92.9064, 95.94, 98.0, 101.07, 102.9055, 106.42, 107.8682,
        112.411, 114.818, 118.71, 121.76, 127.6, 126.9045, 131.293, 132.9055, 137.327, 138.9055, 140.116,
        140.9076, 144.242, 145.0, 150.36, 151.964, 157.25, 158.9254, 162.5, 164.9303, 167.259, 168.9342,
        173.04, 174.967, 178.49, 180.9479, 183.84, 186.207, 190.23, 192.217, 195.084, 196.9666, 200.59,
        204.3833, 207.2, 208.9804, 210.0, 210.0, 220.0, 223.0, 226.0, 227.0, 232.0381, 231.0359, 238.0289,
        237.0, 244.0,
    ]
)
# fmt: on
#: The factor from g/mol per Å³ to g/cm³: 10²⁴ divided by Avogadro's number.
_GRAMS_PER_CM3 = 1.66053907


def density_of(atomic_numbers: NDArray[np.integer], volume: float) -> float:
    """Density, g/cm³, of a cell of ``volume`` Å³ with the given atoms (Z from 1 to 94)."""
    return float(_MASSES[atomic_numbers].sum()) * _GRAMS_PER_CM3 / volume
