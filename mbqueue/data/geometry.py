"""Compiled checks of a cell: its volume, how far a neighbour search in it goes, atoms at one place."""

from __future__ import annotations

import math
from typing import Any

from mbqueue.data.machine_code import compiled


@compiled
def examine(frac: Any, lattice: Any, overlap: float) -> Any:
    """What can make a cell useless.

    Only the nearest image by fractional coordinates is looked at for overlaps, so ``overlap`` has to be small against
    the cell.

    Args:
        frac: fractional coordinates, float64 [n, 3], finite.
        lattice: rows are lattice vectors, Å, float64 [3, 3], finite.
        overlap: atoms nearer than this, Å, are at one place.

    Returns:
        volume, Å³; number of periodic images that a search to 6 Å has to look at (0 for a flat cell); the first two
        atoms at one place as i · n + j, or -1.
    """
    n_atoms = len(frac)
    volume, images = 0.0, 1.0
    for axis in range(3):
        a, b, c = axis, (axis + 1) % 3, (axis + 2) % 3
        x = lattice[b, 1] * lattice[c, 2] - lattice[b, 2] * lattice[c, 1]
        y = lattice[b, 2] * lattice[c, 0] - lattice[b, 0] * lattice[c, 2]
        z = lattice[b, 0] * lattice[c, 1] - lattice[b, 1] * lattice[c, 0]
        volume = abs(lattice[a, 0] * x + lattice[a, 1] * y + lattice[a, 2] * z)
        if volume == 0.0:
            return 0.0, 0.0, -1
        images *= 2.0 * (6.15 * math.sqrt(x * x + y * y + z * z) / volume + 1.0) + 1.0
    for i in range(n_atoms):
        for j in range(i + 1, n_atoms):
            u, v, w = frac[i, 0] - frac[j, 0], frac[i, 1] - frac[j, 1], frac[i, 2] - frac[j, 2]
            u, v, w = u - math.floor(u + 0.5), v - math.floor(v + 0.5), w - math.floor(w + 0.5)
            squared = 0.0
            for axis in range(3):
                part = u * lattice[0, axis] + v * lattice[1, axis] + w * lattice[2, axis]
                squared += part * part
            if squared < overlap * overlap:
                return volume, images, i * n_atoms + j
    return volume, images, -1
