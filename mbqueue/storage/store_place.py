"""Commits in an object store, which machines without a common file system share.

A commit is two objects below ``checkpoints/EXPERIMENT/fold_i/``: STEM-HASH.pt, HASH being the beginning of its
SHA-256, so that its name is never given to other bytes, and STEM.json, the manifest. The manifest is written last and
by a put that the store refuses when the name is taken: of two writers of one commit one wins, even when the queue let
both through. Then the commit is durable and every machine sees it.

What this machine wrote or read is kept in a local folder, in the form that commits have there; it spares a download
and is believed only as far as the manifest in the store says.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from mbqueue import files
from mbqueue.errors import CommitTaken
from mbqueue.objects import Listed, ObjectStore
from mbqueue.project import STORED_CHECKPOINTS
from mbqueue.storage.manifest import LARGEST_MANIFEST, Damaged, Identity, Manifest
from mbqueue.storage.names import HASH_DIGITS, commit_file
from mbqueue.storage.places import LocalPlace, Staging

#: A checkpoint without a manifest that is so much older than the newest object of its fold is of a writer that died
#: or lost; no upload takes so long.
GARBAGE_SECONDS = 3600.0


def fold_prefix(experiment: str, fold: int) -> str:
    """Where the commits of a fold are in a store."""
    return f"{STORED_CHECKPOINTS}/{experiment}/fold_{fold}"


@dataclass
class _StagedObject:
    """A checkpoint in the store whose manifest is not there, and local copies of both under temporary names."""

    store: ObjectStore
    path: str
    manifest: Manifest
    listing: bytes
    copy: Staging
    is_published: bool = False

    def publish(self) -> None:
        if not self.store.create_at_once(self.path, self.listing):
            raise CommitTaken(
                f"The commit {self.manifest.stem} of {self.manifest.experiment}, fold {self.manifest.fold}, is in "
                f"{self.store.url} already, written by another worker. This one's is dropped; training goes on from "
                "that."
            )
        self.is_published = True
        with contextlib.suppress(OSError):  # the commit exists; the copy only spares a download
            self.copy.publish()

    def discard(self) -> None:
        # The checkpoint stays in the store: when an answer was lost, its manifest may be there. `tidy` removes it.
        self.copy.discard()


@dataclass
class StorePlace:
    """The commits of one fold in an object store.

    Attributes:
        folder: where local copies are kept.
    """

    store: ObjectStore
    identity: Identity
    folder: Path
    _seen: dict[str, tuple[str, bytes]] = field(default_factory=dict, init=False, repr=False)
    _listed: dict[str, Listed] = field(default_factory=dict, init=False, repr=False)
    _uploaded: str = field(default="", init=False, repr=False)

    @property
    def name(self) -> str:
        return f"{self.store.url}/{self._prefix}"

    @property
    def _prefix(self) -> str:
        return fold_prefix(self.identity.experiment, self.identity.fold)

    @property
    def _copies(self) -> LocalPlace:
        return LocalPlace(self.folder, self.identity)

    def _path(self, name: str) -> str:
        return f"{self._prefix}/{name}"

    def stems(self) -> list[str]:
        self._listed = self.store.listed(self._prefix)
        found = map(commit_file, self._listed)
        return [one.stem for one in found if one is not None and one.suffix == "json" and one.base == one.stem]

    def manifest(self, stem: str) -> bytes:
        e_tag = self._listed[f"{stem}.json"].e_tag if f"{stem}.json" in self._listed else ""
        known = self._seen.get(stem)
        # A name is not given to other bytes, but a person may have put something there.
        if known is None or known[0] != e_tag:
            known = self._seen[stem] = (e_tag, self.store.read(self._path(f"{stem}.json"), at_most=LARGEST_MANIFEST))
        return known[1]

    def checkpoint(self, manifest: Manifest) -> bytes:
        with contextlib.suppress(Damaged, OSError):
            content = self._copies.checkpoint(manifest)
            if hashlib.sha256(content).hexdigest() == manifest.sha256:
                return content
        path = self._path(_checkpoint_name(manifest))
        try:
            content = self.store.read(path, at_most=manifest.size)
        except FileNotFoundError as error:
            raise Damaged(f"The checkpoint {self.store.url}/{path} is missing.") from error
        if len(content) != manifest.size:
            raise Damaged(f"{self.store.url}/{path} has {len(content)} bytes, its manifest says {manifest.size}.")
        if hashlib.sha256(content).hexdigest() == manifest.sha256:
            with contextlib.suppress(OSError):
                files.write_bytes(self.folder / f"{manifest.stem}.pt", content)
                files.write_bytes(self.folder / f"{manifest.stem}.json", self.manifest(manifest.stem))
        return content

    def fetch(self, manifest: Manifest) -> None:
        """Make sure that a commit is in the local folder."""
        files.write_bytes(self.folder / f"{manifest.stem}.pt", self.checkpoint(manifest))
        files.write_bytes(self.folder / f"{manifest.stem}.json", self.manifest(manifest.stem))

    def send(self, manifest: Manifest, checkpoint: bytes, listing: bytes) -> None:
        """Put a commit into the store that so far is in the local folder only."""
        self.store.put(self._path(_checkpoint_name(manifest)), checkpoint)
        self.store.create(self._path(f"{manifest.stem}.json"), listing)

    def stage(self, manifest: Manifest, checkpoint: bytes, listing: bytes) -> Staging:
        copy = self._copies.stage(manifest, checkpoint, listing)
        path = self._path(_checkpoint_name(manifest))
        try:
            if self._uploaded == path:  # a second try to publish need not send it again
                self.store.ping()  # but must not find out inside the queue's fence that the store is still away
            else:
                self.store.put(path, checkpoint)
                self._uploaded = path
        except BaseException:
            copy.discard()
            raise
        return _StagedObject(self.store, self._path(f"{manifest.stem}.json"), manifest, listing, copy)

    def remove(self, manifest: Manifest) -> None:
        self.store.remove(self._path(f"{manifest.stem}.json"))
        self.store.remove(self._path(_checkpoint_name(manifest)))
        self._seen.pop(manifest.stem, None)
        self._copies.remove(manifest)

    def set_aside(self, stem: str) -> bool:
        self._seen.pop(stem, None)
        self._copies.set_aside(stem)
        if not self.store.move(self._path(f"{stem}.json"), self._path(f"{stem}.json.damaged")):
            return False  # whoever holds the fold has just replaced it by a newer one
        for name in self._listed:
            if name.startswith(f"{stem}-") and name.endswith(".pt"):
                self.store.move(self._path(name), self._path(f"{name}.damaged"))
        return True

    def tidy(self, existing: Sequence[Manifest]) -> None:
        newest = max((found.modified for found in self._listed.values()), default=0.0)
        named = {_checkpoint_name(manifest) for manifest in existing}
        for name, found in self._listed.items():
            if name.endswith(".pt") and name not in named and found.modified < newest - GARBAGE_SECONDS:
                self.store.remove(self._path(name))

    def sweep(self) -> None:
        self._copies.sweep()


def _checkpoint_name(manifest: Manifest) -> str:
    return f"{manifest.stem}-{manifest.sha256[:HASH_DIGITS]}.pt"
