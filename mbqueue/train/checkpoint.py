"""Commits: a checkpoint and its manifest, in one place per fold (`mbqueue.train.places`): a folder, or a store.

A commit exists when its manifest does. It is written in two parts: staging makes the checkpoint durable, which is slow
and may run in a background thread; publishing lets the manifest exist, which is fast (two renames, or one put) and
belongs inside the queue's fence, so that a worker that lost its lease publishes nothing. What is published never
changes.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mbqueue.errors import CheckpointError, StoreError
from mbqueue.train.manifest import Damaged, Manifest, manifest_named
from mbqueue.train.places import LocalPlace, Place, Staging
from mbqueue.train.state import TrainState, deserialise

_KEPT = 2


@dataclass(frozen=True)
class Staged:
    """A commit that is durable, but does not exist yet."""

    manifest: Manifest
    staging: Staging

    @property
    def is_published(self) -> bool:
        """Whether the commit exists."""
        return self.staging.is_published

    def publish(self) -> Manifest:
        """Make the commit exist, durably. Call it while the lease is held.

        Raises:
            CommitTaken: when another writer made it first.
            StoreError: when an object store does not answer: whether the commit exists is then not known, and
                publishing the same again tells.
        """
        self.staging.publish()
        return self.manifest

    def discard(self) -> None:
        """Remove what is left of it on this machine; nothing after `publish`."""
        self.staging.discard()


class Checkpoints:
    """The commits of one fold.

    Args:
        place: where they are; a path is a folder on a local disk.
        on_damaged: told the path and the reason of each commit that was set aside.
        enqueued: what the queue knows of the experiment; written into every manifest.
        hold_on: called when the place, an object store, does not take a commit: waits, or raises the error it is
            given when there is no time to.
    """

    def __init__(
        self,
        place: Place | Path,
        on_damaged: Callable[[Path, str], None] = lambda _path, _why: None,
        enqueued: Mapping[str, Any] | None = None,
        hold_on: Callable[[StoreError], None] | None = None,
    ) -> None:
        self.hold_on = hold_on or _raise
        self.place: Place = LocalPlace(place) if isinstance(place, Path) else place
        self._on_damaged = on_damaged
        self._enqueued = None if enqueued is None else dict(enqueued)

    @property
    def folder(self) -> Path:
        """The folder on this machine where they, or copies of them, are."""
        return self.place.folder

    @property
    def where(self) -> str:
        """Where they are, for people."""
        return self.place.name

    def stage(self, content: bytes, facts: Mapping[str, Any]) -> Staged:
        """Write a checkpoint and its manifest durably, without letting the commit exist.

        Args:
            content: bytes of the checkpoint file.
            facts: fields of `Manifest` other than size and sha256.
        """
        given = {**facts, "enqueued": self._enqueued or facts.get("enqueued")}
        manifest = Manifest(**given, size=len(content), sha256=hashlib.sha256(content).hexdigest())
        text = json.dumps(manifest.to_json(), indent=2, allow_nan=False, ensure_ascii=False) + "\n"
        return Staged(manifest, self.place.stage(manifest, content, text.encode()))

    def manifests(self) -> list[Manifest]:
        """Every commit that can be parsed, oldest work first; the others are set aside."""
        found = []
        for stem in self.place.stems():
            try:
                found.append(self._manifest(stem))
            except FileNotFoundError:
                continue  # superseded and removed since it was listed
            except Damaged as error:
                self._set_aside(stem, str(error))
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
            raise Damaged(f"{manifest.stem} lacks its best epoch: {manifest.best['commit']} is not in {self.where}.")
        return best

    def find(self, stem: str) -> Manifest | None:
        """The commit of that name, or None."""
        try:
            return self._manifest(stem)
        except FileNotFoundError:
            return None

    def _manifest(self, stem: str) -> Manifest:
        return manifest_named(stem, self.place.manifest(stem), source=f"{self.where}/{stem}.json")

    def load(self, manifest: Manifest) -> TrainState:
        """The state of a commit.

        Raises:
            Damaged: when the file is missing, or its size, hash or content is not as the manifest says.
            OSError: when the file system fails, which says nothing about the file.
        """
        content = self.place.checkpoint(manifest)
        path = f"{self.where}/{manifest.stem}.pt"
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
        removed = [manifest for manifest in manifests if manifest.stem not in kept]
        for manifest in removed:
            self.place.remove(manifest)
        self.place.tidy(manifests)
        return [manifest.stem for manifest in removed]

    def sweep(self) -> None:
        """Remove temporary files that a dead process left. Only for the one process that works on the fold."""
        self.place.sweep()

    def _set_aside(self, stem: str, why: str) -> None:
        if self.place.set_aside(stem):
            self._on_damaged(self.folder / f"{stem}.pt", why)


def _raise(error: StoreError) -> None:
    raise error
