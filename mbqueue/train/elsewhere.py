"""What the cache holds of the same crystals for other datasets: a subset, another order, another target.

A crystal is known by its content: elements, coordinates and cell, bit for bit and in their order. What is stored for it
under the same weights is as good as computing it again, so it is copied. Only this machine's cache is searched.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from functools import cached_property
from itertools import pairwise
from pathlib import Path

import numpy as np

from mbqueue.data.crystals import Crystals
from mbqueue.data.graph_cache import CRYSTALS_FILE
from mbqueue.errors import CacheError
from mbqueue.train.frozen import FROZEN_PREFIX, FrozenBackbone, frozen_folder


def contents(crystals: Crystals) -> list[bytes]:
    """A digest of each crystal without its id and target, 16 bytes each, [N]."""
    offsets = crystals.atom_offsets.tolist()
    numbers, coordinates = np.ascontiguousarray(crystals.atomic_numbers), np.ascontiguousarray(crystals.frac_coords)
    lattices = np.ascontiguousarray(crystals.lattices)
    digests = []
    for row, (begin, end) in enumerate(pairwise(offsets)):
        # The number of atoms follows from the length of the whole: 1 + 24 bytes for each, and 72 for the cell.
        digest = hashlib.blake2b(lattices[row].data, digest_size=16)
        digest.update(numbers[begin:end].data)
        digest.update(coordinates[begin:end].data)
        digests.append(digest.digest())
    return digests


class Elsewhere:
    """Finds rows of one dataset in what is stored for others.

    Args:
        frozen: of the dataset, complete or not.
        crystals: the dataset.
    """

    def __init__(self, frozen: FrozenBackbone, crystals: Crystals) -> None:
        self._frozen = frozen
        self._crystals = crystals
        self._whole: dict[tuple[int, str, int], bool] = {}

    def find(self, row: int, kinds: Sequence[str]) -> tuple[FrozenBackbone, int] | None:
        """Where all ``kinds`` of a row are stored, byte for byte, and its row there; None when they are not."""
        for number, there in self._places.get(row, ()):
            source = self._sources[number]
            if all(self._is_whole(number, kind, source.shard_of(there)) for kind in kinds):
                return source, there
        return None

    def _is_whole(self, number: int, kind: str, shard: int) -> bool:
        key = number, kind, shard
        if key not in self._whole:
            self._whole[key] = self._sources[number].is_whole(kind, shard, verify=True)
        return self._whole[key]

    @cached_property
    def _sources(self) -> list[FrozenBackbone]:
        return [source for source, _ in self._others]

    @cached_property
    def _places(self) -> dict[int, list[tuple[int, int]]]:
        """For each row that another dataset has, (number of the source, row there)."""
        wanted: dict[bytes, list[int]] = {}
        if self._others:
            for row, content in enumerate(contents(self._crystals)):
                wanted.setdefault(content, []).append(row)
        places: dict[int, list[tuple[int, int]]] = {}
        for number, (_, crystals) in enumerate(self._others):
            for there, content in enumerate(contents(crystals)):
                for row in wanted.get(content, ()):
                    places.setdefault(row, []).append((number, there))
        return places

    @cached_property
    def _others(self) -> list[tuple[FrozenBackbone, Crystals]]:
        found = []
        own, cache_dir = self._frozen.folder, self._frozen.folder.parent
        for folder in sorted(cache_dir.glob(f"{FROZEN_PREFIX}*-{own.name.rsplit('-', 1)[1]}")):
            if folder == own:
                continue
            dataset = folder.name.removeprefix(FROZEN_PREFIX).rsplit("-", 1)[0]
            for file in sorted(cache_dir.glob(f"{dataset}-*/{CRYSTALS_FILE}")):
                source = self._opened(file, cache_dir)
                if source is not None and source[0].folder == folder:
                    found.append(source)
                    break
        return found

    def _opened(self, file: Path, cache_dir: Path) -> tuple[FrozenBackbone, Crystals] | None:
        try:
            crystals, _ = Crystals.open(file)
        except CacheError:
            return None  # damaged, or just being removed: then it is computed
        weights = self._frozen.weights
        source = FrozenBackbone(
            frozen_folder(cache_dir, crystals.hash, weights),
            atom_offsets=crystals.atom_offsets,
            dataset_hash=crystals.hash,
            weights=weights,
        )
        return source, crystals
