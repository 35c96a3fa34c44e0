"""Find the bonds of a crystal in pymatgen's order, with compiled functions.

CHGNet numbers its bonds in the order of pymatgen's ``find_points_in_spheres``. Bonds are sorted by centre atom, then by
the cube of the neighbour (ascending x, y, z), and then by periodic image (i, j, k) and atom, both descending. The cubes
have edges of length ``cutoff``, so only the centre atom's cube and the 26 cubes around it matter. For an atom exactly
on a cell face, or a bond exactly at the cut-off, the result depends on rounding. This module rounds like pymatgen: it
adds numbers in pymatgen's order, and uses Cartesian coordinates from NumPy (see ``graphs.cartesian``).

As in ``conversion``, the code uses plain loops instead of array expressions.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from mbqueue.data.machine_code import compiled

TOLERANCE = 1e-8
CUTOFF_STEP = 0.5


@compiled
def _repeats(lattice: Any, cutoff: float, repeats: Any) -> None:
    """Fill ``repeats``, float64 [3], with the number of periodic images to search along each lattice vector.

    The number of images is (cutoff + 0.15 Å) divided by the spacing of the lattice planes, rounded up.
    """
    for axis in range(3):
        a, b, c = axis, (axis + 1) % 3, (axis + 2) % 3
        x = lattice[b, 1] * lattice[c, 2] - lattice[b, 2] * lattice[c, 1]
        y = lattice[b, 2] * lattice[c, 0] - lattice[b, 0] * lattice[c, 2]
        z = lattice[b, 0] * lattice[c, 1] - lattice[b, 1] * lattice[c, 0]
        volume = lattice[a, 0] * x + lattice[a, 1] * y + lattice[a, 2] * z
        x, y, z = 2 * math.pi * x / volume, 2 * math.pi * y / volume, 2 * math.pi * z / volume
        repeats[axis] = np.ceil((cutoff + 0.15) * math.sqrt(x * x + y * y + z * z) / (2 * math.pi))


@compiled
def _fractional(cart: Any, m: Any) -> Any:
    """Convert Cartesian to fractional coordinates, float64 [n, 3]."""
    factor = 1.0 / (
        m[0, 0] * (m[1, 1] * m[2, 2] - m[1, 2] * m[2, 1])
        + m[0, 1] * (m[1, 2] * m[2, 0] - m[1, 0] * m[2, 2])
        + m[0, 2] * (m[1, 0] * m[2, 1] - m[1, 1] * m[2, 0])
    )
    frac = np.empty_like(cart)
    for column in range(3):
        # Compute one column (x, y, z) of the inverse matrix.
        b, c = (column + 1) % 3, (column + 2) % 3
        x = (m[b, 1] * m[c, 2] - m[b, 2] * m[c, 1]) * factor
        y = (m[b, 2] * m[c, 0] - m[b, 0] * m[c, 2]) * factor
        z = (m[b, 0] * m[c, 1] - m[b, 1] * m[c, 0]) * factor
        for atom in range(len(cart)):
            frac[atom, column] = cart[atom, 0] * x + cart[atom, 1] * y + cart[atom, 2] * z
    return frac


@compiled
def _extent(points: Any, axis: int) -> Any:
    least, most = points[0, axis], points[0, axis]
    for point in range(len(points)):
        least, most = min(least, points[point, axis]), max(most, points[point, axis])
    return least, most


@compiled
def _box(cart: Any, cutoff: float) -> Any:
    """Corners, float64 [2, 3], of the box that extends ``cutoff`` beyond the atoms; number of cubes along each axis."""
    corners, n_cubes = np.empty((2, 3)), np.empty(3, np.int64)
    for axis in range(3):
        least, most = _extent(cart, axis)
        corners[0, axis], corners[1, axis] = least - cutoff - TOLERANCE, most + cutoff + TOLERANCE
        n_cubes[axis] = max(1, math.ceil((corners[1, axis] - corners[0, axis]) / cutoff))
    return corners, n_cubes


@compiled
def _images(frac: Any, lattice: Any, cutoff: float) -> Any:
    """The cell's images to search along each lattice vector: the first, and the last plus one, int64 [2, 3]."""
    repeats, images = np.empty(3), np.empty((2, 3), np.int64)
    _repeats(lattice, cutoff, repeats)
    for axis in range(3):
        least, most = _extent(frac, axis)
        images[0, axis] = math.floor(least - repeats[axis] - TOLERANCE)
        images[1, axis] = math.ceil(most + repeats[axis] + TOLERANCE)
    return images


@compiled
def _wrapped(frac: Any, lattice: Any) -> Any:
    """Wrap the fractional coordinates ``frac`` into the cell, in place.

    Returns:
        the Cartesian coordinates of the wrapped atoms, float64 [n, 3]; the image that each atom was in, int64 [n, 3].
    """
    n_atoms = len(frac)
    cell, shift = np.empty((n_atoms, 3)), np.empty((n_atoms, 3), np.int64)
    for axis in range(3):
        for atom in range(n_atoms):
            whole = math.floor(frac[atom, axis])
            frac[atom, axis] -= whole
            shift[atom, axis] = whole
    for axis in range(3):
        for atom in range(n_atoms):
            cell[atom, axis] = (
                frac[atom, 0] * lattice[0, axis] + frac[atom, 1] * lattice[1, axis] + frac[atom, 2] * lattice[2, axis]
            )
    return cell, shift


@compiled
def _copies_in(corners: Any, n_cubes: Any, images: Any, cell: Any, shift: Any, lattice: Any, cutoff: float) -> Any:
    """Find the periodic copies of atoms inside a box, sorted by image.

    Returns:
        the coordinates of each copy, float64 [P, 3]; its atom and its image (relative to the atom before wrapping),
        int32 [P, 4]; its cube, int64 [P].
    """
    low, high, n_atoms = corners[0], corners[1], len(cell)
    cell_low, cell_high = np.empty(3), np.empty(3)
    for axis in range(3):
        cell_low[axis], cell_high[axis] = _extent(cell, axis)
    # The first pass counts the images that reach into the box, and the second pass collects their atoms.
    found, count = 0, 0
    points, copies, cubes = np.empty((0, 3)), np.empty((0, 4), np.int32), np.empty(0, np.int64)
    for taking in range(2):
        if taking:
            points, copies = np.empty((found * n_atoms, 3)), np.empty((found * n_atoms, 4), np.int32)
            cubes = np.empty(found * n_atoms, np.int64)
        for i in range(images[0, 0], images[1, 0]):
            for j in range(images[0, 1], images[1, 1]):
                for k in range(images[0, 2], images[1, 2]):
                    mx = i * lattice[0, 0] + j * lattice[1, 0] + k * lattice[2, 0]
                    my = i * lattice[0, 1] + j * lattice[1, 1] + k * lattice[2, 1]
                    mz = i * lattice[0, 2] + j * lattice[1, 2] + k * lattice[2, 2]
                    if (
                        mx + cell_high[0] <= low[0]
                        or mx + cell_low[0] >= high[0]
                        or my + cell_high[1] <= low[1]
                        or my + cell_low[1] >= high[1]
                        or mz + cell_high[2] <= low[2]
                        or mz + cell_low[2] >= high[2]
                    ):
                        continue
                    found += 1
                    if not taking:
                        continue
                    for atom in range(n_atoms):
                        x, y, z = mx + cell[atom, 0], my + cell[atom, 1], mz + cell[atom, 2]
                        if x > low[0] and x < high[0] and y > low[1] and y < high[1] and z > low[2] and z < high[2]:
                            points[count, 0], points[count, 1], points[count, 2] = x, y, z
                            copies[count, 0], copies[count, 1] = atom, i - shift[atom, 0]
                            copies[count, 2], copies[count, 3] = j - shift[atom, 1], k - shift[atom, 2]
                            cube = 0
                            for axis in range(3):
                                along = math.floor((points[count, axis] - low[axis] + TOLERANCE) / cutoff)
                                cube = cube * n_cubes[axis] + min(int(along), n_cubes[axis] - 1)
                            cubes[count] = cube
                            count += 1
    return points[:count], copies[:count], cubes[:count]


@compiled
def _cubes_around(cart: Any, lattice: Any, cutoff: float) -> Any:
    """Find the periodic copies of atoms inside the box that extends ``cutoff`` beyond the cell's atoms.

    Returns:
        the coordinates of the copies, sorted by cube, float64 [P, 3]; atom and image of each copy (relative to the atom
        before wrapping), int32 [P, 4]; the offsets of each cube's copies, int64 [cubes + 1]; the number of cubes along
        each axis, int64 [3]; the lower corner of the box, float64 [3].
    """
    frac = _fractional(cart, lattice)
    corners, n_cubes = _box(cart, cutoff)
    images = _images(frac, lattice, cutoff)
    cell, shift = _wrapped(frac, lattice)
    points, copies, cubes = _copies_in(corners, n_cubes, images, cell, shift, lattice, cutoff)
    starts = np.zeros(n_cubes[0] * n_cubes[1] * n_cubes[2] + 1, np.int64)
    for cube in cubes:
        starts[cube + 1] += 1
    for cube in range(len(starts) - 1):
        starts[cube + 1] += starts[cube]
    # Fill each cube from its end, which reverses the order of the copies in the cube.
    sorted_points, sorted_copies = np.empty((len(cubes), 3)), np.empty((len(cubes), 4), np.int32)
    ends = starts.copy()
    for point in range(len(cubes)):
        cube = cubes[point]
        ends[cube + 1] -= 1
        slot = ends[cube + 1]
        for axis in range(3):
            sorted_points[slot, axis] = points[point, axis]
        for axis in range(4):
            sorted_copies[slot, axis] = copies[point, axis]
    return sorted_points, sorted_copies, starts, n_cubes, corners[0]


@compiled
def find_bonds(cart: Any, lattice: Any, cutoff: float) -> Any:
    """Find the directed bonds of one crystal, in pymatgen's order.

    Args:
        cart: Cartesian coordinates, Å, float64 [n, 3]; no two atoms coincide.
        lattice: rows are lattice vectors, Å, float64 [3, 3].
        cutoff: longest bond, Å; squared lengths are compared with ``cutoff² + 1e-8``, as in pymatgen.

    Returns:
        the bonds per atom, int64 [n]; the copy that is the neighbour in each bond, int32 [D]; the squared length of
        each bond, Å², float64 [D]; atom and image of each copy, int32 [P, 4].
    """
    n_atoms = len(cart)
    points, copies, starts, n_cubes, low = _cubes_around(cart, lattice, cutoff)
    per_atom = np.zeros(n_atoms, np.int64)
    slots, squares = np.empty(96 * n_atoms, np.int32), np.empty(96 * n_atoms)
    limit = cutoff * cutoff + TOLERANCE
    count = 0
    for center in range(n_atoms):
        x, y, z = cart[center, 0], cart[center, 1], cart[center, 2]
        cx = math.floor((x - low[0] + TOLERANCE) / cutoff)
        cy = math.floor((y - low[1] + TOLERANCE) / cutoff)
        cz = math.floor((z - low[2] + TOLERANCE) / cutoff)
        before = count
        for i in range(max(0, cx - 1), min(n_cubes[0], cx + 2)):
            for j in range(max(0, cy - 1), min(n_cubes[1], cy + 2)):
                row = (i * n_cubes[1] + j) * n_cubes[2]
                begin, end = starts[row + max(0, cz - 1)], starts[row + min(n_cubes[2], cz + 2)]
                if count + end - begin > len(slots):
                    size = 2 * (count + end - begin)
                    more_slots, more_squares = np.empty(size, np.int32), np.empty(size)
                    for bond in range(count):
                        more_slots[bond], more_squares[bond] = slots[bond], squares[bond]
                    slots, squares = more_slots, more_squares
                for slot in range(begin, end):
                    dx, dy, dz = points[slot, 0] - x, points[slot, 1] - y, points[slot, 2] - z
                    squared = dx * dx + dy * dy + dz * dz
                    # Write every pair; the next pair overwrites a pair that is too distant. CPUs would often mispredict
                    # a branch here.
                    slots[count], squares[count] = slot, squared
                    count += int((squared < limit) & (squared > TOLERANCE * TOLERANCE))
        per_atom[center] = count - before
    return per_atom, slots[:count], squares[:count], copies


@compiled
def _nearest(cart: Any, frac: Any, lattice: Any, atom: int, reach: float) -> float:
    """Distance, Å, from an atom to the nearest atom or periodic copy within ``reach``; infinite if there is none."""
    repeats = np.empty(3)
    _repeats(lattice, reach, repeats)
    best = np.inf
    for other in range(len(cart)):
        a, b, c = frac[atom, 0] - frac[other, 0], frac[atom, 1] - frac[other, 1], frac[atom, 2] - frac[other, 2]
        for i in range(math.floor(a - repeats[0]), math.ceil(a + repeats[0]) + 1):
            for j in range(math.floor(b - repeats[1]), math.ceil(b + repeats[1]) + 1):
                for k in range(math.floor(c - repeats[2]), math.ceil(c + repeats[2]) + 1):
                    squared = 0.0
                    for axis in range(3):
                        move = i * lattice[0, axis] + j * lattice[1, axis] + k * lattice[2, axis]
                        apart = cart[other, axis] + move - cart[atom, axis]
                        squared += apart * apart
                    if other != atom or i != 0 or j != 0 or k != 0:
                        best = min(best, math.sqrt(squared))
    return best if best <= reach else np.inf


@compiled
def sufficient_cutoff(cart: Any, lattice: Any, per_atom: Any, cutoff: float) -> float:
    """The smallest multiple of 0.5 Å above ``cutoff`` at which every atom has a bond."""
    frac = _fractional(cart, lattice)
    needed = cutoff
    for atom in range(len(cart)):
        if per_atom[atom] == 0:
            reach, nearest = needed, np.inf
            while nearest == np.inf:
                reach *= 1.5
                nearest = _nearest(cart, frac, lattice, atom, reach)
            needed = max(needed, nearest)
    return (math.floor(needed / CUTOFF_STEP) + 1) * CUTOFF_STEP
