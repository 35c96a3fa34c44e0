"""Check cells with compiled functions: volume, extent of a neighbour search, overlapping atoms, number of bonds."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from mbqueue.data.machine_code import compiled


@compiled
def _spacings(lattice: Any, spacings: Any) -> float:
    """Return the volume, Å³; fill ``spacings``, float64 [3], with the distances between lattice planes, Å."""
    volume = 0.0
    for axis in range(3):
        a, b, c = axis, (axis + 1) % 3, (axis + 2) % 3
        x = lattice[b, 1] * lattice[c, 2] - lattice[b, 2] * lattice[c, 1]
        y = lattice[b, 2] * lattice[c, 0] - lattice[b, 0] * lattice[c, 2]
        z = lattice[b, 0] * lattice[c, 1] - lattice[b, 1] * lattice[c, 0]
        volume = abs(lattice[a, 0] * x + lattice[a, 1] * y + lattice[a, 2] * z)
        if volume == 0.0:
            return 0.0
        spacings[axis] = volume / math.sqrt(x * x + y * y + z * z)
    return volume


@compiled
def examine(frac: Any, lattice: Any, overlap: float) -> Any:
    """Compute quantities that show quickly whether a cell is usable.

    A bond search uses the coordinates as given, so its cost grows with the size of the box around all atoms. The box
    around all atoms is far larger than the cell if coordinates are not wrapped.

    Args:
        frac: fractional coordinates, float64 [n, 3], finite.
        lattice: rows are lattice vectors, Å, float64 [3, 3], finite.
        overlap: distance, Å, below which two atoms count as overlapping.

    Returns:
        the volume, Å³; the number of periodic images to search around one atom, and around all atoms, up to 6 Å; the
        number of 6 Å cubes or of copies of atoms in the box around all atoms, whichever is larger; an upper bound on
        the numbers of bonds and angles; the first two overlapping atoms as i · n + j, or -1. For a flat cell, the
        volume is 0 and the other numbers are meaningless. The overlap check covers only pairs of different atoms, at
        the image that is nearest in fractional coordinates. If the distance between lattice planes is less than twice
        ``overlap``, the upper bound is infinite. The caller then runs ``count_neighbors``, which checks all images.
    """
    n_atoms = len(frac)
    spacings = np.empty(3)
    volume = _spacings(lattice, spacings)
    if volume == 0.0:
        return 0.0, 0.0, 0.0, 0.0, 0.0, -1
    images, all_images, cubes, near, short, thinnest = 1.0, 1.0, 1.0, 1.0 * n_atoms, 1.0 * n_atoms, np.inf
    for axis in range(3):
        low, high, low_frac, high_frac = np.inf, -np.inf, np.inf, -np.inf
        for atom in range(n_atoms):
            place = (
                frac[atom, 0] * lattice[0, axis] + frac[atom, 1] * lattice[1, axis] + frac[atom, 2] * lattice[2, axis]
            )
            low, high = min(low, place), max(high, place)
            low_frac, high_frac = min(low_frac, frac[atom, axis]), max(high_frac, frac[atom, axis])
        around = 2.0 * (6.15 / spacings[axis] + 1.0) + 1.0
        images *= around
        all_images *= around + high_frac - low_frac
        cubes *= (high - low) / 6.0 + 3.0
        near *= math.floor(12.0 / spacings[axis]) + 1.0
        short *= math.floor(6.0 / spacings[axis]) + 1.0
        thinnest = min(thinnest, spacings[axis])
    cubes *= max(1.0, 6.0**3 * n_atoms / volume)
    most = np.inf if thinnest < 2.0 * overlap else n_atoms * max(near, short * short)
    for i in range(n_atoms):
        for j in range(i + 1, n_atoms):
            u, v, w = frac[i, 0] - frac[j, 0], frac[i, 1] - frac[j, 1], frac[i, 2] - frac[j, 2]
            u, v, w = u - math.floor(u + 0.5), v - math.floor(v + 0.5), w - math.floor(w + 0.5)
            squared = 0.0
            for axis in range(3):
                part = u * lattice[0, axis] + v * lattice[1, axis] + w * lattice[2, axis]
                squared += part * part
            if squared < overlap * overlap:
                return volume, images, all_images, cubes, most, i * n_atoms + j
    return volume, images, all_images, cubes, most, -1


@compiled
def count_neighbors(frac: Any, lattice: Any, overlap: float, limit: float) -> Any:
    """Count a cell's bonds and angles over all images of all pairs of atoms; stop once either exceeds ``limit``.

    Args:
        frac: fractional coordinates, float64 [n, 3].
        lattice: rows are lattice vectors, Å, float64 [3, 3].
        overlap: distance, Å, below which two atoms, or an atom and its own image, count as overlapping.
        limit: the largest allowed number of bonds, and of angles.

    Returns:
        the number of directed bonds of up to 6 Å; the number of angles, which are pairs of bonds of up to 3 Å at one
        atom; the first two overlapping atoms as i · n + j, or -1. If counting stops early, the counts may be too low.
    """
    spacings = np.empty(3)
    _spacings(lattice, spacings)
    n_bonds, n_angles = 0, 0
    for i in range(len(frac)):
        n_short = 0
        for j in range(len(frac)):
            u, v, w = frac[j, 0] - frac[i, 0], frac[j, 1] - frac[i, 1], frac[j, 2] - frac[i, 2]
            for a in range(math.ceil(-u - 6.0 / spacings[0]), math.floor(-u + 6.0 / spacings[0]) + 1):
                for b in range(math.ceil(-v - 6.0 / spacings[1]), math.floor(-v + 6.0 / spacings[1]) + 1):
                    for c in range(math.ceil(-w - 6.0 / spacings[2]), math.floor(-w + 6.0 / spacings[2]) + 1):
                        if i == j and a == 0 and b == 0 and c == 0:
                            continue
                        squared = 0.0
                        for axis in range(3):
                            part = (u + a) * lattice[0, axis] + (v + b) * lattice[1, axis] + (w + c) * lattice[2, axis]
                            squared += part * part
                        if squared < overlap * overlap:
                            return n_bonds, n_angles, i * len(frac) + j
                        n_bonds += int(squared < 36.0)
                        n_short += int(squared < 9.0)
                    if n_bonds > limit or n_angles + n_short * (n_short - 1) > limit:
                        return n_bonds, n_angles + n_short * (n_short - 1), -1
        n_angles += n_short * (n_short - 1)
    return n_bonds, n_angles, -1
