"""The compiled core of the converter: crystals in, packed bonds and short bonds out.

Bonds come in the order in which pymatgen's ``find_points_in_spheres`` lists them, because CHGNet numbers its bonds
by that order: by centre atom; then by the cube of edge ``cutoff`` in which the neighbour lies (x, y, z ascending, the
27 cubes around the centre's own); then, within a cube, by periodic image (i, j, k) and atom, both descending. To give
the same order where rounding decides (an atom exactly on a cell face, a bond exactly at the cut-off), the sums here
are in pymatgen's own order, and the Cartesian coordinates that come in have to be NumPy's (see ``graphs.cartesian``).

All functions release the GIL. They call only functions of this file: Numba's disk cache sees no other file change.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, TypeVar

import numba
import numpy as np

Function = TypeVar("Function", bound=Callable[..., Any])

TOLERANCE = 1e-8
CUTOFF_STEP = 0.5
AS_I = np.uint8(1)
AS_J = np.uint8(2)


def compiled(function: Function) -> Function:
    """``function`` as machine code, made at its first call, kept on disk, and run without the GIL."""
    return numba.njit(cache=True, nogil=True, error_model="numpy")(function)  # type: ignore[no-any-return]


@compiled
def _grown(array: Any, needed: int) -> Any:
    if needed <= len(array):
        return array
    larger = np.empty((max(needed, 2 * len(array)), *array.shape[1:]), array.dtype)
    larger[: len(array)] = array
    return larger


@compiled
def _inverse(m: Any) -> Any:
    inverse = np.empty((3, 3))
    factor = 1.0 / (
        m[0, 0] * (m[1, 1] * m[2, 2] - m[1, 2] * m[2, 1])
        + m[0, 1] * (m[1, 2] * m[2, 0] - m[1, 0] * m[2, 2])
        + m[0, 2] * (m[1, 0] * m[2, 1] - m[1, 1] * m[2, 0])
    )
    inverse[0, 0] = (m[1, 1] * m[2, 2] - m[1, 2] * m[2, 1]) * factor
    inverse[0, 1] = (m[0, 2] * m[2, 1] - m[0, 1] * m[2, 2]) * factor
    inverse[0, 2] = (m[0, 1] * m[1, 2] - m[0, 2] * m[1, 1]) * factor
    inverse[1, 0] = (m[1, 2] * m[2, 0] - m[1, 0] * m[2, 2]) * factor
    inverse[1, 1] = (m[0, 0] * m[2, 2] - m[0, 2] * m[2, 0]) * factor
    inverse[1, 2] = (m[0, 2] * m[1, 0] - m[0, 0] * m[1, 2]) * factor
    inverse[2, 0] = (m[1, 0] * m[2, 1] - m[1, 1] * m[2, 0]) * factor
    inverse[2, 1] = (m[0, 1] * m[2, 0] - m[0, 0] * m[2, 1]) * factor
    inverse[2, 2] = (m[0, 0] * m[1, 1] - m[0, 1] * m[1, 0]) * factor
    return inverse


@compiled
def _times(vectors: Any, m: Any) -> Any:
    product = np.empty_like(vectors)
    for row in range(len(vectors)):
        for column in range(3):
            product[row, column] = (
                vectors[row, 0] * m[0, column] + vectors[row, 1] * m[1, column] + vectors[row, 2] * m[2, column]
            )
    return product


@compiled
def _repeats(lattice: Any, cutoff: float) -> Any:
    """Periodic images to look at along each lattice vector: (cutoff + 0.15 Å) over the spacing of the planes."""
    repeats = np.empty(3)
    for axis in range(3):
        a, b, c = lattice[axis], lattice[(axis + 1) % 3], lattice[(axis + 2) % 3]
        x, y, z = b[1] * c[2] - b[2] * c[1], b[2] * c[0] - b[0] * c[2], b[0] * c[1] - b[1] * c[0]
        volume = a[0] * x + a[1] * y + a[2] * z
        x, y, z = 2 * math.pi * x / volume, 2 * math.pi * y / volume, 2 * math.pi * z / volume
        repeats[axis] = math.ceil((cutoff + 0.15) * math.sqrt(x * x + y * y + z * z) / (2 * math.pi))
    return repeats


@compiled
def _points_around(cart: Any, lattice: Any, cutoff: float) -> Any:
    """All periodic copies of the atoms that lie in the box around the cell's atoms, ``cutoff`` wider on all sides.

    Returns:
        coordinates [P, 3], atom [P], image relative to the atom as given [P, 3], lower and upper corner of the box.
    """
    n_atoms = len(cart)
    low, high = np.empty(3), np.empty(3)
    first, stop = np.empty(3, np.int64), np.empty(3, np.int64)
    inside = _times(cart, _inverse(lattice))
    shift = np.empty((n_atoms, 3), np.int64)
    repeats = _repeats(lattice, cutoff)
    for axis in range(3):
        low[axis] = cart[:, axis].min() - cutoff - TOLERANCE
        high[axis] = cart[:, axis].max() + cutoff + TOLERANCE
        first[axis] = math.floor(inside[:, axis].min() - repeats[axis] - TOLERANCE)
        stop[axis] = math.ceil(inside[:, axis].max() + repeats[axis] + TOLERANCE)
        for atom in range(n_atoms):
            wrapped = inside[atom, axis] - math.floor(inside[atom, axis])
            shift[atom, axis] = round(inside[atom, axis] - wrapped)
            inside[atom, axis] = wrapped
    cell = _times(inside, lattice)
    cell_low = np.array([cell[:, 0].min(), cell[:, 1].min(), cell[:, 2].min()])
    cell_high = np.array([cell[:, 0].max(), cell[:, 1].max(), cell[:, 2].max()])

    points, atoms = np.empty((32 * n_atoms, 3)), np.empty(32 * n_atoms, np.int32)
    images = np.empty((32 * n_atoms, 3), np.int32)
    count = 0
    move, here = np.empty(3), np.empty(3)
    for i in range(first[0], stop[0]):
        for j in range(first[1], stop[1]):
            for k in range(first[2], stop[2]):
                reaches = True
                for axis in range(3):
                    move[axis] = i * lattice[0, axis] + j * lattice[1, axis] + k * lattice[2, axis]
                    if move[axis] + cell_high[axis] <= low[axis] or move[axis] + cell_low[axis] >= high[axis]:
                        reaches = False
                if not reaches:
                    continue
                if count + n_atoms > len(points):
                    points, atoms = _grown(points, count + n_atoms), _grown(atoms, count + n_atoms)
                    images = _grown(images, count + n_atoms)
                for atom in range(n_atoms):
                    for axis in range(3):
                        here[axis] = move[axis] + cell[atom, axis]
                    if (
                        here[0] > low[0]
                        and here[0] < high[0]
                        and here[1] > low[1]
                        and here[1] < high[1]
                        and here[2] > low[2]
                        and here[2] < high[2]
                    ):
                        points[count] = here
                        atoms[count] = atom
                        images[count, 0] = i - shift[atom, 0]
                        images[count, 1] = j - shift[atom, 1]
                        images[count, 2] = k - shift[atom, 2]
                        count += 1
    return points[:count], atoms[:count], images[:count], low, high


@compiled
def find_bonds(cart: Any, lattice: Any, cutoff: float) -> Any:
    """Directed bonds of one crystal, in pymatgen's order.

    Args:
        cart: Cartesian coordinates, Å, float64 [n, 3].
        lattice: rows are lattice vectors, Å, float64 [3, 3].
        cutoff: longest bond, Å; ``cutoff² + 1e-8`` is what is compared, as in pymatgen.

    Returns:
        bonds per atom int64 [n], neighbour int32 [D], image int32 [D, 3], distance float64 [D].
    """
    n_atoms = len(cart)
    points, atoms, images, low, high = _points_around(cart, lattice, cutoff)
    n_cubes = np.empty(3, np.int64)
    for axis in range(3):
        n_cubes[axis] = max(1, math.ceil((high[axis] - low[axis]) / cutoff))
    cube_of = np.empty(len(points), np.int64)
    starts = np.zeros(n_cubes[0] * n_cubes[1] * n_cubes[2] + 1, np.int64)
    for point in range(len(points)):
        cube = 0
        for axis in range(3):
            place = math.floor((points[point, axis] - low[axis] + TOLERANCE) / cutoff)
            cube = cube * n_cubes[axis] + min(place, n_cubes[axis] - 1)
        cube_of[point] = cube
        starts[cube + 1] += 1
    starts = np.cumsum(starts)
    free = starts[:-1].copy()
    ordered = np.empty((len(points), 3))
    origin = np.empty(len(points), np.int32)
    for point in range(len(points) - 1, -1, -1):
        slot = free[cube_of[point]]
        free[cube_of[point]] = slot + 1
        ordered[slot] = points[point]
        origin[slot] = point

    per_atom = np.zeros(n_atoms, np.int64)
    neighbor, image = np.empty(96 * n_atoms, np.int32), np.empty((96 * n_atoms, 3), np.int32)
    distance = np.empty(96 * n_atoms)
    limit = cutoff * cutoff + TOLERANCE
    count = 0
    around = np.empty(3, np.int64)
    for center in range(n_atoms):
        for axis in range(3):
            around[axis] = math.floor((cart[center, axis] - low[axis] + TOLERANCE) / cutoff)
        x, y, z = cart[center, 0], cart[center, 1], cart[center, 2]
        before = count
        for i in range(max(0, around[0] - 1), min(n_cubes[0], around[0] + 2)):
            for j in range(max(0, around[1] - 1), min(n_cubes[1], around[1] + 2)):
                row = (i * n_cubes[1] + j) * n_cubes[2]
                begin = starts[row + max(0, around[2] - 1)]
                end = starts[row + min(n_cubes[2], around[2] + 2)]
                if count + end - begin > len(neighbor):
                    needed = count + end - begin
                    neighbor, image = _grown(neighbor, needed), _grown(image, needed)
                    distance = _grown(distance, needed)
                for slot in range(begin, end):
                    dx, dy, dz = ordered[slot, 0] - x, ordered[slot, 1] - y, ordered[slot, 2] - z
                    squared = dx * dx + dy * dy + dz * dz
                    if squared < limit:
                        point = origin[slot]
                        length = math.sqrt(squared)
                        if length <= TOLERANCE and atoms[point] == center:
                            continue
                        neighbor[count] = atoms[point]
                        image[count, 0] = images[point, 0]
                        image[count, 1] = images[point, 1]
                        image[count, 2] = images[point, 2]
                        distance[count] = length
                        count += 1
        per_atom[center] = count - before
    return per_atom, neighbor[:count], image[:count], distance[:count]


@compiled
def _nearest(cart: Any, lattice: Any, atom: int, reach: float) -> float:
    """Distance to the nearest other atom or periodic copy within ``reach``, Å; infinite if there is none."""
    repeats = _repeats(lattice, reach)
    inside = _times(cart, _inverse(lattice))
    best = np.inf
    for other in range(len(cart)):
        first, stop = np.empty(3, np.int64), np.empty(3, np.int64)
        for axis in range(3):
            apart = inside[atom, axis] - inside[other, axis]
            first[axis], stop[axis] = math.floor(apart - repeats[axis]), math.ceil(apart + repeats[axis]) + 1
        for i in range(first[0], stop[0]):
            for j in range(first[1], stop[1]):
                for k in range(first[2], stop[2]):
                    if other == atom and i == 0 and j == 0 and k == 0:
                        continue
                    squared = 0.0
                    for axis in range(3):
                        move = i * lattice[0, axis] + j * lattice[1, axis] + k * lattice[2, axis]
                        squared += (cart[other, axis] + move - cart[atom, axis]) ** 2
                    best = min(best, math.sqrt(squared))
    return best if best <= reach else np.inf


@compiled
def _sufficient_cutoff(cart: Any, lattice: Any, per_atom: Any, cutoff: float) -> float:
    """The least whole multiple of half an ångström above ``cutoff`` at which no atom is without a bond."""
    needed = cutoff
    for atom in range(len(cart)):
        if per_atom[atom] == 0:
            reach, nearest = needed, np.inf
            while nearest == np.inf:
                reach *= 1.5
                nearest = _nearest(cart, lattice, atom, reach)
            needed = max(needed, nearest)
    return (math.floor(needed / CUTOFF_STEP) + 1) * CUTOFF_STEP


@compiled
def _hash(center: int, neighbor: int, i: int, j: int, k: int, mask: int) -> int:
    mixed = center * 0x9E3779B1 + neighbor * 0x85EBCA77 + i * 0xC2B2AE3D + j * 0x27D4EB2F + k * 0x165667B1
    mixed ^= mixed >> 15
    mixed *= 0x2C1B3C6D
    return (mixed ^ (mixed >> 12)) & mask


@compiled
def pair_bonds(per_atom: Any, neighbor: Any, image: Any) -> Any:
    """Which two directed bonds make one undirected bond; these are numbered by first appearance.

    Returns:
        undirected int32 [D], first directed bond of each undirected one int32 [U], and the second, -1 if it is not
        in the list, int32 [U].
    """
    n_directed = len(neighbor)
    undirected = np.empty(n_directed, np.int32)
    first, second = np.empty(n_directed, np.int32), np.empty(n_directed, np.int32)
    size = 16
    while size < n_directed + n_directed // 2:
        size *= 2
    mask = size - 1
    table = np.full(size, -1, np.int32)
    centers = np.empty(n_directed, np.int32)
    count = 0
    bond = 0
    for center in range(len(per_atom)):
        for _ in range(per_atom[center]):
            other = neighbor[bond]
            i, j, k = image[bond, 0], image[bond, 1], image[bond, 2]
            centers[bond] = center
            found = -1
            if other <= center:
                slot = _hash(other, center, -i, -j, -k, mask)
                while table[slot] >= 0:
                    known = first[table[slot]]
                    if (
                        centers[known] == other
                        and neighbor[known] == center
                        and image[known, 0] == -i
                        and image[known, 1] == -j
                        and image[known, 2] == -k
                    ):
                        found = table[slot]
                        break
                    slot = (slot + 1) & mask
            if found >= 0:
                second[found] = bond
                undirected[bond] = found
            else:
                slot = _hash(center, other, i, j, k, mask)
                while table[slot] >= 0:
                    slot = (slot + 1) & mask
                table[slot] = count
                first[count], second[count] = bond, -1
                undirected[bond] = count
                count += 1
            bond += 1
    return undirected, first[:count], second[:count]


@compiled
def graph_of(cart: Any, lattice: Any, atom_cutoff: float, bond_cutoff: float) -> Any:
    """The whole graph of one crystal.

    A directed bond whose reverse was lost to rounding exactly at the cut-off is left out (CHGNet would raise an error
    there; its radial basis is zero at that length).

    Returns:
        bonds per atom int64 [n], neighbour int32 [D], image int32 [D, 3], undirected int32 [D], first directed bond
        of each undirected int32 [U], directed bonds that take part in an angle int32 [s], their roles uint8 [s]
        (bit 0: as first bond of an angle, bit 1: as second), number of angles, cut-off used (Å).
    """
    cutoff = atom_cutoff
    per_atom, neighbor, image, distance = find_bonds(cart, lattice, cutoff)
    while per_atom.min() == 0:
        cutoff = _sufficient_cutoff(cart, lattice, per_atom, cutoff)
        per_atom, neighbor, image, distance = find_bonds(cart, lattice, cutoff)
    undirected, first, second = pair_bonds(per_atom, neighbor, image)
    if 2 * len(first) != len(neighbor):
        kept = second[undirected] >= 0
        bond = 0
        for center in range(len(per_atom)):
            before = bond
            bond += per_atom[center]
            per_atom[center] = kept[before:bond].sum()
        neighbor, image, distance = neighbor[kept], image[kept], distance[kept]
        undirected, first, second = pair_bonds(per_atom, neighbor, image)

    short, roles = np.empty(64, np.int32), np.empty(64, np.uint8)
    n_short = n_angles = bond = 0
    for center in range(len(per_atom)):
        begin = n_short
        n_i = n_j = n_both = 0
        for here in range(bond, bond + per_atom[center]):
            role = np.uint8(0)
            if distance[first[undirected[here]]] <= bond_cutoff:
                role |= AS_I
                n_i += 1
            if distance[here] < bond_cutoff:
                role |= AS_J
                n_j += 1
            if role == AS_I | AS_J:
                n_both += 1
            if role:
                short, roles = _grown(short, n_short + 1), _grown(roles, n_short + 1)
                short[n_short], roles[n_short] = here, role
                n_short += 1
        bond += per_atom[center]
        n_angles += n_i * n_j - n_both
        # What finds no partner at this centre is in no angle.
        end, n_short = n_short, begin
        for place in range(begin, end):
            role = np.uint8(0)
            is_i, is_j = roles[place] & AS_I, roles[place] & AS_J
            if is_i and n_j > (1 if is_j else 0):
                role |= AS_I
            if is_j and n_i > (1 if is_i else 0):
                role |= AS_J
            if role:
                short[n_short], roles[n_short] = short[place], role
                n_short += 1
    return per_atom, neighbor, image, undirected, first, short[:n_short], roles[:n_short], n_angles, cutoff


@compiled
def _put(buffer: Any, at: int, values: Any, wide: bool) -> int:
    if wide:
        stop = at + 4 * len(values)
        buffer[at:stop].view(np.uint32)[:] = values
    else:
        stop = at + 2 * len(values)
        buffer[at:stop].view(np.uint16)[:] = values
    return stop


@compiled
def pack_rows(atom_offsets: Any, cart: Any, lattices: Any, atom_cutoff: float, bond_cutoff: float) -> Any:
    """The graphs of N consecutive crystals as records of bytes (their layout is told in ``records``).

    Args:
        atom_offsets: where each crystal's atoms begin in ``cart``, int64 [N + 1], first 0.
        cart: Cartesian coordinates, Å, float64 [A, 3].
        lattices: float64 [N, 3, 3], Å.
        atom_cutoff: longest bond, Å.
        bond_cutoff: longest bond of the bond graph, Å.

    Returns:
        records uint8 [bytes], index int64 [N, 6] (start of the record, directed bonds, short directed bonds, short
        undirected bonds, angles, 1 if the record is wide), cut-off used float64 [N] (Å).
    """
    n_rows = len(lattices)
    records = np.empty(512 * len(cart) + 1024, np.uint8)
    index, cutoffs = np.empty((n_rows, 6), np.int64), np.empty(n_rows)
    at = 0
    for row in range(n_rows):
        begin, end = atom_offsets[row], atom_offsets[row + 1]
        per_atom, neighbor, image, undirected, first, short, roles, n_angles, cutoff = graph_of(
            cart[begin:end], lattices[row], atom_cutoff, bond_cutoff
        )
        n_directed, n_undirected = len(neighbor), len(first)
        wide = n_directed > 0xFFFF
        for bond in first:
            for axis in range(3):
                wide = wide or abs(image[bond, axis]) > 127
        second = np.empty(n_undirected, np.uint32)
        is_first = np.zeros((n_directed + 7) // 8, np.uint8)
        taken = np.zeros(n_undirected, np.uint8)
        new = old = 0
        for bond in range(n_directed):
            if undirected[bond] == new:
                is_first[bond >> 3] |= np.uint8(1 << (bond & 7))
                new += 1
            else:
                second[old] = undirected[bond]
                old += 1
        n_short = 0
        for bond in short:
            if not taken[undirected[bond]]:
                taken[undirected[bond]] = 1
                n_short += 1
        index[row] = np.array([at, n_directed, len(short), n_short, n_angles, 1 if wide else 0])
        cutoffs[row] = cutoff
        records = _grown(
            records, at + 4 * (len(per_atom) + 5 * n_undirected + len(short)) + len(is_first) + len(roles) + 4
        )
        at = _put(records, at, per_atom, wide)
        at = _put(records, at, second, wide)
        at = _put(records, at, neighbor[first], wide)
        at = _put(records, at, short, wide)
        if wide:
            records[at : at + 12 * n_undirected].view(np.int32)[:] = image[first].reshape(-1)
            at += 12 * n_undirected
        else:
            records[at : at + 3 * n_undirected].view(np.int8)[:] = image[first].reshape(-1)
            at += 3 * n_undirected
        records[at : at + len(is_first)] = is_first
        at += len(is_first)
        records[at : at + len(roles)] = roles
        at += len(roles)
        while at % 4:
            records[at] = 0
            at += 1
    return records[:at], index, cutoffs


@compiled
def search_size(lattice: Any) -> Any:
    """Volume of a cell, Å³, and the number of periodic images that a search to 6 Å looks at (at least)."""
    inverse_volume = 1.0
    volume = abs(
        lattice[0, 0] * (lattice[1, 1] * lattice[2, 2] - lattice[1, 2] * lattice[2, 1])
        - lattice[0, 1] * (lattice[1, 0] * lattice[2, 2] - lattice[1, 2] * lattice[2, 0])
        + lattice[0, 2] * (lattice[1, 0] * lattice[2, 1] - lattice[1, 1] * lattice[2, 0])
    )
    if volume == 0.0:
        return 0.0, np.inf
    repeats = _repeats(lattice, 6.0)
    for axis in range(3):
        inverse_volume *= 2.0 * repeats[axis] + 1.0
    return volume, inverse_volume


@compiled
def smallest_distance(frac: Any, lattice: Any, limit: float) -> int:
    """The first pair (i, j) of atoms nearer than ``limit``, Å, as i · n + j; -1 if there is none.

    ``limit`` has to be small against the cell: only the nearest image by fractional coordinates is looked at.
    """
    n_atoms = len(frac)
    for i in range(n_atoms):
        for j in range(i):
            squared = 0.0
            a, b, c = frac[i, 0] - frac[j, 0], frac[i, 1] - frac[j, 1], frac[i, 2] - frac[j, 2]
            a, b, c = a - np.rint(a), b - np.rint(b), c - np.rint(c)
            for axis in range(3):
                part = a * lattice[0, axis] + b * lattice[1, axis] + c * lattice[2, axis]
                squared += part * part
            if squared < limit * limit:
                return j * n_atoms + i
    return -1
