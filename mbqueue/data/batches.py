"""From the cache to batches: concatenated, with lengths and angles, ready for the device."""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from mbqueue.data.assembly import assemble
from mbqueue.data.batch import Batch
from mbqueue.data.cache import GraphCache
from mbqueue.data.distortion import distort
from mbqueue.data.graphs import cartesian
from mbqueue.errors import CacheError


@dataclass(frozen=True, kw_only=True)
class Distortion:
    """A random strain of each cell and a random shift of each atom: a pure function of ``seed`` and the row.

    How crystals are put into batches, and in which order, makes no difference to what each of them gets.

    Attributes:
        strain: standard deviation of the six components of a symmetric strain; 0 is off.
        jitter: standard deviation of each Cartesian component of an atom's shift, Å; 0 is off.
        seed: any int of 64 bits; another one for each epoch.
    """

    strain: float = 0.0
    jitter: float = 0.0
    seed: int = 0


def make_batch(
    cache: GraphCache, rows: NDArray[np.int64] | Sequence[int], distortion: Distortion | None = None
) -> Batch:
    """The crystals of ``rows`` as one graph, on the CPU.

    Bonds stay those of the crystal as it is; with ``distortion`` their lengths and angles are those of the distorted
    one, so a bond may be longer than the cut-off (CHGNet's radial basis is then zero).
    """
    rows = np.asarray(rows, np.int64)
    crystals = cache.crystals
    parts = [cache.record(row) for row in rows.tolist()]
    starts = np.zeros(len(rows) + 1, np.int64)
    np.cumsum([len(part) for part in parts], out=starts[1:])
    index = cache.index[rows]
    begins = crystals.atom_offsets[rows]
    sizes = crystals.atom_offsets[rows + 1] - begins
    offsets = np.cumsum(sizes) - sizes
    atoms = np.arange(sizes.sum()) + np.repeat(begins - offsets, sizes)
    lattices = crystals.lattices[rows]
    cart = np.ascontiguousarray(cartesian(crystals.frac_coords[atoms], lattices, sizes))
    if distortion is not None:
        cart, lattices = distort(cart, lattices, sizes, rows, distortion.strain, distortion.jitter, distortion.seed)
    *arrays, unsound = assemble(
        np.concatenate(parts), starts, index[:, [1, 3, 4]].sum(axis=0), sizes, index, cart, lattices
    )
    if unsound >= 0:
        raise CacheError(
            f"The stored graph of {crystals.ids[rows[unsound]]} in {cache.folder} makes no sense. Remove that folder."
        )
    names = (
        "atom_crystal bond_center bond_neighbor bond_undirected bond_reverse bond_length short_bond angle_center "
        "angle_bond_i angle_bond_j angle_by_j angle"
    ).split()
    return Batch(
        rows=torch.from_numpy(rows.copy()),
        targets=torch.from_numpy(crystals.targets[rows].astype(np.float32)),
        n_atoms=torch.from_numpy(sizes),
        atomic_numbers=torch.from_numpy(crystals.atomic_numbers[atoms].astype(np.int64)),
        **{name: torch.from_numpy(array) for name, array in zip(names, arrays, strict=True)},
    )


def prefetch(
    cache: GraphCache,
    batches: Iterable[NDArray[np.int64]],
    *,
    device: torch.device | str = "cpu",
    distortion: Distortion | None = None,
    ahead: int = 4,
) -> Iterator[Batch]:
    """Batches on ``device``, in the order given, made ``ahead`` of their use in a background thread.

    For a GPU they are made in page-locked memory and copied without waiting. An error in the thread is raised here,
    in the place of the batch that it befell. Closing the iterator ends the thread.
    """
    device = torch.device(device)
    ready: queue.Queue[Batch | BaseException | None] = queue.Queue(ahead)
    closed = threading.Event()

    def put(item: Batch | BaseException | None) -> bool:
        while not closed.is_set():
            try:
                ready.put(item, timeout=0.1)
            except queue.Full:
                continue
            return True
        return False

    def work() -> None:
        try:
            for rows in batches:
                batch = make_batch(cache, rows, distortion)
                if not put(batch.pin() if device.type == "cuda" else batch):
                    return
            put(None)
        except BaseException as error:
            put(error)

    thread = threading.Thread(target=work, name="mbqueue-prefetch", daemon=True)
    thread.start()
    try:
        while (item := ready.get()) is not None:
            if isinstance(item, BaseException):
                raise item
            yield item.to(device, non_blocking=True) if device.type != "cpu" else item
    finally:
        closed.set()
        thread.join()


def split_by_bonds(rows: NDArray[np.int64], bond_counts: NDArray[np.int64], max_bonds: int) -> list[NDArray[np.int64]]:
    """``rows`` cut into consecutive parts of at most ``max_bonds`` directed bonds; 0 has no cap.

    A crystal that alone has more makes a part of its own.
    """
    if max_bonds <= 0 or len(rows) == 0:
        return [rows]
    parts, begin, total = [], 0, 0
    for place, count in enumerate(bond_counts[rows].tolist()):
        if place > begin and total + count > max_bonds:
            parts.append(rows[begin:place])
            begin, total = place, 0
        total += count
    parts.append(rows[begin:])
    return parts
