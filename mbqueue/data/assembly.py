"""The compiled core of batching: packed records in, one large disconnected graph out."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from mbqueue.data.conversion import AS_I, AS_J
from mbqueue.data.machine_code import compiled


@compiled
def _numbers(record: Any, at: int, width: int, numbers: Any) -> int:
    """Fill ``numbers``, int64 [n], from ``record`` and return where the next ones stand."""
    if width == 2:
        for place in range(len(numbers)):
            numbers[place] = np.int64(record[at + 2 * place]) | np.int64(record[at + 2 * place + 1]) << 8
    elif width == 1:
        for place in range(len(numbers)):
            numbers[place] = np.int64(record[at + place])
    else:
        for place in range(len(numbers)):
            value = np.int64(0)
            for byte in range(width):
                value |= np.int64(record[at + width * place + byte]) << (8 * byte)
            numbers[place] = value
    return at + width * len(numbers)


@compiled
def _all_below(numbers: Any, limit: int) -> Any:
    largest = np.int64(-1)
    for number in numbers:
        largest = max(largest, number)
    return largest < limit


@compiled
def unpack(record: Any, shape: Any, bases: Any, bonds: Any, pairs: Any) -> Any:
    """What ``conversion.pack_rows`` wrote for one crystal.

    Args:
        record: uint8.
        shape: atoms n, directed bonds D, short directed bonds s, 1 if the record is wide.
        bases: numbers of the crystal's first atom, directed and undirected bond, added to what counts those.
        bonds: filled with centre, neighbour, undirected and reverse of each directed bond, int64 [4, D].
        pairs: filled with first directed bond (counted within the crystal) and image of each undirected bond, int64
            [U, 4].

    Returns:
        directed bonds that take part in angles (within the crystal) and their roles, int64 [2, s]; and whether the
        record makes sense: of an unsound one the rest means nothing.
    """
    n_atoms, n_directed, n_short = shape[0], shape[1], shape[2]
    n_undirected = n_directed // 2
    width, image_width = (4, 4) if shape[3] else (2, 1)
    per_atom, bits = np.empty(n_atoms, np.int64), np.empty((n_directed + 7) // 8, np.int64)
    later, ends = np.zeros(n_undirected + 1, np.int64), np.zeros(n_undirected + 1, np.int64)
    first, image = np.zeros(n_undirected + 1, np.int64), np.empty(3 * n_undirected, np.int64)
    short = np.empty((2, n_short), np.int64)
    expected = width * (n_atoms + 2 * n_undirected + n_short) + 3 * image_width * n_undirected + len(bits) + n_short
    if expected > len(record):
        return short, False
    at = _numbers(record, 0, width, per_atom)
    at = _numbers(record, at, width, later[:n_undirected])
    at = _numbers(record, at, width, ends[:n_undirected])
    at = _numbers(record, at, width, short[0])
    at = _numbers(record, at, image_width, image)
    at = _numbers(record, at, 1, bits)
    _numbers(record, at, 1, short[1])
    total = np.int64(0)
    for atom in range(n_atoms):
        total += per_atom[atom]
    if not (
        total == n_directed
        and _all_below(later, max(1, n_undirected))
        and _all_below(ends, n_atoms)
        and _all_below(short[0], n_directed)
    ):
        return short, False

    atom0, bond0, half0 = bases[0], bases[1], bases[2]
    center, neighbor, undirected, reverse = bonds[0], bonds[1], bonds[2], bonds[3]
    bond, new, old = 0, np.int64(0), np.int64(0)
    for atom in range(n_atoms):
        for here in range(bond, bond + per_atom[atom]):
            # Without a branch, since which of its two a bond is cannot be guessed: ``is_first`` selects by product.
            # An unsound record may run past the end of the lists, which have one more place for that.
            is_first = bits[here >> 3] >> (here & 7) & 1
            new_or_end, old_or_end = min(new, n_undirected), min(old, n_undirected)
            pair = is_first * new_or_end + (1 - is_first) * later[old_or_end]
            begin = is_first * here + (1 - is_first) * first[pair]
            center[here] = atom + atom0
            neighbor[here] = is_first * (ends[new_or_end] + atom0) + (1 - is_first) * center[begin]
            undirected[here], reverse[here] = pair + half0, begin + bond0
            first[pair], reverse[begin] = begin, here + bond0
            new += is_first
            old += 1 - is_first
        bond += per_atom[atom]
    half = np.int64(1) << (8 * image_width - 1)
    for pair in range(n_undirected):
        pairs[pair, 0] = first[pair]
        for axis in range(3):
            pairs[pair, 1 + axis] = (image[3 * pair + axis] ^ half) - half
    return short, new == n_undirected and old == n_undirected


@compiled
def _angles_at_atoms(short: Any, units: Any, blocks: Any) -> Any:
    """Angle between every two short bonds at one atom, radian.

    Args:
        short: centre (within the crystal) of each short directed bond, ascending, int64 [s].
        units: directions of these, float64 [s, 3].
        blocks: where the bonds of each atom begin, int64 [n + 1].

    Returns:
        where the row of each bond begins, int64 [s], and the rows: its angles with all bonds of its atom, float32.
    """
    rows = np.empty(len(short), np.int64)
    size = 0
    for place in range(len(short)):
        rows[place] = size
        size += blocks[short[place] + 1] - blocks[short[place]]
    angles = np.zeros(size, np.float32)
    for place in range(len(short)):
        begin, end = blocks[short[place]], blocks[short[place] + 1]
        for other in range(place + 1, end):
            cosine = (
                units[place, 0] * units[other, 0]
                + units[place, 1] * units[other, 1]
                + units[place, 2] * units[other, 2]
            )
            angle = math.acos((1 - 1e-6) * cosine)
            angles[rows[place] + other - begin] = angle
            angles[rows[other] + place - begin] = angle
    return rows, angles


@compiled
def assemble(records: Any, starts: Any, sizes: Any, n_atoms: Any, index: Any, cart: Any, lattices: Any) -> Any:  # noqa: PLR0912, PLR0915  one pass
    """B records as one graph with lengths and angles.

    Args:
        records: the records, one after the other, uint8; starts: where each begins, and the end, int64 [B + 1].
        sizes: totals of directed, short undirected bonds and angles, int64 [3].
        n_atoms: int64 [B]. index: rows of the index of ``conversion.pack_rows``, int64 [B, 6].
        cart: Cartesian coordinates, Å, float64 [A, 3]. lattices: float64 [B, 3, 3], Å.

    Returns:
        atom_crystal [A]; centre, neighbour, undirected and reverse of each directed bond [4, D]; bond_length float32
        [U]; short_bond [S]; angle_center, angle_bond_i, angle_bond_j, angle_by_j [4, T]; angle float32 [T]; and the
        number of the first unsound record, -1 if all are sound. Lengths and angles are computed in float64 and
        rounded once.
    """
    n_directed, n_short_bonds, n_angles = sizes[0], sizes[1], sizes[2]
    atom_crystal = np.empty(len(cart), np.int64)
    bonds = np.empty((4, n_directed), np.int64)
    bond_length = np.empty(n_directed // 2, np.float32)
    short_bond = np.empty(n_short_bonds, np.int64)
    numbers, angle = np.empty((4, n_angles), np.int64), np.empty(n_angles, np.float32)
    angle_center, angle_i, angle_j, by_j = numbers[0], numbers[1], numbers[2], numbers[3]
    shape, bases = np.empty(4, np.int64), np.zeros(3, np.int64)
    unsound = -1
    atom0 = bond0 = short0 = angle0 = 0
    for b in range(len(n_atoms)):
        for atom in range(atom0, atom0 + n_atoms[b]):
            atom_crystal[atom] = b
        half0, n_pairs = bond0 // 2, index[b, 1] // 2
        shape[0], shape[1], shape[2], shape[3] = n_atoms[b], index[b, 1], index[b, 2], index[b, 5]
        bases[0], bases[1], bases[2] = atom0, bond0, half0
        pairs = np.empty((n_pairs, 4), np.int64)
        end = bond0 + index[b, 1]
        short, sound = unpack(records[starts[b] : starts[b + 1]], shape, bases, bonds[:, bond0:end], pairs)
        if not sound:
            unsound = b
            break
        lattice = lattices[b]
        vectors = np.empty((n_pairs, 4))
        for pair in range(n_pairs):
            here, there = bonds[0, bond0 + pairs[pair, 0]], bonds[1, bond0 + pairs[pair, 0]]
            i, j, k = float(pairs[pair, 1]), float(pairs[pair, 2]), float(pairs[pair, 3])
            squared = 0.0
            for axis in range(3):
                move = i * lattice[0, axis] + j * lattice[1, axis] + k * lattice[2, axis]
                vectors[pair, axis] = cart[there, axis] - cart[here, axis] + move
                squared += vectors[pair, axis] * vectors[pair, axis]
            vectors[pair, 3] = math.sqrt(squared)
            bond_length[half0 + pair] = vectors[pair, 3]

        # Number the short undirected bonds in ascending order.
        n_directed_short = index[b, 2]
        number = np.full(n_pairs, -1, np.int64)
        for place in range(n_directed_short):
            number[bonds[2, bond0 + short[0, place]] - half0] = 0
        n_short = 0
        for pair in range(n_pairs):
            if number[pair] == 0:
                number[pair] = n_short
                if short0 + n_short < n_short_bonds:
                    short_bond[short0 + n_short] = half0 + pair
                n_short += 1
        # Where the one or two directed bonds of each stand in ``short``, and where those of each atom do.
        places = np.full((n_short, 2), -1, np.int64)
        units, blocks = np.empty((n_directed_short, 3)), np.empty(n_atoms[b] + 1, np.int64)
        centers, which = np.empty(n_directed_short, np.int64), np.empty(n_directed_short, np.int64)
        n_first, n_second = np.zeros(n_atoms[b], np.int64), np.zeros(n_atoms[b], np.int64)
        filled = 0
        for place in range(n_directed_short):
            bond = short[0, place]
            pair = bonds[2, bond0 + bond] - half0
            centers[place], which[place] = bonds[0, bond0 + bond] - atom0, number[pair]
            n_first[centers[place]] += short[1, place] & AS_I
            n_second[centers[place]] += (short[1, place] & AS_J) // AS_J
            places[number[pair], 0 if places[number[pair], 0] < 0 else 1] = place
            share = (1.0 if pairs[pair, 0] == bond else -1.0) / vectors[pair, 3]
            for axis in range(3):
                units[place, axis] = share * vectors[pair, axis]
            while filled <= centers[place]:
                blocks[filled] = place
                filled += 1
        while filled <= n_atoms[b]:
            blocks[filled] = n_directed_short
            filled += 1
        counts = np.zeros(n_short + 1, np.int64)
        total = 0
        for place in range(n_directed_short):
            if short[1, place] & AS_J:
                partners = n_first[centers[place]] - (short[1, place] & AS_I)
                counts[which[place] + 1] += partners
                total += partners
        if n_short != index[b, 3] or total != index[b, 4]:
            unsound = b
            break

        rows, values = _angles_at_atoms(centers, units, blocks)
        count = angle0
        for bond in range(n_short):
            for side in range(2):
                place = places[bond, side]
                if place < 0 or not short[1, place] & AS_I:
                    continue
                center = centers[place]
                # All others at this atom: those before this bond, then those behind it.
                for half in range(2):
                    begin = place + 1 if half else blocks[center]
                    stop = blocks[center + 1] if half else place
                    shift = rows[place] - blocks[center]
                    if n_second[center] == blocks[center + 1] - blocks[center]:
                        for other in range(begin, stop):
                            here = count + other - begin
                            angle[here], angle_j[here] = values[shift + other], short0 + which[other]
                            angle_center[here], angle_i[here] = atom0 + center, short0 + bond
                        count += stop - begin
                    else:
                        for other in range(begin, stop):
                            if short[1, other] & AS_J:
                                angle[count], angle_j[count] = values[shift + other], short0 + which[other]
                                angle_center[count], angle_i[count] = atom0 + center, short0 + bond
                                count += 1
        for bond in range(n_short):
            counts[bond + 1] += counts[bond]
        for here in range(angle0, count):
            bond = angle_j[here] - short0
            by_j[angle0 + counts[bond]] = here
            counts[bond] += 1
        atom0, bond0, short0, angle0 = atom0 + n_atoms[b], end, short0 + n_short, count
    return atom_crystal, bonds, bond_length, short_bond, numbers, angle, unsound
