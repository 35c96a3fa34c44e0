"""Convert crystals to packed graphs, with compiled functions.

The code uses plain loops, because Numba needs half a second to compile each array expression.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from mbqueue.data.machine_code import compiled
from mbqueue.data.neighbors import find_bonds, sufficient_cutoff

#: Two bits for each directed bond: whether the bond is the first bond of an angle, and whether it is the second.
AS_I = 1
AS_J = 2


@compiled
def _fewest(per_atom: Any) -> Any:
    fewest = per_atom[0]
    for atom in range(len(per_atom)):
        fewest = min(fewest, per_atom[atom])
    return fewest


@compiled
def _hash(center: int, neighbor: int, i: int, j: int, k: int) -> int:
    mixed = center * 0x9E3779B1 + neighbor * 0x85EBCA77 + i * 0xC2B2AE3D + j * 0x27D4EB2F + k * 0x165667B1
    mixed ^= mixed >> 15
    mixed *= 0x2C1B3C6D
    return mixed ^ (mixed >> 12)


@compiled
def pair_bonds(per_atom: Any, slots: Any, copies: Any) -> Any:
    """Pair directed bonds into undirected bonds, which are numbered by first appearance.

    Returns:
        the undirected bond of each directed bond, int32 [D]; the first directed bond of each undirected bond, int32
        [U]; its second directed bond, or -1 if there is none, int32 [U].
    """
    n_directed = len(slots)
    undirected, centers = np.empty(n_directed, np.int32), np.empty(n_directed, np.int32)
    first, second = np.empty(n_directed, np.int32), np.empty(n_directed, np.int32)
    size = 16
    while size < n_directed + n_directed // 2:
        size *= 2
    mask = size - 1
    table = np.full(size, -1, np.int32)
    count = bond = 0
    for center in range(len(per_atom)):
        for _ in range(per_atom[center]):
            slot = slots[bond]
            other, i, j, k = copies[slot, 0], copies[slot, 1], copies[slot, 2], copies[slot, 3]
            centers[bond] = center
            found = -1
            if other <= center:
                position = _hash(other, center, -i, -j, -k) & mask
                while table[position] >= 0 and found < 0:
                    known = first[table[position]]
                    back = slots[known]
                    if (
                        centers[known] == other
                        and copies[back, 0] == center
                        and copies[back, 1] == -i
                        and copies[back, 2] == -j
                        and copies[back, 3] == -k
                    ):
                        found = table[position]
                    position = (position + 1) & mask
            if found >= 0:
                second[found] = bond
                undirected[bond] = found
            else:
                position = _hash(center, other, i, j, k) & mask
                while table[position] >= 0:
                    position = (position + 1) & mask
                table[position] = count
                first[count], second[count] = bond, -1
                undirected[bond] = count
                count += 1
            bond += 1
    return undirected, first[:count], second[:count]


@compiled
def _drop_unpaired(per_atom: Any, slots: Any, squares: Any, undirected: Any, second: Any) -> int:
    """In the first three arrays, drop every bond that has no reverse bond; return how many bonds remain."""
    bond = kept = 0
    for center in range(len(per_atom)):
        before = kept
        for _ in range(per_atom[center]):
            if second[undirected[bond]] >= 0:
                slots[kept], squares[kept] = slots[bond], squares[bond]
                kept += 1
            bond += 1
        per_atom[center] = kept - before
    return kept


@compiled
def _short_bonds(per_atom: Any, squares: Any, undirected: Any, first: Any, cutoff: float) -> Any:
    """Find the directed bonds that take part in angles, and their roles.

    As in CHGNet, both directions of an undirected bond can be the first bond of an angle if the length of the first
    direction is at most ``cutoff``. The second bond is any other directed bond at the same centre that is shorter than
    ``cutoff``.

    Returns:
        the bonds, ascending, int32 [s]; their roles, uint8 [s]; the number of angles.
    """
    short, roles = np.empty(len(squares), np.int32), np.empty(len(squares), np.uint8)
    n_short = n_angles = bond = 0
    for center in range(len(per_atom)):
        begin = n_short
        n_i = n_j = 0
        for here in range(bond, bond + per_atom[center]):
            role = 0
            if math.sqrt(squares[first[undirected[here]]]) <= cutoff:
                role += AS_I
                n_i += 1
            if math.sqrt(squares[here]) < cutoff:
                role += AS_J
                n_j += 1
            short[n_short], roles[n_short] = here, role
            n_short += int(role != 0)
        bond += per_atom[center]
        # Drop the bonds that form no angle at this centre.
        end, n_short = n_short, begin
        for position in range(begin, end):
            is_i, is_j = roles[position] & AS_I, roles[position] >> 1
            partners_j, partners_i = n_j - is_j, n_i - is_i
            role = 0
            if is_i and partners_j > 0:
                role += AS_I
                n_angles += partners_j
            if is_j and partners_i > 0:
                role += AS_J
            short[n_short], roles[n_short] = short[position], role
            n_short += int(role != 0)
    return short[:n_short], roles[:n_short], n_angles


@compiled
def graph_of(cart: Any, lattice: Any, atom_cutoff: float, bond_cutoff: float) -> Any:
    """Compute the graph of one crystal.

    If rounding drops one direction of a bond that is as long as the cut-off, this function also drops the other
    direction. A bond as long as the cut-off carries no message, because CHGNet's radial basis is zero there. CHGNet's
    own converter raises an error if a bond has only one direction.

    Returns:
        bonds per atom, int64 [n]; the copy of an atom that is the neighbour in each directed bond, int32 [D]; atom and
        image of each copy, int32 [P, 4]; the undirected bond of each directed bond, int32 [D]; the first and the second
        directed bond of each undirected bond, both int32 [U]; the directed bonds that take part in angles, int32 [s];
        their roles, uint8 [s]; the number of angles; the cut-off used, Å.
    """
    cutoff = atom_cutoff
    per_atom, slots, squares, copies = find_bonds(cart, lattice, cutoff)
    while _fewest(per_atom) == 0:
        cutoff = sufficient_cutoff(cart, lattice, per_atom, cutoff)
        per_atom, slots, squares, copies = find_bonds(cart, lattice, cutoff)
    undirected, first, second = pair_bonds(per_atom, slots, copies)
    if 2 * len(first) != len(slots):
        kept = _drop_unpaired(per_atom, slots, squares, undirected, second)
        slots, squares = slots[:kept], squares[:kept]
        undirected, first, second = pair_bonds(per_atom, slots, copies)
    short, roles, n_angles = _short_bonds(per_atom, squares, undirected, first, bond_cutoff)
    return per_atom, slots, copies, undirected, first, second, short, roles, n_angles, cutoff


@compiled
def _put(records: Any, at: int, value: int, width: int) -> int:
    for byte in range(width):
        records[at + byte] = (value >> (8 * byte)) & 255
    return at + width


@compiled
def _is_wide(slots: Any, copies: Any, first: Any) -> bool:
    far = 0
    for bond in first:
        for axis in range(1, 4):
            far = max(far, abs(copies[slots[bond], axis]))
    return len(slots) > 0xFFFF or far > 127


@compiled
def _with_room(records: Any, at: int, needed: int) -> Any:
    """Return ``records``, or a larger copy of its first ``at`` bytes, with room for ``needed`` bytes."""
    if needed <= len(records):
        return records
    larger = np.empty(2 * needed, np.uint8)
    for byte in range(at):
        larger[byte] = records[byte]
    return larger


@compiled
def _count_short(short: Any, undirected: Any, n_undirected: int) -> int:
    """The number of undirected bonds that take part in angles."""
    seen = np.zeros(n_undirected, np.uint8)
    count = 0
    for bond in short:
        count += 1 - seen[undirected[bond]]
        seen[undirected[bond]] = 1
    return count


@compiled
def pack_rows(atom_offsets: Any, cart: Any, lattices: Any, atom_cutoff: float, bond_cutoff: float) -> Any:
    """Make the graphs of N consecutive crystals, and pack each graph as a record of bytes.

    A record contains little-endian integers in this order: bonds per atom [n], the second directed bond of each
    undirected bond [U], the directed bonds that take part in angles [s], the image of each undirected bond's neighbour
    in the first direction [U, 3], and the roles in angles [s]. Each image number and role takes 1 byte, and each other
    number takes 2 bytes. A record is wide if it has more than 65,535 directed bonds or an image beyond ±127. In a wide
    record, every number except the roles takes 4 bytes. The record omits numbers that can be derived from others:
    undirected bonds are numbered in the order of their first directed bonds, and the neighbour in one direction is the
    centre in the other.

    Args:
        atom_offsets: index of each crystal's first atom in ``cart``, int64 [N + 1], starting with 0.
        cart: Cartesian coordinates, Å, float64 [A, 3].
        lattices: rows are lattice vectors, Å, float64 [N, 3, 3].
        atom_cutoff: longest bond, Å.
        bond_cutoff: longest bond of the bond graph, Å.

    Returns:
        the records, uint8 [bytes]; their index, int64 [N, 6]; the cut-off used for each crystal, Å, float64 [N].
        Columns of the index: start of the record; counts of directed bonds, short directed bonds, short undirected
        bonds and angles; 1 if the record is wide, else 0.
    """
    n_rows = len(lattices)
    records = np.empty(512 * len(cart) + 1024, np.uint8)
    index, cutoffs = np.empty((n_rows, 6), np.int64), np.empty(n_rows)
    at = 0
    for row in range(n_rows):
        per_atom, slots, copies, undirected, first, second, short, roles, n_angles, cutoff = graph_of(
            cart[atom_offsets[row] : atom_offsets[row + 1]], lattices[row], atom_cutoff, bond_cutoff
        )
        wide, n_undirected = _is_wide(slots, copies, first), len(first)
        width, image_width = (4, 4) if wide else (2, 1)
        needed = at + width * (len(per_atom) + n_undirected + len(short)) + 3 * image_width * n_undirected + len(short)
        records = _with_room(records, at, needed)
        index[row, 0], index[row, 1], index[row, 2] = at, len(slots), len(short)
        index[row, 3] = _count_short(short, undirected, n_undirected)
        index[row, 4], index[row, 5] = n_angles, int(wide)
        cutoffs[row] = cutoff
        for count in per_atom:
            at = _put(records, at, count, width)
        for bond in second:
            at = _put(records, at, bond, width)
        for bond in short:
            at = _put(records, at, bond, width)
        for bond in first:
            for axis in range(1, 4):
                at = _put(records, at, copies[slots[bond], axis], image_width)
        for role in roles:
            at = _put(records, at, role, 1)
    return records[:at], index, cutoffs
