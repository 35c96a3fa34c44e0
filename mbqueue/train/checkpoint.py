"""Commits: a checkpoint file and its manifest, in one folder per fold.

A commit exists when its manifest does. It is written in two parts: staging serialises and makes both files durable
under temporary names, which is slow and may run in a background thread; publishing renames them, checkpoint first,
manifest last, which is fast and belongs inside the queue's fence, so that a worker that lost its lease publishes
nothing. Published files never change.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mbqueue.errors import CheckpointError
from mbqueue.files import TEMP_PREFIX, fsync_dir, make_folder, temp_beside
from mbqueue.train.manifest import Damaged, Manifest, parse_manifest
from mbqueue.train.state import TrainState, deserialise

_KEPT = 2


@dataclass(frozen=True)
class Staged:
    """A commit that is durable under temporary names, but does not exist yet."""

    manifest: Manifest
    folder: Path
    temp_checkpoint: Path
    temp_manifest: Path

    @property
    def is_published(self) -> bool:
        """Whether the commit exists."""
        return (self.folder / f"{self.manifest.stem}.json").exists()

    @property
    def size(self) -> int:
        """Size of the checkpoint file, bytes."""
        return self.manifest.size

    def publish(self) -> Manifest:
        """Make the commit exist, durably. Call it while the lease is held."""
        self.temp_checkpoint.replace(self.folder / f"{self.manifest.stem}.pt")
        self.temp_manifest.replace(self.folder / f"{self.manifest.stem}.json")
        fsync_dir(self.folder)
        return self.manifest

    def discard(self) -> None:
        """Remove what is left of the temporary files; nothing after `publish`."""
        self.temp_checkpoint.unlink(missing_ok=True)
        self.temp_manifest.unlink(missing_ok=True)


class Checkpoints:
    """The commits of one fold.

    Args:
        folder: where they are; made when the first is written.
        on_damaged: told the path and the reason of each commit that was set aside.
        enqueued: what the queue knows of the experiment; written into every manifest.
    """

    def __init__(
        self,
        folder: Path,
        on_damaged: Callable[[Path, str], None] = lambda _path, _why: None,
        enqueued: Mapping[str, Any] | None = None,
    ) -> None:
        self.folder = folder
        self._on_damaged = on_damaged
        self._enqueued = None if enqueued is None else dict(enqueued)

    def stage(self, content: bytes, facts: Mapping[str, Any]) -> Staged:
        """Write a checkpoint and its manifest durably under temporary names.

        Args:
            content: bytes of the checkpoint file.
            facts: fields of `Manifest` other than size and sha256.
        """
        given = {**facts, "enqueued": self._enqueued or facts.get("enqueued")}
        manifest = Manifest(**given, size=len(content), sha256=hashlib.sha256(content).hexdigest())
        make_folder(self.folder)
        checkpoint = temp_beside(self.folder / f"{manifest.stem}.pt")
        listing = temp_beside(self.folder / f"{manifest.stem}.json")
        staged = Staged(manifest, self.folder, checkpoint, listing)
        try:
            _write_through(checkpoint, content)
            text = json.dumps(manifest.to_json(), indent=2, allow_nan=False, ensure_ascii=False) + "\n"
            _write_through(listing, text.encode())
        except BaseException:
            staged.discard()
            raise
        return staged

    def manifests(self) -> list[Manifest]:
        """Every commit that can be parsed, oldest work first; the others are set aside."""
        found = []
        for path in sorted(self.folder.glob("e*.json")):
            try:
                found.append(parse_manifest(path))
            except Damaged as error:
                self._set_aside(path.stem, str(error))
        return sorted(found, key=lambda manifest: manifest.order)

    def newest(self, *, at_most_epoch: int | None = None) -> Manifest | None:
        """The commit with the most work that is whole: size, hash and content verified; None when there is none.

        It is only whole together with the commit of the best epoch that it points to: without that, what the fold
        was trained for is lost, and it must be trained again from a commit that has all it needs. Damaged ones are
        set aside (renamed to .damaged) and reported, and the one before is taken.
        """
        for manifest in reversed(self.manifests()):
            if at_most_epoch is not None and manifest.epoch > at_most_epoch:
                continue
            try:
                self.load(manifest)
                if manifest.best and manifest.best["commit"] != manifest.stem:
                    self.load(self._best_of(manifest))
            except Damaged as error:
                self._set_aside(manifest.stem, str(error))
                continue
            return manifest
        return None

    def _best_of(self, manifest: Manifest) -> Manifest:
        assert manifest.best is not None
        best = self.find(manifest.best["commit"])
        if best is None:
            raise Damaged(f"{manifest.stem} lacks its best epoch: {manifest.best['commit']} is not in {self.folder}.")
        return best

    def find(self, stem: str) -> Manifest | None:
        """The commit of that name, or None."""
        path = self.folder / f"{stem}.json"
        return parse_manifest(path) if path.exists() else None

    def load(self, manifest: Manifest) -> TrainState:
        """The state of a commit.

        Raises:
            Damaged: when the file is missing, or its size, hash or content is not as the manifest says.
            OSError: when the file system fails, which says nothing about the file.
        """
        path = self.folder / f"{manifest.stem}.pt"
        try:
            size = path.stat().st_size
            content = path.read_bytes() if size == manifest.size else b""
        except FileNotFoundError as error:
            raise Damaged(f"The checkpoint {path} is missing.") from error
        if len(content) != manifest.size:
            raise Damaged(f"{path} has {size} bytes, its manifest says {manifest.size}.")
        if hashlib.sha256(content).hexdigest() != manifest.sha256:
            raise Damaged(f"{path} does not have the SHA-256 that its manifest says.")
        try:
            state = deserialise(content)
        except CheckpointError as error:
            raise Damaged(f"{path}: {error}") from error
        if (state.spec_hash, state.fold, state.epoch, state.step, state.complete) != (
            manifest.spec_hash,
            manifest.fold,
            manifest.epoch,
            manifest.step,
            manifest.complete,
        ):
            raise Damaged(f"{path} and its manifest are of different commits.")
        return state

    def prune(self) -> list[str]:
        """Remove all but the newest two commits and the best epochs that they point to; the stems removed."""
        manifests = self.manifests()
        newest = manifests[-_KEPT:]
        kept = {manifest.stem for manifest in newest}
        kept |= {manifest.best["commit"] for manifest in newest if manifest.best}
        removed = [manifest.stem for manifest in manifests if manifest.stem not in kept]
        for stem in removed:
            # Manifest first: a commit whose checkpoint is gone must not seem to exist.
            (self.folder / f"{stem}.json").unlink(missing_ok=True)
            (self.folder / f"{stem}.pt").unlink(missing_ok=True)
        return removed

    def sweep(self) -> None:
        """Remove temporary files that a dead process left. Only for the one process that works on the fold."""
        for path in self.folder.glob(f"{TEMP_PREFIX}*"):
            path.unlink(missing_ok=True)

    def _set_aside(self, stem: str, why: str) -> None:
        for suffix in (".json", ".pt"):
            path = self.folder / f"{stem}{suffix}"
            if path.exists():
                path.replace(path.with_name(path.name + ".damaged"))
        self._on_damaged(self.folder / f"{stem}.pt", why)


def _write_through(path: Path, content: bytes) -> None:
    with path.open("wb") as stream:
        stream.write(content)
        stream.flush()
        os.fsync(stream.fileno())
