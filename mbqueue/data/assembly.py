"""The compiled core of batching: packed records in, one large disconnected graph out."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from mbqueue.data.conversion import AS_I, AS_J
from mbqueue.data.machine_code import compiled


@compiled
def _get(record: Any, at: int, width: int) -> Any:
    if width == 2:
        return np.int64(record[at]) | np.int64(record[at + 1]) << 8
    value = np.int64(0)
    for byte in range(width):
        value |= np.int64(record[at + byte]) << (8 * byte)
    return value


@compiled
def unpack(record: Any, n_atoms: int, n_directed: int, n_short: int, wide: bool) -> Any:
    """What ``conversion.pack_rows`` wrote for one crystal.

    Returns:
        center, neighbour, undirected and reverse of each directed bond, int64 [D] each; first directed bond of each
        undirected one int64 [U]; image of that one int64 [U, 3]; directed bonds that take part in angles int64 [s]
        and their roles uint8 [s]; and whether the record makes sense: an unsound one is not decoded to the end.
    """
    n_undirected = n_directed // 2
    width, image_width = (4, 4) if wide else (2, 1)
    later = width * n_atoms
    ends = later + width * n_undirected
    shorts = ends + width * n_undirected
    images = shorts + width * n_short
    bits = images + 3 * image_width * n_undirected
    ways = bits + (n_directed + 7) // 8
    center, neighbor = np.empty(n_directed, np.int64), np.empty(n_directed, np.int64)
    undirected, reverse = np.empty(n_directed, np.int64), np.empty(n_directed, np.int64)
    first, image = np.empty(n_undirected, np.int64), np.empty((n_undirected, 3), np.int64)
    short, roles = np.empty(n_short, np.int64), np.empty(n_short, np.uint8)
    sound = ways + n_short <= len(record)
    new = old = bond = 0
    for atom in range(n_atoms if sound else 0):
        end = bond + _get(record, width * atom, width)
        if end > n_directed:
            sound = False
            break
        for here in range(bond, end):
            center[here] = atom
            if record[bits + (here >> 3)] >> (here & 7) & 1:
                if new == n_undirected:
                    sound = False
                    break
                neighbor[here], undirected[here], first[new] = _get(record, ends + width * new, width), new, here
                sound = sound and neighbor[here] < n_atoms
                new += 1
            else:
                pair = _get(record, later + width * old, width) if old < n_undirected else n_undirected
                if pair >= new:
                    sound = False
                    break
                neighbor[here], undirected[here] = center[first[pair]], pair
                reverse[here], reverse[first[pair]] = first[pair], here
                old += 1
        bond = end
        if not sound:
            break
    sound = sound and bond == n_directed and new == n_undirected and old == n_undirected
    for place in range(n_short if sound else 0):
        short[place], roles[place] = _get(record, shorts + width * place, width), record[ways + place]
        sound = sound and short[place] < n_directed
    for pair in range(n_undirected if sound else 0):
        for axis in range(3):
            value = _get(record, images + image_width * (3 * pair + axis), image_width)
            half = np.int64(1) << (8 * image_width - 1)
            image[pair, axis] = (value ^ half) - half
    return center, neighbor, undirected, reverse, first, image, short, roles, sound


@compiled
def assemble(records: Any, starts: Any, sizes: Any, n_atoms: Any, index: Any, cart: Any, lattices: Any) -> Any:  # noqa: PLR0912, PLR0915  one pass over the data
    """B records as one graph with lengths and angles.

    Args:
        records: the records, one after the other, uint8; starts: where each begins, and the end, int64 [B + 1].
        sizes: totals of directed, short undirected bonds and angles, int64 [3].
        n_atoms: int64 [B]. index: rows of the index of ``conversion.pack_rows``, int64 [B, 6].
        cart: Cartesian coordinates, Å, float64 [A, 3]. lattices: float64 [B, 3, 3], Å.

    Returns:
        atom_crystal [A]; bond_center, bond_neighbor, bond_undirected, bond_reverse [D]; bond_length float32 [U];
        short_bond [S]; angle_center, angle_bond_i, angle_bond_j, angle_by_j [T]; angle float32 [T]; and the number of
        the first unsound record, -1 if all are sound. Lengths and angles are computed in float64 and rounded once.
    """
    n_directed, n_short_bonds, n_angles = sizes[0], sizes[1], sizes[2]
    atom_crystal = np.empty(len(cart), np.int64)
    bond_center, bond_neighbor = np.empty(n_directed, np.int64), np.empty(n_directed, np.int64)
    bond_undirected, bond_reverse = np.empty(n_directed, np.int64), np.empty(n_directed, np.int64)
    bond_length = np.empty(n_directed // 2, np.float32)
    short_bond = np.empty(n_short_bonds, np.int64)
    angle_center, angle_i, angle_j = (
        np.empty(n_angles, np.int64),
        np.empty(n_angles, np.int64),
        np.empty(n_angles, np.int64),
    )
    angle_by_j, angle = np.empty(n_angles, np.int64), np.empty(n_angles, np.float32)
    unsound = -1
    atom0 = bond0 = short0 = angle0 = 0
    for b in range(len(n_atoms)):
        for atom in range(atom0, atom0 + n_atoms[b]):
            atom_crystal[atom] = b
        center, neighbor, undirected, reverse, first, image, short, roles, sound = unpack(
            records[starts[b] : starts[b + 1]], n_atoms[b], index[b, 1], index[b, 2], index[b, 5] == 1
        )
        if not sound:
            unsound = b
            break
        lattice = lattices[b]
        half0 = bond0 // 2
        vector, length = np.empty((len(first), 3)), np.empty(len(first))
        for pair in range(len(first)):
            bond = first[pair]
            squared = 0.0
            for axis in range(3):
                part = (
                    cart[atom0 + neighbor[bond], axis]
                    - cart[atom0 + center[bond], axis]
                    + image[pair, 0] * lattice[0, axis]
                    + image[pair, 1] * lattice[1, axis]
                    + image[pair, 2] * lattice[2, axis]
                )
                vector[pair, axis] = part
                squared += part * part
            length[pair] = math.sqrt(squared)
            bond_length[half0 + pair] = length[pair]
        for bond in range(len(center)):
            bond_center[bond0 + bond] = atom0 + center[bond]
            bond_neighbor[bond0 + bond] = atom0 + neighbor[bond]
            bond_undirected[bond0 + bond] = half0 + undirected[bond]
            bond_reverse[bond0 + bond] = bond0 + reverse[bond]

        # Short undirected bonds in ascending order, and where their one or two directed bonds stand in ``short``.
        number = np.full(len(first), -1, np.int64)
        for place in range(len(short)):
            number[undirected[short[place]]] = 0
        n_short = 0
        for pair in range(len(first)):
            if number[pair] == 0:
                number[pair] = n_short
                if short0 + n_short < n_short_bonds:
                    short_bond[short0 + n_short] = half0 + pair
                n_short += 1
        places = np.full((n_short, 2), -1, np.int64)
        unit = np.empty((len(short), 3))
        which, block = np.empty(len(short), np.int64), np.empty(n_atoms[b] + 1, np.int64)
        filled = 0
        for place in range(len(short)):
            bond = short[place]
            pair = undirected[bond]
            which[place] = number[pair]
            places[number[pair], 0 if places[number[pair], 0] < 0 else 1] = place
            sign = 1.0 if first[pair] == bond else -1.0
            for axis in range(3):
                unit[place, axis] = sign * vector[pair, axis] / length[pair]
            while filled <= center[bond]:
                block[filled] = place
                filled += 1
        while filled <= n_atoms[b]:
            block[filled] = len(short)
            filled += 1
        by_j = np.zeros(n_short + 1, np.int64)
        count = angle0
        for bond in range(n_short):
            for side in range(2):
                place = places[bond, side]
                if place < 0 or not roles[place] & AS_I:
                    continue
                atom = center[short[place]]
                for other in range(block[atom], block[atom + 1]):
                    if other == place or not roles[other] & AS_J or count >= n_angles:
                        continue
                    cosine = (
                        unit[place, 0] * unit[other, 0]
                        + unit[place, 1] * unit[other, 1]
                        + unit[place, 2] * unit[other, 2]
                    )
                    angle[count] = math.acos((1 - 1e-6) * cosine)
                    angle_center[count] = atom0 + atom
                    angle_i[count] = short0 + bond
                    angle_j[count] = short0 + which[other]
                    by_j[which[other] + 1] += 1
                    count += 1
        if n_short != index[b, 3] or count - angle0 != index[b, 4]:
            unsound = b
            break
        for bond in range(n_short):
            by_j[bond + 1] += by_j[bond]
        for here in range(angle0, count):
            bond = angle_j[here] - short0
            angle_by_j[angle0 + by_j[bond]] = here
            by_j[bond] += 1
        atom0 += n_atoms[b]
        bond0 += index[b, 1]
        short0 += n_short
        angle0 = count
    return (
        atom_crystal,
        bond_center,
        bond_neighbor,
        bond_undirected,
        bond_reverse,
        bond_length,
        short_bond,
        angle_center,
        angle_i,
        angle_j,
        angle_by_j,
        angle,
        unsound,
    )
