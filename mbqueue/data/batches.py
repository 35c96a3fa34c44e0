"""Make batches from the graph cache: concatenated graphs with lengths and angles, ready for the device."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from mbqueue.data.assembly import assemble, atoms_of
from mbqueue.data.batch import Batch
from mbqueue.data.distortion import distort
from mbqueue.data.graph_cache import GraphCache
from mbqueue.errors import CacheError


@dataclass(frozen=True, kw_only=True)
class Distortion:
    """Settings for a random strain of each cell and a random shift of each atom.

    The distortion of a crystal depends only on ``seed`` and on the crystal's row in the dataset, not on its batch.

    Attributes:
        strain: standard deviation of the six components of a symmetric strain; 0 disables the strain.
        jitter: standard deviation of each Cartesian component of an atom's shift, Å; 0 disables the shifts.
        seed: any 64-bit integer; use a different one for each epoch.
    """

    strain: float = 0.0
    jitter: float = 0.0
    seed: int = 0


def make_batch(
    cache: GraphCache, rows: NDArray[np.int64] | Sequence[int], distortion: Distortion | None = None
) -> Batch:
    """Combine the crystals of ``rows`` into one graph, on the CPU.

    The bonds always come from the undistorted crystal. With ``distortion``, lengths and angles describe the distorted
    crystal, so a bond may be longer than the cut-off. CHGNet's radial basis is zero beyond the cut-off.
    """
    rows = np.asarray(rows, np.int64)
    crystals = cache.crystals
    records, starts = cache.records(rows)
    index, lattices = cache.index[rows], crystals.lattices[rows]
    begins = crystals.atom_offsets[rows]
    n_atoms = crystals.atom_offsets[rows + 1] - begins
    numbers, atom_crystal, cart = atoms_of(
        begins, n_atoms, _read_only(crystals.atomic_numbers), _read_only(crystals.frac_coords), lattices
    )
    if distortion is not None:
        cart, lattices = distort(cart, lattices, n_atoms, rows, distortion.strain, distortion.jitter, distortion.seed)
    bonds, length, short, angles, angle, unsound = assemble(
        records, starts, index[:, [1, 3, 4]].sum(axis=0), n_atoms, index, cart, lattices
    )
    if unsound >= 0:
        raise CacheError(
            f"The stored graph of {crystals.ids[rows[unsound]]} in {cache.folder} is invalid. Remove that folder."
        )
    return Batch(
        rows=torch.from_numpy(rows.copy()),
        targets=torch.from_numpy(crystals.targets[rows].astype(np.float32)),
        n_atoms=torch.from_numpy(n_atoms),
        atomic_numbers=torch.from_numpy(numbers),
        atom_crystal=torch.from_numpy(atom_crystal),
        bond_center=torch.from_numpy(bonds[0]),
        bond_neighbor=torch.from_numpy(bonds[1]),
        bond_undirected=torch.from_numpy(bonds[2]),
        bond_reverse=torch.from_numpy(bonds[3]),
        bond_length=torch.from_numpy(length),
        short_bond=torch.from_numpy(short),
        angle_center=torch.from_numpy(angles[0]),
        angle_bond_i=torch.from_numpy(angles[1]),
        angle_bond_j=torch.from_numpy(angles[2]),
        angle_by_j=torch.from_numpy(angles[3]),
        angle=torch.from_numpy(angle),
    )


def _read_only(array: NDArray[Any]) -> NDArray[Any]:
    """A read-only view: memory-mapped arrays are read-only, and Numba would recompile for writable ones."""
    view = array.view()
    view.flags.writeable = False
    return view
