"""Build packed graphs on disk, in parallel and shard by shard, and memory-map them.

Each shard (``shard-00000.bin`` and so on) is an array file with the graphs of consecutive crystals. A shard records the
hash of its structures, its cut-offs and its converter version, so that mbqueue detects outdated shards. A shard gets
its final name only when it is complete. If a process dies while building a cache, the next process makes the missing
shards. Several processes can share the work, because each shard has a lock file in ``locks/``.

Opening a cache checks every shard's length, key and index. A process checks a record's CRC-32 when it first reads the
record. Only shards that fail a check are rebuilt.
"""

from __future__ import annotations

import os
import zlib
from bisect import bisect_right
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from threading import Lock
from typing import Any

import numpy as np
from filelock import FileLock, Timeout
from numpy.typing import NDArray

from mbqueue.data.arrayfile import read_arrays, write_arrays
from mbqueue.data.crystals import Crystals
from mbqueue.data.graphs import ATOM_CUTOFF, BOND_CUTOFF, CONVERTER_VERSION, convert
from mbqueue.data.source import Progress
from mbqueue.errors import CacheError
from mbqueue.files import TEMP_PREFIX, make_folder

#: The file that contains the crystals, in the same folder as their graphs.
CRYSTALS_FILE = "crystals.bin"

SHARD_CRYSTALS = 2048
SHARD_ATOMS = 65_536


def folder_name(crystals: Crystals) -> str:
    """Name of the folder for the graphs of ``crystals``, inside the project's cache folder."""
    return f"{crystals.hash[:16]}-{CONVERTER_VERSION}"


def shard_borders(atom_offsets: NDArray[np.int64]) -> list[int]:
    """The first row of each shard, followed by the number of rows.

    A shard has at most 2,048 crystals and 65,536 atoms, or a single larger crystal.
    """
    n_rows = len(atom_offsets) - 1
    borders = [0]
    while borders[-1] < n_rows:
        first = borders[-1]
        full = int(np.searchsorted(atom_offsets, atom_offsets[first] + SHARD_ATOMS, side="right")) - 1
        borders.append(min(n_rows, first + SHARD_CRYSTALS, max(full, first + 1)))
    return borders


def count_shards(crystals: Crystals, folder: Path) -> tuple[int, int]:
    """The number of shards in ``folder``, according to file names, and the number that ``crystals`` need."""
    n_shards = len(shard_borders(crystals.atom_offsets)) - 1
    return sum(_shard_path(folder, number).is_file() for number in range(n_shards)), n_shards


def _shard_path(folder: Path, number: int) -> Path:
    return folder / f"shard-{number:05d}.bin"


@dataclass(frozen=True)
class _Shard:
    records: NDArray[np.uint8]
    index: NDArray[np.int64]
    cutoffs: NDArray[np.float64]
    checksums: NDArray[np.uint32]

    @property
    def stops(self) -> NDArray[np.int64]:
        return np.append(self.index[1:, 0], len(self.records))


class GraphCache:
    """The graphs of one set of crystals, open for reading.

    Attributes:
        index: int64 [N, 6], as in ``PackedGraphs``, with starts relative to a shard.
        cutoffs: atom cut-off used for each crystal, Å, float64 [N].
    """

    def __init__(self, crystals: Crystals, folder: Path) -> None:
        """Do not call this constructor; call ``GraphCache.open`` or ``GraphCache.build``."""
        self.crystals = crystals
        self.folder = folder
        self._borders = shard_borders(crystals.atom_offsets)
        self._firsts = np.array(self._borders[:-1], np.int64)
        self._shards: list[_Shard] = []
        self._checked = np.zeros(len(crystals), bool)
        self._mending = Lock()
        self.index = np.empty((0, 6), np.int64)
        self.cutoffs = np.empty(0)
        self._stops = np.empty(0, np.int64)

    @classmethod
    def open(cls, crystals: Crystals, folder: Path) -> GraphCache:
        """Open an existing, complete cache.

        Raises:
            CacheError: if a shard is missing or truncated, has a damaged index, or was built for different crystals or
                cut-offs or by a different version of the converter. ``build`` replaces an unusable shard.
        """
        cache = cls(crystals, folder)
        cache._take([cache._read(number) for number in range(len(cache._borders) - 1)])
        return cache

    @classmethod
    def build(
        cls,
        crystals: Crystals,
        folder: Path,
        *,
        workers: int | None = None,
        progress: Progress | None = None,
        should_stop: Callable[[], bool] | None = None,
    ) -> GraphCache | None:
        """Build all missing or unusable shards on all cores, then open the cache.

        Args:
            folder: created if it does not exist.
            workers: threads; by default the cores that this process may use.
            progress: called with (crystals done, total) at the start and after each missing shard; not called if no
                shard is missing.
            should_stop: called before each missing shard; True stops the build, which a later call resumes.

        Returns:
            The open cache, or None if ``should_stop`` stopped the build.
        """
        cache = cls(crystals, folder)
        make_folder(folder / "locks")
        counting = Lock()
        done = 0

        def find(number: int) -> _Shard | None:
            try:
                return cache._read(number)
            except CacheError:
                return None

        def finish(number: int, *, wait: bool) -> _Shard | None:
            nonlocal done
            if should_stop is not None and should_stop():
                return None
            try:
                shard = cache._read_or_make(number, wait=wait)
            except Timeout:
                return None
            with counting:
                done += len(shard.index)
                if progress is not None:
                    progress(done, len(crystals))
            return shard

        numbers = range(len(cache._borders) - 1)
        with ThreadPoolExecutor(workers or len(os.sched_getaffinity(0))) as pool:
            shards = list(pool.map(find, numbers))
            done = sum(len(shard.index) for shard in shards if shard is not None)
            if progress is not None and done < len(crystals):
                progress(done, len(crystals))  # the first shard may take a while, because the code is compiled first
            shards = list(pool.map(lambda number: shards[number] or finish(number, wait=False), numbers))
            # Wait for shards that another process is making; if that process dies, make the shards here.
            shards = list(pool.map(lambda number: shards[number] or finish(number, wait=True), numbers))
        whole = [shard for shard in shards if shard is not None]
        if len(whole) < len(shards):
            return None
        cache._take(whole)
        return cache

    def __len__(self) -> int:
        return len(self.crystals)

    def bond_counts(self) -> NDArray[np.int64]:
        """Directed bonds per crystal, int64 [N]."""
        return self.index[:, 1]

    def angle_counts(self) -> NDArray[np.int64]:
        """Angles per crystal, int64 [N]."""
        return self.index[:, 4]

    @property
    def n_atoms(self) -> NDArray[np.int64]:
        return self.crystals.n_atoms

    def widened(self) -> NDArray[np.int64]:
        """Rows of the crystals whose cut-off was raised so that no atom is isolated, ascending."""
        return np.flatnonzero(self.cutoffs > ATOM_CUTOFF)

    def records(self, rows: NDArray[np.int64]) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
        """The packed graphs of ``rows``, concatenated, and their offsets, int64 [B + 1].

        Each graph's checksum is verified when the graph is first used. A damaged shard is rebuilt from the crystals.
        """
        for row in rows[~self._checked[rows]].tolist():
            self._check(row)
        numbers = self._firsts.searchsorted(rows, side="right") - 1
        starts, stops = self.index[rows, 0], self._stops[rows]
        ranges = zip(numbers.tolist(), starts.tolist(), stops.tolist(), strict=True)
        borders = np.zeros(len(rows) + 1, np.int64)
        np.cumsum(stops - starts, out=borders[1:])
        return np.concatenate([self._shards[number].records[begin:end] for number, begin, end in ranges]), borders

    @classmethod
    def problems(cls, crystals: Crystals, folder: Path) -> list[str]:
        """Read all existing shards; return one sentence per damaged shard."""
        cache = cls(crystals, folder)
        found = []
        for number in range(len(cache._borders) - 1):
            try:
                if cache._path(number).exists() and not _is_whole(cache._read(number)):
                    found.append(f"{folder}: shard {number} is damaged.")
            except CacheError as error:
                found.append(str(error))
        return found

    def damaged(self) -> list[int]:
        """Read all shards; return the numbers of those that fail a checksum."""
        return [number for number, shard in enumerate(self._shards) if not _is_whole(shard)]

    def repair(self, number: int) -> None:
        """Rebuild a shard, unless another thread or process has already rebuilt it."""
        with self._mending:
            shard = self._read_or_make(number, wait=True)
            if not _is_whole(shard):
                self._path(number).unlink(missing_ok=True)
                shard = self._read_or_make(number, wait=True)
            self._shards[number] = shard
            # If a different machine made the old shard, the new shard's index may differ: rounding can add or remove a
            # bond exactly at the cut-off.
            rows = slice(*self._borders[number : number + 2])
            self.index[rows], self.cutoffs[rows], self._stops[rows] = shard.index, shard.cutoffs, shard.stops

    def _check(self, row: int) -> None:
        number = bisect_right(self._borders, row) - 1
        position = row - self._borders[number]
        shard = self._shards[number]
        if zlib.crc32(shard.records[self.index[row, 0] : self._stops[row]].data) != shard.checksums[position]:
            self.repair(number)
        self._checked[row] = True

    def _take(self, shards: list[_Shard]) -> None:
        self._shards = shards
        if shards:
            self.index = np.concatenate([shard.index for shard in shards])
            self.cutoffs = np.concatenate([shard.cutoffs for shard in shards])
            self._stops = np.concatenate([shard.stops for shard in shards])

    def _path(self, number: int) -> Path:
        return _shard_path(self.folder, number)

    def _key(self, number: int) -> dict[str, Any]:
        return {
            "kind": "graphs",
            "crystals": self.crystals.structures_hash,
            "converter": CONVERTER_VERSION,
            "atom_cutoff": ATOM_CUTOFF,
            "bond_cutoff": BOND_CUTOFF,
            "rows": self._borders[number : number + 2],
        }

    def _read(self, number: int) -> _Shard:
        return self._opened(self._path(number), number)

    def _opened(self, path: Path, number: int) -> _Shard:
        meta, arrays = read_arrays(path)
        # In shards from earlier versions, the recorded hash of the crystals also covers the targets.
        if meta not in (key := self._key(number), {**key, "crystals": self.crystals.hash}):
            raise CacheError(f"{path} contains different graphs and must be rebuilt.")
        return _Shard(
            records=arrays["records"],
            index=arrays["index"],
            cutoffs=arrays["cutoffs"],
            checksums=arrays["checksums"],
        )

    def _read_or_make(self, number: int, *, wait: bool) -> _Shard:
        try:
            return self._read(number)
        except CacheError:
            pass
        path = self._path(number)
        with FileLock(self.folder / "locks" / f"{path.stem}.lock", timeout=-1 if wait else 0):
            try:
                return self._read(number)
            except CacheError:
                pass
            for left_over in self.folder.glob(f"{TEMP_PREFIX}*-{path.name}"):
                left_over.unlink(missing_ok=True)
            if self._link_twin(number):
                return self._read(number)
            first, stop = self._borders[number : number + 2]
            packed = convert(self.crystals, first, stop)
            ends = [*packed.index[1:, 0].tolist(), len(packed.records)]
            checksums = [
                zlib.crc32(packed.records[begin:end].data)
                for begin, end in zip(packed.index[:, 0].tolist(), ends, strict=True)
            ]
            arrays: dict[str, NDArray[Any]] = {
                "index": packed.index,
                "cutoffs": packed.cutoffs,
                "checksums": np.array(checksums, np.uint32),
                "records": packed.records,
            }
            try:
                write_arrays(path, self._key(number), arrays, unhashed=("records",))
            except OSError as error:
                raise CacheError(f"{path} cannot be written: {error}. Finished shards are kept.") from error
        return self._read(number)

    def _link_twin(self, number: int) -> bool:
        """Hard-link a complete shard of the same structures from another cache; return False if there is none.

        Datasets with different target columns of one table have the same graphs. With hard links, caches with the
        same graphs share one file on disk. Removing one of the caches does not affect the others.
        """
        path = self._path(number)
        for twin in sorted(self.folder.parent.glob(f"*-{CONVERTER_VERSION}/{path.name}")):
            try:
                if twin.parent == self.folder or not _is_whole(self._opened(twin, number)):
                    continue
                link = path.with_name(f"{TEMP_PREFIX}{os.getpid()}-{path.name}")
                os.link(twin, link)
                link.replace(path)
            except (CacheError, OSError):
                # The shard is for different crystals or is being removed, or the disk does not support hard links.
                continue
            return True
        return False


def _is_whole(shard: _Shard) -> bool:
    ranges = zip(shard.index[:, 0].tolist(), shard.stops.tolist(), shard.checksums.tolist(), strict=True)
    return all(zlib.crc32(shard.records[begin:end].data) == checksum for begin, end, checksum in ranges)
