"""What the cache holds of the same crystals for other datasets: more of them, or with other ids or targets.

The last digits of what the backbone gives depend on what goes through it together, so a shard is taken from another
dataset only where that has a shard of the same crystals in the same order. Its bytes are those that computing would
give. Crystals are known by their content: elements, coordinates and cell, bit for bit. Only this machine's cache is
searched.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from functools import cached_property

import numpy as np

from mbqueue.data.crystals import Crystals
from mbqueue.data.graph_cache import CRYSTALS_FILE
from mbqueue.errors import CacheError
from mbqueue.train.frozen import FROZEN_PREFIX, FrozenBackbone, frozen_folder


def contents(crystals: Crystals, frozen: FrozenBackbone) -> list[bytes]:
    """A digest of the crystals of each shard, without ids and targets."""
    offsets = crystals.atom_offsets
    digests = []
    for shard in range(frozen.n_shards):
        rows = frozen.rows_of(shard)
        first, end = int(rows[0]), int(rows[-1]) + 1
        atoms = slice(int(offsets[first]), int(offsets[end]))
        digest = hashlib.sha256(np.diff(offsets[first : end + 1]).tobytes())
        for part in (crystals.lattices[first:end], crystals.atomic_numbers[atoms], crystals.frac_coords[atoms]):
            digest.update(np.ascontiguousarray(part).data)
        digests.append(digest.digest())
    return digests


class Elsewhere:
    """Finds shards of one dataset in what is stored for others.

    Args:
        frozen: of the dataset, complete or not.
        crystals: the dataset.
    """

    def __init__(self, frozen: FrozenBackbone, crystals: Crystals) -> None:
        self._frozen = frozen
        self._crystals = crystals

    def find(self, shard: int, kinds: Sequence[str]) -> tuple[FrozenBackbone, int] | None:
        """Where all ``kinds`` of a shard are stored, byte for byte, and the shard there; None when they are not."""
        for source, there in self._places.get(shard, ()):
            if all(source.is_whole(kind, there, verify=True) for kind in kinds):
                return source, there
        return None

    @cached_property
    def _places(self) -> dict[int, list[tuple[FrozenBackbone, int]]]:
        """For each shard that another dataset has, where."""
        others = self._others()
        if not others:
            return {}
        wanted = {content: shard for shard, content in enumerate(contents(self._crystals, self._frozen))}
        places: dict[int, list[tuple[FrozenBackbone, int]]] = {}
        for source, crystals in others:
            for there, content in enumerate(contents(crystals, source)):
                if content in wanted:
                    places.setdefault(wanted[content], []).append((source, there))
        return places

    def _others(self) -> list[tuple[FrozenBackbone, Crystals]]:
        own, cache_dir = self._frozen.folder, self._frozen.folder.parent
        folders = set(cache_dir.glob(f"{FROZEN_PREFIX}*-{own.name.rsplit('-', 1)[1]}")) - {own}
        found = []
        for file in sorted(cache_dir.glob(f"*/{CRYSTALS_FILE}")):
            if not folders:
                break
            try:
                crystals, _ = Crystals.open(file)
            except CacheError:
                continue  # damaged, or just being removed: then it is computed
            for key in (crystals.hash, crystals.structures_hash):  # of energies, and of all other targets
                folder = frozen_folder(cache_dir, key, self._frozen.weights)
                if folder in folders:
                    folders.remove(folder)
                    source = FrozenBackbone(
                        folder, atom_offsets=crystals.atom_offsets, dataset_hash=key, weights=self._frozen.weights
                    )
                    found.append((source, crystals))
        return found
