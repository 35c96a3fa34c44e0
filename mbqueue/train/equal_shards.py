"""Find a dataset's shards in the caches of other datasets, which may be larger or have different ids or targets.

The last digits of the backbone's outputs depend on which crystals are in a batch. mbqueue therefore copies a shard only
if another dataset has a shard with the same crystals in the same order. The copy is identical to the shard that the
backbone would compute. Two crystals are the same if their elements, coordinates and cells agree bit for bit. mbqueue
looks for shards only in this machine's cache.
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
    """Return a digest of each shard's crystals; ids and targets do not affect the digest."""
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


class EqualShards:
    """Looks for one dataset's shards among those stored for other datasets.

    Args:
        frozen: the dataset's own store, which may be incomplete.
    """

    def __init__(self, frozen: FrozenBackbone, crystals: Crystals) -> None:
        self._frozen = frozen
        self._crystals = crystals

    def find(self, shard: int, kinds: Sequence[str]) -> tuple[FrozenBackbone, int] | None:
        """Return a store that has intact copies of all ``kinds`` of a shard, and the shard's number there, or None."""
        for source, there in self._places.get(shard, ()):
            if all(source.is_whole(kind, there, verify=True) for kind in kinds):
                return source, there
        return None

    @cached_property
    def _places(self) -> dict[int, list[tuple[FrozenBackbone, int]]]:
        """Map each shard to the other stores that contain it, each with the shard's number in that store."""
        others = self._others()
        if not others:
            return {}
        wanted = {content: shard for shard, content in enumerate(contents(self._crystals, self._frozen))}
        sources: dict[int, list[tuple[FrozenBackbone, int]]] = {}
        for source, crystals in others:
            for there, content in enumerate(contents(crystals, source)):
                if content in wanted:
                    sources.setdefault(wanted[content], []).append((source, there))
        return sources

    def _others(self) -> list[tuple[FrozenBackbone, Crystals]]:
        own, cache_dir = self._frozen.folder, self._frozen.folder.parent
        folders = set(cache_dir.glob(f"{FROZEN_PREFIX}*-{own.name.rsplit('-', 1)[1]}")) - {own}
        found = []
        for file in sorted(cache_dir.glob(f"*/{CRYSTALS_FILE}")):
            if not folders:
                break
            try:
                crystals, _ = Crystals.open(file)
            except CacheError:  # the file is damaged, or another process is removing it
                continue
            # `hash` names the folder for energy targets, and `structures_hash` the folder for all other targets.
            for key in (crystals.hash, crystals.structures_hash):
                folder = frozen_folder(cache_dir, key, self._frozen.weights)
                if folder in folders:
                    folders.remove(folder)
                    source = FrozenBackbone(
                        folder, atom_offsets=crystals.atom_offsets, dataset_hash=key, weights=self._frozen.weights
                    )
                    found.append((source, crystals))
        return found
