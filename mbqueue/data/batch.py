"""What a model is given: many crystal graphs, concatenated once into flat tensors."""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Batch:
    """B crystals as one disconnected graph: A atoms, D directed and U = D/2 undirected bonds, S short bonds, T angles.

    All indices count within the batch; those of bonds and angles are int32, which takes half as long as torch's own
    int64 to write and to send to a GPU. A bond is an edge of CHGNet's atom graph (up to the atom cut-off, 6 Å); a short
    bond is an undirected bond that takes part in the bond graph (at most the bond cut-off, 3 Å, and part of at least
    one angle). An angle is an ordered pair (i, j) of distinct directed short bonds that share their centre atom.

    Attributes:
        rows: row of each crystal in its dataset, int64 [B].
        targets: formation energy, eV/atom, float32 [B].
        n_atoms: atoms per crystal, int64 [B].
        atomic_numbers: Z of each atom, 1–94, int64 [A].
        atom_crystal: crystal of each atom, ascending, int64 [A].
        bond_center: centre atom of each directed bond, ascending, int32 [D].
        bond_neighbor: neighbour atom of each directed bond, int32 [D].
        bond_undirected: undirected bond of each directed bond, int32 [D].
        bond_reverse: the directed bond that runs the other way, int32 [D]; its own inverse.
        bond_length: length of each undirected bond, Å, float32 [U].
        short_bond: undirected bond of each short bond, ascending, int32 [S].
        angle_center: centre atom of each angle, int32 [T].
        angle_bond_i: first bond of each angle, index into ``short_bond``, ascending, int32 [T].
        angle_bond_j: second bond of each angle, index into ``short_bond``, int32 [T].
        angle_by_j: the order of angles that sorts them by ``angle_bond_j`` (stable), int32 [T]. There is no reverse
            of every angle: CHGNet takes a bond of exactly the cut-off as i but not as j.
        angle: value of each angle, radian, float32 [T]: acos((1 - 1e-6) · cos), as CHGNet takes it.
    """

    rows: Tensor
    targets: Tensor
    n_atoms: Tensor
    atomic_numbers: Tensor
    atom_crystal: Tensor
    bond_center: Tensor
    bond_neighbor: Tensor
    bond_undirected: Tensor
    bond_reverse: Tensor
    bond_length: Tensor
    short_bond: Tensor
    angle_center: Tensor
    angle_bond_i: Tensor
    angle_bond_j: Tensor
    angle_by_j: Tensor
    angle: Tensor

    def __len__(self) -> int:
        """Number of crystals."""
        return len(self.rows)

    def to(self, device: torch.device, *, non_blocking: bool = False) -> Batch:
        """The same batch on ``device``; asynchronous only from pinned memory and with ``non_blocking``.

        It travels as it is, and on a GPU its indices become int64: not all of torch's kernels take less.
        """
        tensors = {f.name: getattr(self, f.name).to(device, non_blocking=non_blocking) for f in fields(self)}
        if device.type != "cpu":
            tensors = {name: t.long() if t.dtype == torch.int32 else t for name, t in tensors.items()}
        return Batch(**tensors)

    def pin(self) -> Batch:
        """The same batch in page-locked memory, from which a copy to a GPU need not wait."""
        return Batch(**{f.name: getattr(self, f.name).pin_memory() for f in fields(self)})
