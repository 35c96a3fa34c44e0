"""The input of a model: many crystal graphs, concatenated into flat tensors."""

from __future__ import annotations

from dataclasses import dataclass, fields
from itertools import accumulate

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mbqueue.data.elements import MAX_ATOMIC_NUMBER
from mbqueue.data.orders import first_places, offsets_of, sorted_by

#: The alignment, in bytes, of the tensors in one buffer. An alignment of 64 bytes is sufficient for any kernel.
_ALIGNMENT = 64


@dataclass(frozen=True, kw_only=True)
class Batch:
    """One graph of B crystals with A atoms, D directed and U = D/2 undirected bonds, S short bonds, and T angles.

    All indices are positions within the batch. Indices of bonds and angles are int32, because writing int64 and sending
    it to a GPU would take twice as long.

    A bond is an edge of CHGNet's atom graph (up to the atom cut-off, 6 Å). A short bond is an undirected bond that is
    in the bond graph: it is not longer than the bond cut-off, 3 Å, and is part of at least one angle. An angle is an
    ordered pair (i, j) of distinct directed short bonds that share their centre atom.

    Attributes:
        rows: row of each crystal in its dataset, int64 [B].
        targets: target of each crystal, in its unit, float32 [B].
        n_atoms: atoms per crystal, int64 [B].
        atomic_numbers: Z of each atom, 1–94, int64 [A].
        atom_crystal: crystal of each atom, ascending, int64 [A].
        bond_center: centre atom of each directed bond, ascending, int32 [D].
        bond_neighbor: neighbour atom of each directed bond, int32 [D].
        bond_undirected: undirected bond of each directed bond, int32 [D].
        bond_reverse: directed bond in the opposite direction of each directed bond, int32 [D].
        bond_length: length of each undirected bond, Å, float32 [U].
        short_bond: undirected bond of each short bond, ascending, int32 [S].
        angle_center: centre atom of each angle, int32 [T].
        angle_bond_i: first bond of each angle, index into ``short_bond``, ascending, int32 [T].
        angle_bond_j: second bond of each angle, index into ``short_bond``, int32 [T].
        angle_by_j: indices of the angles, stably sorted by ``angle_bond_j``, int32 [T]. Not every angle has a reverse,
            because CHGNet accepts a bond of exactly the cut-off length as bond i, but not as bond j.
        angle: value of each angle, radian, float32 [T]: acos((1 - 1e-6) · cos), as in CHGNet.
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
        return len(self.rows)

    def to(self, device: torch.device, *, non_blocking: bool = False) -> Batch:
        """Copy the batch to ``device``, asynchronously if it is in pinned memory and ``non_blocking`` is set.

        For a GPU, the batch is first converted to an `OrderedBatch`, so that the GPU does not have to sort.
        """
        batch = self if device.type == "cpu" else self.ordered()
        tensors = {field.name: getattr(batch, field.name) for field in fields(batch)}
        if len({tensor.untyped_storage().data_ptr() for tensor in tensors.values()}) == 1:
            whole = torch.empty(0, dtype=torch.uint8).set_(batch.rows.untyped_storage())
            there = whole.to(device, non_blocking=non_blocking)
            return type(batch)(**{name: _view(there, _start(tensor), tensor) for name, tensor in tensors.items()})
        return type(batch)(**{name: tensor.to(device, non_blocking=non_blocking) for name, tensor in tensors.items()})

    def pin(self) -> Batch:
        """An `OrderedBatch` in page-locked memory, which can be copied to a GPU asynchronously."""
        return self.packed(pinned=True)

    def packed(self, *, pinned: bool) -> Batch:
        """An `OrderedBatch` in one block of memory, so that a single copy sends the batch to a GPU."""
        batch = self.ordered()
        tensors = {field.name: getattr(batch, field.name) for field in fields(batch)}
        sizes = [-(-tensor.numel() * tensor.element_size() // _ALIGNMENT) * _ALIGNMENT for tensor in tensors.values()]
        whole = torch.empty(sum(sizes), dtype=torch.uint8, pin_memory=pinned)
        starts = accumulate(sizes, initial=0)
        views = {name: _view(whole, start, t) for (name, t), start in zip(tensors.items(), starts, strict=False)}
        for name, view in views.items():
            view.copy_(tensors[name])
        return type(batch)(**views)

    def ordered(self) -> OrderedBatch:
        """Convert the batch, which must be on the CPU, to an `OrderedBatch`."""
        return OrderedBatch(
            **{f.name: getattr(self, f.name) for f in fields(self)},
            **{name: torch.from_numpy(array) for name, array in _orders(self).items()},
        )


@dataclass(frozen=True, kw_only=True)
class OrderedBatch(Batch):
    """A batch that also stores sorted indices and segment offsets, all int32; sums then need no sorting.

    Segment i of sorted elements starts at offset i and ends before offset i + 1. All sorting is stable.

    Attributes:
        bond_offsets: segments of the directed bonds of each centre atom, [A + 1].
        bond_first: the first directed bond of each undirected bond, [U]; the second one is its reverse.
        short_offsets: segments of the short bonds of each undirected bond, one or none, [U + 1].
        angle_offsets: segments of the angles of each first bond, [S + 1].
        by_j_offsets: segments of ``angle_by_j`` for each second bond, [S + 1].
        angle_by_center: indices of the angles, sorted by centre atom, [T].
        by_center_offsets: segments of ``angle_by_center`` for each centre atom, [A + 1].
        atom_by_number: indices of the atoms, sorted by atomic number, [A].
        by_number_offsets: segments of ``atom_by_number`` for each atomic number from 1, [95].
    """

    bond_offsets: Tensor
    bond_first: Tensor
    short_offsets: Tensor
    angle_offsets: Tensor
    by_j_offsets: Tensor
    angle_by_center: Tensor
    by_center_offsets: Tensor
    atom_by_number: Tensor
    by_number_offsets: Tensor

    def ordered(self) -> OrderedBatch:
        return self


def _start(tensor: Tensor) -> int:
    """The offset of a tensor in its storage, in bytes."""
    return int(tensor.storage_offset()) * tensor.element_size()


def _view(whole: Tensor, start: int, like: Tensor) -> Tensor:
    """View the bytes of ``whole`` from ``start`` as a tensor with the shape and dtype of ``like``."""
    return whole[start : start + like.numel() * like.element_size()].view(like.dtype).view(like.shape)


def _orders(batch: Batch) -> dict[str, NDArray[np.int32]]:
    n_atoms, n_shorts, n_bonds = len(batch.atomic_numbers), len(batch.short_bond), len(batch.bond_length)
    centers, numbers = batch.angle_center.numpy(), batch.atomic_numbers.numpy() - 1
    by_center_offsets, by_number_offsets = offsets_of(centers, n_atoms), offsets_of(numbers, MAX_ATOMIC_NUMBER)
    return {
        "bond_offsets": offsets_of(batch.bond_center.numpy(), n_atoms),
        "bond_first": first_places(batch.bond_undirected.numpy(), n_bonds),
        "short_offsets": offsets_of(batch.short_bond.numpy(), n_bonds),
        "angle_offsets": offsets_of(batch.angle_bond_i.numpy(), n_shorts),
        "by_j_offsets": offsets_of(batch.angle_bond_j.numpy(), n_shorts),
        "angle_by_center": sorted_by(centers, by_center_offsets),
        "by_center_offsets": by_center_offsets,
        "atom_by_number": sorted_by(numbers, by_number_offsets),
        "by_number_offsets": by_number_offsets,
    }
