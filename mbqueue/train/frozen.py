"""The frozen backbone's outputs for each crystal: computed once, stored, and shared by folds and experiments.

There are two outputs: interaction energies, for fitting element references, and atom features, for training the head. A
shard consists of a .npy file with one output for a fixed number of crystals, and a .json file with the size and SHA-256
of the .npy file. The .json is written last, and a shard without a .json counts as missing, so a prepare job can stop at
any point and resume later. Each folder contains the shards of one dataset and one set of weights.

Outputs computed on different devices differ in the last digits. An intact shard is therefore never computed again, and
each training run's fingerprint contains a digest of the stored bytes. Each shard has its own lock, so several processes
can share the work.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock, Timeout
from numpy.typing import NDArray

from mbqueue.errors import CacheError, counted
from mbqueue.files import make_folder, replacing, sha256_of_file, write_bytes, write_json

FORMAT = 1
#: The number of crystals in a shard. The features of a shard take about 15 MB.
SHARD_SIZE = 2048
#: Features per atom.
FEATURES = 64
FROZEN_PREFIX = "frozen-"
#: Seconds between checks for a stop request while waiting for another process's shard.
_POLL_SECONDS = 0.5
_KINDS = ("energies", "features")


def frozen_folder(cache_dir: Path, dataset_hash: str, weights: str) -> Path:
    """Return the folder for one dataset and one set of weights (see `ModelFamily.weights_hash`)."""
    return cache_dir / f"{FROZEN_PREFIX}{dataset_hash[:16]}-{weights[:16]}"


class FrozenBackbone:
    """Stored energies and features of one dataset, computed with one set of weights.

    Args:
        folder: where the shards are (see `frozen_folder`).
        atom_offsets: index of each crystal's first atom, int64 [N + 1].
        weights: hash of the weights.
    """

    def __init__(self, folder: Path, *, atom_offsets: NDArray[np.int64], dataset_hash: str, weights: str) -> None:
        self.folder = folder
        self.atom_offsets = atom_offsets
        self.weights = weights
        self._identity = {"format": FORMAT, "dataset_hash": dataset_hash, "weights": weights, "shard_size": SHARD_SIZE}
        self._maps: dict[int, NDArray[np.float32]] = {}

    @property
    def n_shards(self) -> int:
        return -(-(len(self.atom_offsets) - 1) // SHARD_SIZE)

    def rows_of(self, shard: int) -> NDArray[np.int64]:
        """Return the dataset rows of the crystals in a shard, ascending."""
        return np.arange(shard * SHARD_SIZE, min((shard + 1) * SHARD_SIZE, len(self.atom_offsets) - 1))

    @property
    def features_size(self) -> int:
        """The size of all crystals' features, in bytes."""
        return int(self.atom_offsets[-1]) * FEATURES * 4

    def missing(self, kind: str, *, verify: bool = False) -> list[int]:
        """List the shards of ``energies`` or ``features`` that are missing or, with ``verify``, damaged."""
        return [shard for shard in range(self.n_shards) if not self.is_whole(kind, shard, verify=verify)]

    def is_whole(self, kind: str, shard: int, *, verify: bool = False) -> bool:
        """Whether a shard of ``energies`` or ``features`` is stored; ``verify`` also compares its SHA-256."""
        path = self._path(kind, shard)
        try:
            listing: dict[str, Any] = json.loads(path.with_suffix(".json").read_bytes())
            size = path.stat().st_size
        except (FileNotFoundError, ValueError):
            return False
        if {key: listing.get(key) for key in self._identity} != self._identity or size != listing.get("size"):
            return False
        return not verify or sha256_of_file(path) == listing.get("sha256")

    @contextmanager
    def making(self, shard: int, *, wait_seconds: float = -1) -> Iterator[None]:
        """Hold a shard's lock within a ``with`` block that makes or fetches the shard.

        Only one process on this machine can hold the lock at a time. The operating system releases the lock if the
        process dies.

        Raises:
            Timeout: if another process is still holding the lock after ``wait_seconds``.
        """
        make_folder(self.folder / "locks")
        with FileLock(self.folder / "locks" / f"{shard:05d}.lock", timeout=wait_seconds):
            yield

    def write(self, kind: str, shard: int, values: NDArray[np.float32]) -> None:
        """Write a shard durably."""
        path = self._path(kind, shard)
        with replacing(path) as stream:
            array = np.ascontiguousarray(values, dtype=np.float32)
            np.lib.format.write_array_header_1_0(stream, np.lib.format.header_data_from_array_1_0(array))
            # Avoid `array.tofile`, which raises the same error for a full disk and for a file-size limit.
            stream.write(array.data)
        listing = {**self._identity, "size": path.stat().st_size, "sha256": sha256_of_file(path)}
        write_json(path.with_suffix(".json"), listing)
        self._maps.pop(shard, None)

    def sha256(self, kind: str, shard: int) -> str:
        """Return the recorded SHA-256 of a shard."""
        return str(json.loads(self._path(kind, shard).with_suffix(".json").read_bytes())["sha256"])

    def digest(self, kinds: Sequence[str]) -> str:
        """Return a digest (16 hex digits) of all shards of these kinds.

        This method also memory-maps the files from which features are read later.

        Raises:
            CacheError: if a shard is missing.
        """
        digest = hashlib.sha256()
        for kind in kinds:
            missing = self.missing(kind)
            if missing:
                raise CacheError(self._incomplete(kind, missing))
            for shard in range(self.n_shards):
                if kind == "features":
                    self._maps.setdefault(shard, self._open(kind, shard))
                digest.update(f"{kind} {shard} {self.sha256(kind, shard)}\n".encode())
        return digest.hexdigest()[:16]

    def exported(self, kind: str, shard: int) -> tuple[bytes, dict[str, Any]]:
        """Return the contents of a shard's .npy and .json files, for copying to another machine."""
        path = self._path(kind, shard)
        listing: dict[str, Any] = json.loads(path.with_suffix(".json").read_bytes())
        return path.read_bytes(), listing

    def install(self, kind: str, shard: int, content: bytes, listing: dict[str, Any]) -> bool:
        """Durably write a shard from another machine; return False if it is damaged or belongs to a different store."""
        checksum = {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}
        if listing != {**self._identity, **checksum}:
            return False
        path = self._path(kind, shard)
        write_bytes(path, content)
        write_json(path.with_suffix(".json"), listing)
        self._maps.pop(shard, None)
        return True

    def energies(self) -> NDArray[np.float32]:
        """Interaction energy of every crystal, eV/atom, [N].

        Raises:
            CacheError: if any energies are missing or damaged.
        """
        missing = self.missing("energies", verify=True)
        if missing:
            raise CacheError(self._incomplete("energies", missing))
        return np.concatenate([self._open("energies", shard) for shard in range(self.n_shards)])

    def features(self, rows: NDArray[np.int64]) -> NDArray[np.float32]:
        """Read the atom features of the crystals in ``rows``, concatenated, [A, 64].

        Raises:
            CacheError: if a shard is missing.
        """
        parts = []
        for row in rows:
            shard = int(row) // SHARD_SIZE
            if shard not in self._maps:
                if not self.is_whole("features", shard):
                    raise CacheError(self._incomplete("features", [shard]))
                self._maps[shard] = self._open("features", shard)
            base = self.atom_offsets[shard * SHARD_SIZE]
            parts.append(self._maps[shard][self.atom_offsets[row] - base : self.atom_offsets[row + 1] - base])
        return np.concatenate(parts)

    def shard(self, kind: str, shard: int) -> NDArray[np.float32]:
        """Read the energies [B] or the features [A, 64] of a shard."""
        return np.array(self._open(kind, shard))

    def _path(self, kind: str, shard: int) -> Path:
        assert kind in _KINDS
        return self.folder / f"{kind}-{shard:05d}.npy"

    def _open(self, kind: str, shard: int) -> NDArray[np.float32]:
        values: NDArray[np.float32] = np.load(self._path(kind, shard), mmap_mode="r", allow_pickle=False)
        return values

    def _incomplete(self, kind: str, missing: list[int]) -> str:
        return (
            f"{len(missing)} of {counted(self.n_shards, 'shard')} of the backbone's {kind} in {self.folder} "
            f"{'is' if len(missing) == 1 else 'are'} missing or damaged. Run the experiment's prepare job again."
        )


#: A function that returns the atom features [A, 64] and interaction energies [B] of the given rows, or None if stopped.
#: The second argument is a callback, which receives the number of finished rows.
Compute = Callable[[NDArray[np.int64], Callable[[int], None]], tuple[NDArray[np.float32], NDArray[np.float32]] | None]
#: A function that takes a shard's number and kinds of outputs, and looks for another store that already has the shard's
#: outputs of all these kinds. The function returns the store and the shard's number in that store, or None if there is
#: no such store.
Find = Callable[[int, Sequence[str]], tuple[FrozenBackbone, int] | None]


@dataclass(kw_only=True)
class Preparing:
    """Copies or computes the missing shards of the requested kinds, one by one.

    Attributes:
        frozen: the store to fill.
        compute: computes both kinds for rows of a shard.
        kinds: the kinds of output that are needed.
        keeps_features: whether to store features whenever the backbone runs, even if only energies are needed.
        find: finds a store that has a shard with the same crystals, so that the shard can be copied.
        should_stop: called while waiting for another process.
        on_progress: called with the number of finished crystals and the total.
        n_found, n_computed: number of crystals whose outputs have been copied, or computed, so far.
    """

    frozen: FrozenBackbone
    compute: Compute
    kinds: Sequence[str]
    keeps_features: bool = False
    find: Find = lambda _shard, _kinds: None
    should_stop: Callable[[], bool] = lambda: False
    on_progress: Callable[[int, int], None] = lambda _done, _total: None
    n_found: int = 0
    n_computed: int = 0

    def run(self) -> bool:
        """Copy or compute the missing shards; return False if stopped before the end.

        An intact shard is never overwritten, because other machines may be using its bytes, and newly computed outputs
        could differ in the last digits. If another process is making a shard, this process waits. If a process dies
        while making a shard, the process that waited makes the shard.
        """
        frozen = self.frozen
        missing = sorted({shard for kind in self.kinds for shard in frozen.missing(kind, verify=True)})
        total = len(frozen.atom_offsets) - 1
        done = total - sum(len(frozen.rows_of(shard)) for shard in missing)

        def tell(more: int) -> None:
            self.on_progress(done + more, total)

        tell(0)
        waiting, may_wait = missing, False
        while waiting:
            others: list[int] = []
            for shard in waiting:
                if may_wait and self.should_stop():
                    return False
                try:
                    with frozen.making(shard, wait_seconds=_POLL_SECONDS if may_wait else 0):
                        if not self._make(shard, tell):
                            return False
                except Timeout:
                    others.append(shard)
                    continue
                done += len(frozen.rows_of(shard))
                tell(0)
            waiting, may_wait = others, True
        return True

    def _make(self, shard: int, tell: Callable[[int], None]) -> bool:
        """Copy or compute the missing outputs of a shard whose lock is held; return False if stopped."""
        frozen = self.frozen
        missing = [kind for kind in self.kinds if not frozen.is_whole(kind, shard, verify=True)]
        if not missing:
            return True
        rows = frozen.rows_of(shard)
        if (found := self.find(shard, missing)) is not None:
            source, there = found
            for kind in missing:
                frozen.write(kind, shard, source.shard(kind, there))
            self.n_found += len(rows)
            return True
        computed = self.compute(rows, tell)
        if computed is None:
            return False
        if self.keeps_features and "features" not in self.kinds and not frozen.is_whole("features", shard, verify=True):
            missing.append("features")
        # Write features first, so that a process that finds the energies also finds the features.
        for kind in sorted(missing, reverse=True):
            frozen.write(kind, shard, computed[kind == "energies"])
        self.n_computed += len(rows)
        return True
