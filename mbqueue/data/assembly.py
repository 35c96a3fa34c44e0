"""Combine packed crystal graphs into the graph of a batch, with compiled functions.

Indices within a crystal are unsigned, so that Numba does not check for negative indices.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from mbqueue.data.conversion import AS_I, AS_J
from mbqueue.data.machine_code import compiled

#: Coefficients of asin(x) = x + x · p(x²) / q(x²) for |x| ≤ 1/2, from fdlibm's e_acos.c (Sun Microsystems 1993). For
#: |x| > 1/2, the code derives acos(x) from an asin, as fdlibm does. The error is below one unit in the last place of a
#: float64.
_P = (
    1.66666666666666657415e-01,
    -3.25565818622400915405e-01,
    2.01212532134862925881e-01,
    -4.00555345006794114027e-02,
    7.91534994289814532176e-04,
    3.47933107596021167570e-05,
)
_Q = (-2.40339491173441421878e00, 2.02094576023350569471e00, -6.88283971605453293030e-01, 7.70381505559019352791e-02)


@compiled
def _numbers(part: Any, width: int, numbers: Any) -> Any:
    """Decode ``part``, uint8 [n · width], into ``numbers``, uint32 [n]; return the largest (0 if ``width`` is 1)."""
    largest = np.uint32(0)
    if width == 2:
        for position in range(np.uint64(len(numbers))):
            number = np.uint32(part[2 * position]) | np.uint32(part[2 * position + np.uint64(1)]) << np.uint32(8)
            numbers[position] = number
            largest = max(largest, number)
    elif width == 1:
        for position in range(np.uint64(len(numbers))):
            numbers[position] = part[position]
    else:
        for position in range(np.uint64(len(numbers))):
            number = np.uint32(0)
            for byte in range(np.uint64(4)):
                number |= np.uint32(part[4 * position + byte]) << np.uint32(8 * byte)
            numbers[position] = number
            largest = max(largest, number)
    return largest


@compiled
def unpack(record: Any, shape: Any, per_atom: Any, ends: Any, images: Any, short: Any) -> Any:
    """Unpack a record that ``conversion.pack_rows`` wrote for one crystal.

    Args:
        record: the record, uint8.
        shape: numbers of atoms n, directed bonds D and short directed bonds s, and 1 if the record is wide; int64 [4].
        per_atom: filled with the number of bonds that start at each atom, uint32 [n].
        ends: filled with the first and second directed bond of each undirected bond, numbered within the crystal,
            uint32 [2, U + 1]; the last column is scratch space.
        images: filled with the image of each undirected bond, uint32 [3 U]; the bits are those of int8 (int32 if wide).
        short: filled with the directed bonds that take part in angles (ascending, numbered within the crystal) and
            their roles, uint32 [2, s].

    Returns:
        whether the record is valid; if not, the outputs are meaningless.
    """
    n_directed = shape[1]
    n_pairs = n_directed // 2
    width, image_width = (4, 4) if shape[3] else (2, 1)
    seconds = width * shape[0]
    shorts = seconds + width * n_pairs
    sides = shorts + width * shape[2]
    roles = sides + 3 * image_width * n_pairs
    if roles + shape[2] > len(record):
        return False
    first, second = ends[0], ends[1][:n_pairs]
    _numbers(record[:seconds], width, per_atom)
    largest = max(_numbers(record[seconds:shorts], width, second), _numbers(record[shorts:sides], width, short[0]))
    _numbers(record[sides:roles], image_width, images)
    _numbers(record[roles:], 1, short[1])
    total = np.int64(0)
    for n_bonds in per_atom:
        total += n_bonds
    if total != n_directed or (n_directed and largest >= n_directed):
        return False
    for position in range(1, len(short[0])):
        if short[0, position - 1] >= short[0, position]:
            return False

    # An undirected bond consists of two directed bonds, the first and the second. The loops compute with a flag instead
    # of branching, because CPUs would often mispredict the branch.
    is_first = np.ones(n_directed, np.uint8)
    for pair in range(n_pairs):
        is_first[second[pair]] = 0
    n_first = np.int64(0)
    for here in range(n_directed):
        n_first += is_first[here]
    if n_first != n_pairs:
        return False
    count = np.uint64(0)
    for here in range(n_directed):
        first[count] = here
        count += np.uint64(is_first[here])
    return True


@compiled
def _vector(here: Any, there: Any, images: Any, pair: Any, half: int, cart: Any, lattice: Any) -> Any:
    """The vector from one atom to an image of another, Å."""
    i = float((np.int64(images[3 * pair]) ^ half) - half)
    j = float((np.int64(images[3 * pair + 1]) ^ half) - half)
    k = float((np.int64(images[3 * pair + 2]) ^ half) - half)
    x = cart[there, 0] - cart[here, 0] + (i * lattice[0, 0] + j * lattice[1, 0] + k * lattice[2, 0])
    y = cart[there, 1] - cart[here, 1] + (i * lattice[0, 1] + j * lattice[1, 1] + k * lattice[2, 1])
    z = cart[there, 2] - cart[here, 2] + (i * lattice[0, 2] + j * lattice[1, 2] + k * lattice[2, 2])
    return x, y, z


@compiled
def _join(bases: Any, per_atom: Any, vectors: Any, bonds: Any) -> Any:
    """Fill ``bonds`` with the centre, neighbour, undirected bond and reverse of each directed bond of a crystal.

    Args:
        bases: five indices, of which this function uses the first three: the crystal's first atom, directed bond and
            undirected bond.
        per_atom: as in ``unpack``.
        vectors: the inputs for computing a bond's vector: ``ends`` and ``images`` as in ``unpack``; ``half``, the sign
            bit of an image; and the crystal's Cartesian coordinates float64 [n, 3] and lattice float64 [3, 3], Å.
        bonds: four arrays, each int32 [D].

    Returns:
        squared length of each undirected bond, Å², float64 [U].
    """
    atom0, bond0, half0, _, _ = bases
    ends, images, half, cart, lattice = vectors
    center, neighbor, undirected, reverse = bonds
    bond = 0
    for atom in range(len(per_atom)):
        for here in range(bond, bond + per_atom[atom]):
            center[here] = atom0 + atom
        bond += per_atom[atom]
    first, second = ends[0], ends[1]
    squares = np.empty(len(center) // 2)
    for pair in range(np.uint64(len(squares))):
        begin, end = first[pair], second[pair]
        here, there = center[begin], center[end]
        undirected[begin], undirected[end] = half0 + pair, half0 + pair
        reverse[begin], reverse[end] = bond0 + end, bond0 + begin
        neighbor[begin], neighbor[end] = there, here
        x, y, z = _vector(np.uint64(here - atom0), np.uint64(there - atom0), images, pair, half, cart, lattice)
        squares[pair] = x * x + y * y + z * z
    return squares


@compiled
def atoms_of(begins: Any, n_atoms: Any, numbers: Any, frac: Any, lattices: Any) -> Any:
    """Concatenate the atoms of B crystals, and compute their Cartesian coordinates.

    Args:
        begins: index of each crystal's first atom in ``numbers`` and ``frac``, int64 [B].
        n_atoms: atoms per crystal, int64 [B].
        numbers: Z of all atoms of the dataset, uint8.
        frac: fractional coordinates of all atoms of the dataset, float64 [all, 3].
        lattices: rows are lattice vectors, Å, float64 [B, 3, 3].

    Returns:
        Z of each atom, int64 [A]; its crystal, int64 [A]; its Cartesian coordinates, Å, float64 [A, 3]. The coordinates
        may differ from pymatgen's in the last bit, unlike the result of ``graphs.cartesian``. The bonds come from the
        records, so a difference in the last bit cannot add or remove bonds.
    """
    total = 0
    for count in n_atoms:
        total += count
    chosen, crystal, cart = np.empty(total, np.int64), np.empty(total, np.int64), np.empty((total, 3))
    at = 0
    for b in range(len(n_atoms)):
        lattice = lattices[b]
        for atom in range(begins[b], begins[b] + n_atoms[b]):
            chosen[at], crystal[at] = numbers[atom], b
            u, v, w = frac[atom, 0], frac[atom, 1], frac[atom, 2]
            for axis in range(3):
                cart[at, axis] = u * lattice[0, axis] + v * lattice[1, axis] + w * lattice[2, axis]
            at += 1
    return chosen, crystal, cart


@compiled
def arc_cosines(cosines: Any, angles: Any) -> None:
    """Fill ``angles``, float32, radian, with the arc cosines of ``cosines``, float64 within ±1.

    This function does not call libm's acos, because the compiler could not vectorise the loop.
    """
    p0, p1, p2, p3, p4, p5 = _P
    q1, q2, q3, q4 = _Q
    for position in range(len(cosines)):
        x = cosines[position]
        size = abs(x)
        inner = size < 0.5
        z = x * x if inner else 0.5 * (1.0 - size)
        root = math.sqrt(z)
        share = z * (p0 + z * (p1 + z * (p2 + z * (p3 + z * (p4 + z * p5)))))
        share /= 1.0 + z * (q1 + z * (q2 + z * (q3 + z * q4)))
        outside = 2.0 * (root + root * share)
        angles[position] = 0.5 * math.pi - (x + x * share) if inner else (outside if x > 0 else math.pi - outside)


@compiled
def _number_short(bonds: Any, undirected: Any, half0: int, number: Any, short_bond: Any) -> Any:
    """Assign numbers to a crystal's short undirected bonds, in ascending order.

    Args:
        bonds: the short directed bonds, uint32 [s].
        undirected: undirected bond of each directed bond, int32 [D]; the crystal's first one is ``half0``.
        half0: index of the crystal's first undirected bond.
        number: filled with the number of each short undirected bond, uint32 [U].
        short_bond: filled with the undirected bond of each number, int32 [S + 1].

    Returns:
        whether the crystal has exactly S short undirected bonds.
    """
    for pair in range(len(number)):
        number[pair] = 0
    for position in range(len(bonds)):
        number[np.uint64(undirected[bonds[position]] - half0)] = 1
    total = np.int64(0)
    for pair in range(len(number)):
        total += number[pair]
    if total != len(short_bond) - 1:
        return False
    count = np.uint64(0)
    for pair in range(len(number)):
        is_short = number[pair]
        number[pair], short_bond[count] = count, half0 + pair
        count += np.uint64(is_short)
    return True


@compiled
def _short_bonds(bases: Any, joined: Any, vectors: Any, short: Any, number: Any, n_short: int) -> Any:
    """Compute tables of a crystal's short bonds and their unit vectors.

    Args:
        bases, joined, vectors, short: as in ``_angles``.
        number: the number of each short undirected bond, uint32 [U].
        n_short: number of short undirected bonds.

    Returns:
        positions in ``short`` of each short undirected bond's directed bonds, -1 for none, int32 [S, 2]; a table with
        the atom of each short directed bond, its undirected bond, its rank among the second bonds, and the undirected
        bond of each rank, uint32 [4, s]; unit vectors of all short directed bonds, and of the second bonds by rank,
        float64 [2, s, 3]; number of first bonds of each atom, uint32 [n]; first rank of each atom, followed by the
        number of ranks, uint32 [n + 1].
    """
    atom0, _, half0, _, _ = bases
    center, undirected, squares = joined
    ends, images, half, cart, lattice = vectors
    bonds, roles = short[0], short[1]
    positions = np.full((n_short, 2), -1, np.int32)
    table = np.empty((4, len(bonds)), np.uint32)
    atoms, which, ranks, seconds = table[0], table[1], table[2], table[3]
    both_units = np.empty((2, len(bonds), 3))
    units, second_units = both_units[0], both_units[1]
    n_first, blocks = np.zeros(len(cart), np.uint32), np.empty(len(cart) + 1, np.uint32)
    filled = n_seconds = np.uint32(0)
    for position in range(np.uint64(len(bonds))):
        bond, is_first, is_second = bonds[position], roles[position] & AS_I, (roles[position] & AS_J) // AS_J
        pair = np.uint64(undirected[bond] - half0)
        atom, one = np.uint32(center[bond] - atom0), number[pair]
        while filled <= atom:
            blocks[filled] = n_seconds
            filled += np.uint32(1)
        atoms[position], which[position], seconds[n_seconds] = atom, one, one
        positions[one, 0 if positions[one, 0] < 0 else 1] = position
        here, there = np.uint64(center[ends[0, pair]] - atom0), np.uint64(center[ends[1, pair]] - atom0)
        vector = _vector(here, there, images, pair, half, cart, lattice)
        share = (1.0 if ends[0, pair] == bond else -1.0) / math.sqrt(squares[pair])
        for axis in range(3):
            units[position, axis] = second_units[n_seconds, axis] = share * vector[axis]
        ranks[position] = n_seconds if is_second else len(bonds)
        n_first[atom] += is_first
        n_seconds += np.uint32(is_second)
    while filled <= len(cart):
        blocks[filled] = n_seconds
        filled += np.uint32(1)
    return positions, table, both_units, n_first, blocks


@compiled
def _places_by_second(roles: Any, table: Any, n_first: Any, n_short: int) -> Any:
    """Offsets of each second bond's segment when angles are sorted by second bond, uint32 [S + 1]; number of angles."""
    atoms, which = table[0], table[1]
    counts = np.zeros(n_short + 1, np.uint32)
    total = 0
    for position in range(len(roles)):
        if roles[position] & AS_J:
            partners = n_first[atoms[position]] - (roles[position] & AS_I)
            counts[which[position] + 1] += partners
            total += partners
    for bond in range(n_short):
        counts[bond + 1] += counts[bond]
    return counts, total


@compiled
def _angles(bases: Any, joined: Any, vectors: Any, short: Any, out: Any) -> Any:
    """Compute a crystal's short bonds and angles.

    Args:
        bases: indices of the crystal's first atom, directed bond, undirected bond, short bond and angle.
        joined: centre and undirected bond of each directed bond, int32 [D], and the squared lengths from ``_join``.
        vectors: as in ``_join``.
        short: as in ``unpack``.
        out: short_bond int32 [S + 1]; angle_center, angle_bond_i, angle_bond_j, angle_by_j, int32 [T + 1]; angle,
            float32 [T]. All arrays except ``angle`` have one extra element, because the loops also write invalid
            candidates, which the next candidate overwrites.

    Returns:
        whether the crystal has S short bonds and T angles; if not, the outputs are meaningless.
    """
    atom0, _, half0, short0, angle0 = bases
    _, undirected, squares = joined
    short_bond, angle_center, angle_i, angle_j, by_j, angle = out
    roles, n_short, n_angles = short[1], len(short_bond) - 1, len(angle)
    number = np.empty(len(squares), np.uint32)
    if not _number_short(short[0], undirected, half0, number, short_bond):
        return False
    positions, table, units, n_first, blocks = _short_bonds(bases, joined, vectors, short, number, n_short)
    counts, total = _places_by_second(roles, table, n_first, n_short)
    if total != n_angles:
        return False

    atoms, ranks, seconds = table[0], table[2], table[3]
    first_units, second_units = units[0], units[1]
    cosines = np.empty(n_angles + 1)
    angle_count = np.uint64(0)
    for bond in range(n_short):
        for side in range(2):
            at = positions[bond, side]
            if at < 0 or not roles[at] & AS_I:
                continue
            atom, itself = atoms[at], ranks[at]
            x, y, z = first_units[at, 0], first_units[at, 1], first_units[at, 2]
            for other in range(blocks[atom], blocks[atom + np.uint32(1)]):
                angle_center[angle_count], angle_i[angle_count] = atom0 + atom, short0 + bond
                angle_j[angle_count] = short0 + seconds[other]
                cosine = x * second_units[other, 0] + y * second_units[other, 1] + z * second_units[other, 2]
                cosines[angle_count] = (1 - 1e-6) * cosine
                angle_count += np.uint64(other != itself)
    arc_cosines(cosines[:n_angles], angle)
    for place_of_angle in range(n_angles):
        second = np.uint64(angle_j[place_of_angle] - short0)
        by_j[counts[second]] = angle0 + place_of_angle
        counts[second] += np.uint32(1)
    return True


@compiled
def assemble(records: Any, starts: Any, sizes: Any, n_atoms: Any, index: Any, cart: Any, lattices: Any) -> Any:
    """Combine B records into one graph with lengths and angles.

    Args:
        records: the concatenated records, uint8.
        starts: the start of each record, followed by the end of the last one, int64 [B + 1].
        sizes: total numbers of directed bonds, short undirected bonds and angles, int64 [3].
        n_atoms: atoms per crystal, int64 [B].
        index: the crystals' rows of the index that ``conversion.pack_rows`` returns, int64 [B, 6].
        cart: Cartesian coordinates, Å, float64 [A, 3].
        lattices: rows are lattice vectors, Å, float64 [B, 3, 3].

    Returns:
        the arrays of a ``Batch``: centre, neighbour, undirected bond and reverse of each directed bond, int32 [4, D];
        bond_length, float32 [U]; short_bond, int32 [S]; angle_center, angle_bond_i, angle_bond_j and angle_by_j, int32
        [4, T]; angle, float32 [T]; the position of the first invalid record, or -1 if all records are valid.
        Lengths and angles are computed in float64, and rounded to float32 at the end.
    """
    n_directed, n_short, n_places = sizes[0], sizes[1], sizes[2] + 1
    # One block for all integer outputs is faster than many small blocks. The allocator keeps a large block for the next
    # batch, but returns small blocks to the system, which must then clear new memory.
    room = np.empty(4 * (n_directed + n_places) + n_short + 1, np.int32)
    bonds, room = room[: 4 * n_directed].reshape((4, n_directed)), room[4 * n_directed :]
    numbers, short_bond = room[: 4 * n_places].reshape((4, n_places)), room[4 * n_places :]
    length, angle = np.empty(n_directed // 2, np.float32), np.empty(n_places - 1, np.float32)
    shape = np.empty(4, np.int64)
    unsound = -1
    atom0 = bond0 = short0 = angle0 = 0
    for b in range(len(n_atoms)):
        shape[0], shape[1], shape[2], shape[3] = n_atoms[b], index[b, 1], index[b, 2], index[b, 5]
        half, half0, n_pairs = 1 << (31 if shape[3] else 7), bond0 // 2, index[b, 1] // 2
        per_atom, ends = np.empty(n_atoms[b], np.uint32), np.empty((2, n_pairs + 1), np.uint32)
        images, short = np.empty(3 * n_pairs, np.uint32), np.empty((2, index[b, 2]), np.uint32)
        if not unpack(records[starts[b] : starts[b + 1]], shape, per_atom, ends, images, short):
            unsound = b
            break
        atoms, lattice, bases = cart[atom0 : atom0 + n_atoms[b]], lattices[b], (atom0, bond0, half0, short0, angle0)
        end, short_end, angle_end = bond0 + index[b, 1], short0 + index[b, 3], angle0 + index[b, 4]
        mine = bonds[0, bond0:end], bonds[1, bond0:end], bonds[2, bond0:end], bonds[3, bond0:end]
        vectors = (ends, images, half, atoms, lattice)
        squares = _join(bases, per_atom, vectors, mine)
        for pair in range(n_pairs):
            length[half0 + pair] = math.sqrt(squares[pair])
        span = slice(angle0, angle_end + 1)
        out = (
            short_bond[short0 : short_end + 1], numbers[0, span], numbers[1, span], numbers[2, span], numbers[3, span],
            angle[angle0:angle_end],
        )  # fmt: skip
        if not _angles(bases, (mine[0], mine[2], squares), vectors, short, out):
            unsound = b
            break
        atom0, bond0, short0, angle0 = atom0 + n_atoms[b], end, short_end, angle_end
    return bonds, length, short_bond[:n_short], numbers[:, : n_places - 1], angle, unsound
