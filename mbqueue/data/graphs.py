"""Make the same crystal graphs as CHGNet's ``CrystalGraphConverter(algorithm="fast")``, but many at a time."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from mbqueue.data.assembly import unpack
from mbqueue.data.conversion import AS_I, AS_J, pack_rows
from mbqueue.data.crystals import Crystals

ATOM_CUTOFF = 6.0
BOND_CUTOFF = 3.0

#: Increase the converter's version whenever you change the records that the converter writes for a crystal.
CONVERTER_VERSION = 2


@dataclass(frozen=True, kw_only=True)
class PackedGraphs:
    """The graphs of N crystals, packed as records of bytes.

    Attributes:
        records: the concatenated records, uint8 [bytes].
        index: one row per crystal, int64 [N, 6]: the start of its record, its numbers of directed bonds, short directed
            bonds, short undirected bonds and angles, and 1 if the record is wide.
        cutoffs: atom cut-off used for each crystal, Å, float64 [N]; larger than the requested cut-off if an atom would
            otherwise have no bond.
    """

    records: NDArray[np.uint8]
    index: NDArray[np.int64]
    cutoffs: NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class Graph:
    """The graph of one crystal with CHGNet's numbering (D directed and U = D/2 undirected bonds, T angles).

    Attributes:
        atom_graph: centre and neighbour of each directed bond, int64 [D, 2].
        image: periodic image of the neighbour, int64 [D, 3].
        directed2undirected: undirected bond of each directed bond, int64 [D].
        undirected2directed: first directed bond of each undirected bond, int64 [U].
        bond_graph: one row per angle, in the order of batches, int64 [T, 5]: the centre, the first bond as undirected
            and directed bond, the second bond as undirected and directed bond.
        cutoff: atom cut-off used, Å.
    """

    atom_graph: NDArray[np.int64]
    image: NDArray[np.int64]
    directed2undirected: NDArray[np.int64]
    undirected2directed: NDArray[np.int64]
    bond_graph: NDArray[np.int64]
    cutoff: float


def cartesian(
    frac_coords: NDArray[np.float64], lattices: NDArray[np.float64], n_atoms: NDArray[np.int64]
) -> NDArray[np.float64]:
    """Cartesian coordinates, Å, float64 [A, 3], bit-for-bit identical to pymatgen's ``site.coords`` on this machine.

    pymatgen computes ``np.dot(frac, matrix)`` for each site. Multiplying a stack of 1×3 matrices by a stack of 3×3
    matrices calls the same BLAS routine as ``np.dot``, so both round in the same way.
    """
    product: NDArray[np.float64] = np.matmul(frac_coords[:, None, :], np.repeat(lattices, n_atoms, axis=0))
    return product[:, 0, :]


def convert(
    crystals: Crystals,
    first: int = 0,
    stop: int | None = None,
    *,
    atom_cutoff: float = ATOM_CUTOFF,
    bond_cutoff: float = BOND_CUTOFF,
) -> PackedGraphs:
    """Make the graphs of the crystals from ``first`` up to, but not including, ``stop``, without the GIL.

    If an atom has no neighbour within the cut-off, its crystal's cut-off is raised to the smallest multiple of 0.5 Å
    that gives every atom a bond. CHGNet's radial basis is zero beyond 6 Å, so the added bonds carry no messages.
    """
    stop = len(crystals) if stop is None else stop
    atoms = slice(crystals.atom_offsets[first], crystals.atom_offsets[stop])
    offsets = np.ascontiguousarray(crystals.atom_offsets[first : stop + 1]) - crystals.atom_offsets[first]
    lattices = np.array(crystals.lattices[first:stop])
    cart = np.ascontiguousarray(cartesian(np.array(crystals.frac_coords[atoms]), lattices, np.diff(offsets)))
    records, index, cutoffs = pack_rows(offsets, cart, lattices, float(atom_cutoff), float(bond_cutoff))
    return PackedGraphs(records=records, index=index, cutoffs=cutoffs)


def graph(packed: PackedGraphs, row: int, n_atoms: int) -> Graph:
    """Unpack one graph, in the format of CHGNet's ``CrystalGraph``."""
    start, n_directed, n_short, _, n_angles, wide = packed.index[row].tolist()
    per_atom, ends = np.empty(n_atoms, np.uint32), np.empty((2, n_directed // 2 + 1), np.uint32)
    images, positions = np.empty(3 * (n_directed // 2), np.uint32), np.empty((2, n_short), np.uint32)
    shape = np.array([n_atoms, n_directed, n_short, wide])
    assert unpack(packed.records[start:], shape, per_atom, ends, images, positions), "the record is invalid"
    (first, second), (short, roles) = ends[:, :-1].astype(np.int64), positions.astype(np.int64)
    center = np.repeat(np.arange(n_atoms), per_atom)
    undirected, reverse, sign = np.empty((3, n_directed), np.int64)
    undirected[first] = undirected[second] = np.arange(len(first))
    reverse[first], reverse[second] = second, first
    sign[first], sign[second] = 1, -1
    image = images.astype(np.int32 if wide else np.int8).reshape(-1, 3)[undirected] * sign[:, None]
    angles = []
    for i in short[np.lexsort((short, undirected[short]))]:
        if roles[np.searchsorted(short, i)] & AS_I:
            for position in np.flatnonzero(center[short] == center[i]):
                j = short[position]
                if j != i and roles[position] & AS_J:
                    angles.append((center[i], undirected[i], i, undirected[j], j))
    assert len(angles) == n_angles, "the number of angles differs from that in the record"
    return Graph(
        atom_graph=np.stack([center, center[reverse]], axis=1),
        image=image,
        directed2undirected=undirected,
        undirected2directed=first,
        bond_graph=np.array(angles, np.int64).reshape(-1, 5),
        cutoff=float(packed.cutoffs[row]),
    )
