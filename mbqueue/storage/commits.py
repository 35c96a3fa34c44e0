"""The commits of one fold: a checkpoint and its manifest each, in one place (`mbqueue.storage.places`).

A commit exists when its manifest does. It is written in two parts: staging makes the checkpoint durable, which is slow
and may run in a background thread; publishing lets the manifest exist, which is fast (two renames, or one put) and
belongs inside the queue's fence, so that a worker that lost its lease publishes nothing. What is published never
changes.

A place is opened for one identity (`mbqueue.storage.manifest.Identity`). A commit of another fold, experiment, spec or
dataset counts as damaged, wherever it comes from: files that were moved by hand, a restore that was mixed up.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from mbqueue.errors import CheckpointError
from mbqueue.storage.manifest import Damaged, Manifest, manifest_named
from mbqueue.storage.places import Place, Staging

_KEPT = 2

#: Told the name and the reason of a commit that is not taken.
OnWrong = Callable[[str, str], None]


def passed_over(where: str, note: Callable[[str], None]) -> OnWrong:
    """Tells in a sentence of each commit that is passed over."""
    return lambda stem, why: note(f"{where}/{stem} is passed over: {why}")


class Commits:
    """The commits of one fold, to be read; nothing is changed in their place.

    Args:
        place: where they are.
        on_wrong: told of each commit that is passed over, because it is damaged or another's.
    """

    def __init__(self, place: Place, on_wrong: OnWrong = lambda _stem, _why: None) -> None:
        self.place = place
        self._on_wrong = on_wrong

    @property
    def where(self) -> str:
        """Where they are, for people."""
        return self.place.name

    def manifests(self) -> list[Manifest]:
        """Every commit whose manifest is whole and of this identity, in the order of `Manifest.rank`."""
        found = []
        for stem in self.place.stems():
            try:
                found.append(self._manifest(stem))
            except FileNotFoundError:
                continue  # superseded and removed since it was listed
            except CheckpointError as error:
                self._wrong(stem, error)
        return sorted(found, key=lambda manifest: manifest.rank)

    def newest(self, *, at_most_epoch: int | None = None) -> Manifest | None:
        """The commit with the most work that is whole, as `chain` finds it; None when there is none."""
        chain = self.chain(at_most_epoch=at_most_epoch)
        return chain[-1] if chain else None

    def chain(self, *, at_most_epoch: int | None = None) -> list[Manifest]:
        """What is needed to go on: the commit with the most work that is whole, in every byte, and that of its best
        epoch, if it is another one, before it. Nothing when there is none.

        It is only whole together with the commit of the best epoch that it points to: without that, what the fold
        was trained for is lost, and it must be trained again from a commit that has all it needs. Those that are not
        are passed over and told.
        """
        found = self.manifests()
        for manifest in reversed(found):
            if at_most_epoch is not None and manifest.epoch > at_most_epoch:
                continue
            try:
                chain = self._chain_to(manifest, found)
                for needed in chain:
                    self.checkpoint(needed)
            except Damaged as error:
                self._wrong(manifest.stem, error)
                continue
            return chain
        return []

    def _chain_to(self, manifest: Manifest, among: list[Manifest]) -> list[Manifest]:
        if manifest.best is None or manifest.best["commit"] == manifest.stem:
            return [manifest]
        for best in among:
            if best.stem == manifest.best["commit"] and manifest.continues(best):
                return [best, manifest]
        raise Damaged(f"{manifest.stem} lacks its best epoch: {manifest.best['commit']} is not in {self.where}.")

    def find(self, stem: str) -> Manifest | None:
        """The commit of that name, or None.

        Raises:
            Damaged: when its manifest is not whole, or it is another's.
        """
        try:
            return self._manifest(stem)
        except FileNotFoundError:
            return None

    def checkpoint(self, manifest: Manifest) -> bytes:
        """The bytes of a commit's checkpoint.

        Raises:
            Damaged: when they are missing, or not what the manifest says.
            OSError: when the file system fails, which says nothing about the file.
        """
        content = self.place.checkpoint(manifest)
        if hashlib.sha256(content).hexdigest() != manifest.sha256:
            raise Damaged(f"{self.where}/{manifest.stem}.pt does not have the SHA-256 that its manifest says.")
        return content

    def _manifest(self, stem: str) -> Manifest:
        return manifest_named(
            stem, self.place.manifest(stem), source=f"{self.where}/{stem}.json", identity=self.place.identity
        )

    def _wrong(self, stem: str, error: CheckpointError) -> None:
        self._on_wrong(stem, str(error))


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


class OwnCommits(Commits):
    """The commits of one fold, for the one process that works on it: also written, pruned and set aside.

    Args:
        place, on_wrong: as of `Commits`; what is damaged or another's is set aside (renamed to .damaged) first.
        enqueued: what the queue knows of the experiment; written into every manifest.
    """

    def __init__(
        self,
        place: Place,
        on_wrong: OnWrong = lambda _stem, _why: None,
        *,
        enqueued: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__(place, on_wrong)
        self._enqueued = None if enqueued is None else dict(enqueued)

    def stage(self, content: bytes, facts: Mapping[str, Any]) -> Staged:
        """Write a checkpoint and its manifest durably, without letting the commit exist.

        Args:
            content: bytes of the checkpoint file.
            facts: fields of `Manifest` other than size and sha256.
        """
        given = {**facts, "enqueued": self._enqueued or facts.get("enqueued")}
        manifest = Manifest(**given, size=len(content), sha256=hashlib.sha256(content).hexdigest())
        self.place.identity.require(manifest, source=f"{self.where}/{manifest.stem}")
        text = json.dumps(manifest.to_json(), indent=2, allow_nan=False, ensure_ascii=False) + "\n"
        return Staged(manifest, self.place.stage(manifest, content, text.encode()))

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
        """Remove temporary files that a dead process left."""
        self.place.sweep()

    def _wrong(self, stem: str, error: CheckpointError) -> None:
        if not isinstance(error, Damaged):
            raise error  # of a newer format: whole, and not to be touched
        if self.place.set_aside(stem):
            super()._wrong(stem, error)
