"""The compiled core of batching: packed records in, one large disconnected graph out.

Indices within a crystal are unsigned: Numba then need not look whether they count from the end.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from mbqueue.data.conversion import AS_I, AS_J
from mbqueue.data.machine_code import compiled

#: Coefficients of asin(x) = x + x · p(x²) / q(x²) for |x| ≤ 1/2, and how it serves for acos beyond: fdlibm's e_acos.c
#: (Sun Microsystems 1993), whose error is below one unit in the last place of a float64.
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
def _numbers(record: Any, at: int, width: int, numbers: Any) -> int:
    """Fill ``numbers``, uint32 [n], from ``record`` and return where the next ones stand."""
    if width == 2:
        for place in range(len(numbers)):
            numbers[place] = record[at + 2 * place] | np.uint32(record[at + 2 * place + 1]) << 8
    elif width == 1:
        for place in range(len(numbers)):
            numbers[place] = record[at + place]
    else:
        for place in range(len(numbers)):
            value = np.uint32(0)
            for byte in range(width):
                value |= np.uint32(record[at + width * place + byte]) << (8 * byte)
            numbers[place] = value
    return at + width * len(numbers)


@compiled
def _all_below(numbers: Any, limit: int) -> Any:
    largest = np.uint32(0)
    for number in numbers:
        largest = max(largest, number)
    return len(numbers) == 0 or largest < limit


@compiled
def unpack(record: Any, shape: Any, bases: Any, bonds: Any, ends: Any, images: Any, short: Any) -> Any:
    """What ``conversion.pack_rows`` wrote for one crystal.

    Args:
        record: uint8.
        shape: atoms n, directed bonds D, short directed bonds s, 1 if the record is wide; int64 [4].
        bases: numbers of the crystal's first atom, directed and undirected bond, added to what counts those.
        bonds: filled with centre, neighbour, undirected and reverse of each directed bond, four of int64 [D].
        ends: filled with first and second directed bond of each undirected one, within the crystal, uint32 [2, U + 1];
            the last place is only for work.
        images: filled with the image of each undirected bond, uint32 [3 U], to be read as int8 (int32 if wide).
        short: filled with the directed bonds that take part in angles, within the crystal, and their roles, uint32
            [2, s].

    Returns:
        whether the record makes sense; of an unsound one the rest means nothing.
    """
    n_atoms, n_directed = shape[0], shape[1]
    n_undirected = n_directed // 2
    width, image_width = (4, 4) if shape[3] else (2, 1)
    if width * (n_atoms + n_undirected + shape[2]) + 3 * image_width * n_undirected + shape[2] > len(record):
        return False
    per_atom = np.empty(n_atoms, np.uint32)
    first, second = ends[0], ends[1][:n_undirected]
    at = _numbers(record, 0, width, per_atom)
    at = _numbers(record, at, width, second)
    at = _numbers(record, at, width, short[0])
    at = _numbers(record, at, image_width, images)
    _numbers(record, at, 1, short[1])
    total = np.int64(0)
    for atom in range(n_atoms):
        total += per_atom[atom]
    if total != n_directed or not (_all_below(second, n_directed) and _all_below(short[0], n_directed)):
        return False

    atom0, bond0, half0 = bases[0], bases[1], bases[2]
    center, neighbor, undirected, reverse = bonds
    bond = 0
    for atom in range(n_atoms):
        for here in range(bond, bond + per_atom[atom]):
            center[here] = atom + atom0
        bond += per_atom[atom]
    for here in range(n_directed):
        undirected[here] = -1
    for pair in range(n_undirected):
        undirected[second[pair]] = pair
    n_first = np.int64(0)
    for here in range(n_directed):
        n_first += undirected[here] < 0
    if n_first != n_undirected:
        return False
    # What is no second bond is a first one; without a branch, since which of the two it is cannot be guessed.
    pair = 0
    for here in range(n_directed):
        first[pair] = here
        pair += undirected[here] < 0
    for pair in range(n_undirected):
        begin, end = first[pair], second[pair]
        undirected[begin], undirected[end] = half0 + pair, half0 + pair
        reverse[begin], reverse[end] = bond0 + end, bond0 + begin
        neighbor[begin], neighbor[end] = center[end], center[begin]
    return True


@compiled
def _measure(
    center: Any, neighbor: Any, first: Any, images: Any, half: int, cart: Any, lattice: Any, vectors: Any
) -> None:
    """Fill ``vectors``, float64 [U, 4], with each undirected bond's vector, seen from its first end, and length, Å."""
    for pair in range(len(vectors)):
        here, there = np.uint64(center[first[pair]]), np.uint64(neighbor[first[pair]])
        i = float((np.int64(images[3 * pair]) ^ half) - half)
        j = float((np.int64(images[3 * pair + 1]) ^ half) - half)
        k = float((np.int64(images[3 * pair + 2]) ^ half) - half)
        squared = 0.0
        for axis in range(3):
            move = i * lattice[0, axis] + j * lattice[1, axis] + k * lattice[2, axis]
            vectors[pair, axis] = cart[there, axis] - cart[here, axis] + move
            squared += vectors[pair, axis] * vectors[pair, axis]
        vectors[pair, 3] = math.sqrt(squared)


@compiled
def positions(frac: Any, lattices: Any, n_atoms: Any) -> Any:
    """Cartesian coordinates, Å, float64 [A, 3], of fractional ones in B cells of ``n_atoms`` each.

    Unlike ``graphs.cartesian`` not pymatgen's to the last bit, which only the choice of bonds depends on.
    """
    cart = np.empty_like(frac)
    base = 0
    for b in range(len(n_atoms)):
        lattice = lattices[b]
        for atom in range(base, base + n_atoms[b]):
            u, v, w = frac[atom, 0], frac[atom, 1], frac[atom, 2]
            for axis in range(3):
                cart[atom, axis] = u * lattice[0, axis] + v * lattice[1, axis] + w * lattice[2, axis]
        base += n_atoms[b]
    return cart


@compiled
def arc_cosines(cosines: Any, angles: Any) -> None:
    """acos of each of ``cosines``, float64 within ±1, into ``angles``, float32; many at once, as libm's cannot be."""
    p0, p1, p2, p3, p4, p5 = _P
    q1, q2, q3, q4 = _Q
    for place in range(len(cosines)):
        x = cosines[place]
        size = abs(x)
        inner = size < 0.5
        z = x * x if inner else 0.5 * (1.0 - size)
        root = math.sqrt(z)
        share = z * (p0 + z * (p1 + z * (p2 + z * (p3 + z * (p4 + z * p5)))))
        share /= 1.0 + z * (q1 + z * (q2 + z * (q3 + z * q4)))
        outside = 2.0 * (root + root * share)
        angles[place] = 0.5 * math.pi - (x + x * share) if inner else (outside if x > 0 else math.pi - outside)


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
    # One piece of memory for all: the allocator keeps that for the next batch, where it gives many pieces back to the
    # system, which has to clear them again. The last two have one place more, because an angle or a bond that does
    # not count is written too, and then written over.
    n_atoms_all, n_angle_places = len(cart), n_angles + 1
    room = np.empty(n_atoms_all + 4 * (n_directed + n_angle_places) + n_short_bonds + 1, np.int64)
    atom_crystal, room = room[:n_atoms_all], room[n_atoms_all:]
    bonds, room = room[: 4 * n_directed].reshape((4, n_directed)), room[4 * n_directed :]
    numbers, short_bond = room[: 4 * n_angle_places].reshape((4, n_angle_places)), room[4 * n_angle_places :]
    bond_length, angle = np.empty(n_directed // 2, np.float32), np.empty(n_angles, np.float32)
    centers, neighbors, undirected, reverse = bonds[0], bonds[1], bonds[2], bonds[3]
    angle_center, angle_i, angle_j, by_j = numbers[0], numbers[1], numbers[2], numbers[3]
    shape, bases = np.empty(4, np.int64), np.zeros(3, np.int64)
    unsound = -1
    atom0 = bond0 = short0 = angle0 = 0
    for b in range(len(n_atoms)):
        for atom in range(atom0, atom0 + n_atoms[b]):
            atom_crystal[atom] = b
        half0, n_pairs, n_directed_short = bond0 // 2, index[b, 1] // 2, index[b, 2]
        shape[0], shape[1], shape[2], shape[3] = n_atoms[b], index[b, 1], n_directed_short, index[b, 5]
        bases[0], bases[1], bases[2] = atom0, bond0, half0
        ends, images = np.empty((2, n_pairs + 1), np.uint32), np.empty(3 * n_pairs, np.uint32)
        short = np.empty((2, n_directed_short), np.uint32)
        roles = short[1]
        end = bond0 + index[b, 1]
        mine = centers[bond0:end], neighbors[bond0:end], undirected[bond0:end], reverse[bond0:end]
        of_center, of_neighbor, pair_of, _ = mine
        if not unpack(records[starts[b] : starts[b + 1]], shape, bases, mine, ends, images, short):
            unsound = b
            break
        vectors = np.empty((n_pairs, 4))
        _measure(of_center, of_neighbor, ends[0], images, 1 << (31 if shape[3] else 7), cart, lattices[b], vectors)
        for pair in range(n_pairs):
            bond_length[half0 + pair] = vectors[pair, 3]

        # Number the short undirected bonds in ascending order.
        is_short, number = np.zeros(n_pairs, np.uint8), np.empty(n_pairs, np.uint32)
        ascending = True
        for place in range(n_directed_short):
            ascending &= place == 0 or short[0, place - 1] < short[0, place]
            is_short[np.uint64(pair_of[short[0, place]] - half0)] = 1
        n_short = 0
        for pair in range(n_pairs):
            n_short += is_short[pair]
        if not ascending or n_short != index[b, 3]:
            unsound = b
            break
        n_short = 0
        for pair in range(n_pairs):
            number[pair], short_bond[short0 + n_short] = n_short, half0 + pair
            n_short += is_short[pair]
        # Where the one or two directed bonds of each stand in ``short``, and where those of each atom do.
        places = np.full((n_short, 2), -1, np.int64)
        units, blocks = np.empty((n_directed_short, 3)), np.empty(n_atoms[b] + 1, np.uint32)
        at_atom, which = np.empty(n_directed_short, np.int64), np.empty(n_directed_short, np.uint32)
        n_first = np.zeros(n_atoms[b], np.int64)
        filled = 0
        for place in range(n_directed_short):
            bond = short[0, place]
            joined = np.uint64(pair_of[bond] - half0)
            at_atom[place], which[place] = of_center[bond] - atom0, number[joined]
            n_first[at_atom[place]] += short[1, place] & AS_I
            places[number[joined], 0 if places[number[joined], 0] < 0 else 1] = place
            share = (1.0 if ends[0, joined] == bond else -1.0) / vectors[joined, 3]
            for axis in range(3):
                units[place, axis] = share * vectors[joined, axis]
            while filled <= at_atom[place]:
                blocks[filled] = place
                filled += 1
        while filled <= n_atoms[b]:
            blocks[filled] = n_directed_short
            filled += 1
        counts = np.zeros(n_short + 1, np.int64)
        total = 0
        for place in range(n_directed_short):
            if short[1, place] & AS_J:
                partners = n_first[at_atom[place]] - (short[1, place] & AS_I)
                counts[which[place] + 1] += partners
                total += partners
        if total != index[b, 4]:
            unsound = b
            break

        cosines, span = np.empty(total + 1), slice(angle0, angle0 + total + 1)
        my_center, my_i, my_j, my_by_j = angle_center[span], angle_i[span], angle_j[span], by_j[span]
        count = np.uint64(0)
        for bond in range(n_short):
            for side in range(2):
                place = places[bond, side]
                if place < 0 or not short[1, place] & AS_I:
                    continue
                center = at_atom[place]
                x, y, z = units[place, 0], units[place, 1], units[place, 2]
                self = np.uint64(place)
                for other in range(blocks[center], blocks[center + 1]):
                    my_center[count], my_i[count] = atom0 + center, short0 + bond
                    my_j[count] = short0 + which[other]
                    cosine = x * units[other, 0] + y * units[other, 1] + z * units[other, 2]
                    cosines[count] = (1 - 1e-6) * cosine
                    count += np.uint64((other != self) & (roles[other] >= AS_J))
        arc_cosines(cosines[:total], angle[angle0 : angle0 + total])
        for bond in range(n_short):
            counts[bond + 1] += counts[bond]
        for here in range(total):
            bond = np.uint64(my_j[here] - short0)
            my_by_j[np.uint64(counts[bond])] = angle0 + here
            counts[bond] += 1
        atom0, bond0, short0, angle0 = atom0 + n_atoms[b], end, short0 + n_short, angle0 + total
    return atom_crystal, bonds, bond_length, short_bond[:n_short_bonds], numbers[:, :n_angles], angle, unsound
