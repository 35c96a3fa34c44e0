"""Write, repair, prune and set aside the commits of a fold that only this process may change."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mbqueue.errors import CheckpointError, CommitTaken
from mbqueue.files import json_bytes
from mbqueue.storage.blobs import Folder, Listed
from mbqueue.storage.commits import Commits, OnWrong
from mbqueue.storage.manifest import LARGEST_CHECKPOINT, LARGEST_MANIFEST, Commit, Damaged, Identity, Manifest
from mbqueue.storage.names import CHECKPOINT, CommitFile, file_name
from mbqueue.storage.places import Place, in_folder

_KEPT = 2
#: A checkpoint without a manifest can be removed if it is this much older than its fold's newest file. No upload takes
#: this long.
GARBAGE_SECONDS = 3600.0


@dataclass
class Staged:
    """A commit whose checkpoint is durable, but whose manifest has not been created."""

    commits: OwnCommits
    commit: Commit
    is_published: bool = False

    @property
    def manifest(self) -> Manifest:
        return self.commit.manifest

    def publish(self) -> Manifest:
        """Create the manifest durably. Call `publish` while the lease is held; a second call changes nothing.

        Raises:
            CommitTaken: if another worker has published a commit of this name.
            StoreError: if an object store does not answer. To find out whether the commit was published, publish it
                again.
        """
        self.commits.publish(self.commit)
        self.is_published = True
        return self.manifest

    def discard(self) -> None:
        """Remove the commit's files on this machine; do nothing after `publish`."""
        if not self.is_published:
            self.commits.discard(self.commit)


class OwnCommits(Commits):
    """The commits of a fold that only this process may change.

    Args:
        place, identity, on_wrong: as for `Commits`. Damaged or foreign commits are set aside (renamed to .damaged)
            before they are reported.
        near: a folder on this machine for copies of commits that are stored elsewhere. A copy saves a download, and is
            used only if it matches the commit's manifest.
        mirror: where copies are stored that replace damaged files.
        note: called with a message about each repair.
        enqueued: the experiment's entry in the queue, written into every manifest.
    """

    def __init__(
        self,
        place: Place,
        identity: Identity,
        on_wrong: OnWrong = lambda _base, _why: None,
        *,
        near: Path | None = None,
        mirror: Commits | None = None,
        note: Callable[[str], None] = lambda _text: None,
        enqueued: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__(place, identity, on_wrong)
        self.near = None if near is None else OwnCommits(in_folder(near), identity)
        self._mirror, self._note = mirror, note
        self._enqueued = None if enqueued is None else dict(enqueued)
        self._sent: tuple[str, str] | None = None
        self._is_near_told = False

    # -- reading -------------------------------------------------------------------------------------------------

    def checkpoint(self, commit: Commit) -> bytes:
        if self.near is not None:
            with contextlib.suppress(Damaged, OSError):
                return self.near.checkpoint(commit)
        try:
            content = super().checkpoint(commit)
        except Damaged:
            copy = self._copy(lambda other: other.manifest == commit.manifest)
            if copy is None:
                raise
            content = self._checkpoint_of(copy)
        self._keep_near(lambda near: near.put(commit, content))
        return content

    def _keep_near(self, write: Callable[[OwnCommits], None]) -> None:
        """Keep a copy of a commit on this machine.

        Report only the first failure, because a copy only saves a download.
        """
        if self.near is None:
            return
        try:
            write(self.near)
        except OSError as error:
            if not self._is_near_told:
                self._is_near_told = True
                self._note(
                    f"mbqueue cannot keep copies of commits in {self.near.place.name} ({error}), so it downloads "
                    "commits when it needs them."
                )

    def _commit(self, name: str, file: CommitFile, listed: Listed) -> Commit:
        try:
            return super()._commit(name, file, listed)
        except Damaged:
            copy = self._copy_of_what_is_beside(file) if self._mirror is not None else None
            if copy is None:
                raise
        self._mend(self.place.path(name), copy.content)
        return Commit(file.base, copy.manifest, copy.content)

    def _copy_of_what_is_beside(self, file: CommitFile) -> Commit | None:
        """Find the mirror's copy of the commit whose checkpoint is next to the manifest ``file``.

        Names may be reused, so compare hashes.
        """
        path = self.place.path(file_name(file.stem, CHECKPOINT))
        try:
            sha256 = hashlib.sha256(self.place.blobs.read(path, at_most=LARGEST_CHECKPOINT)).hexdigest()
        except FileNotFoundError:
            return None
        return self._copy(lambda other: (other.manifest.stem, other.manifest.sha256) == (file.stem, sha256))

    def _copy(self, is_it: Callable[[Commit], bool]) -> Commit | None:
        if self._mirror is not None:
            with contextlib.suppress(OSError):  # if the mount fails, no copy is available
                return next(filter(is_it, self._mirror.commits()), None)
        return None

    def _checkpoint_of(self, copy: Commit) -> bytes:
        assert self._mirror is not None
        path = self.place.checkpoint(copy)
        try:
            content = self._mirror.checkpoint(copy)
        except OSError as error:
            raise Damaged(f"{path} is damaged, and its copy cannot be read: {error}.") from error
        self._mend(path, content)
        return content

    def _mend(self, path: str, content: bytes) -> None:
        self.place.blobs.put(path, content)
        self._note(f"{self.place.blobs.url}/{path} was damaged and has been replaced by its published copy.")

    # -- writing -------------------------------------------------------------------------------------------------

    def stage(self, content: bytes, fields: Mapping[str, Any]) -> Staged:
        """Write a checkpoint durably, without its manifest.

        Args:
            content: bytes of the checkpoint file.
            fields: fields of `Manifest` other than size and sha256.

        Raises:
            CommitTaken: if another worker has written a commit of this name.
        """
        given = {**fields, "enqueued": self._enqueued or fields.get("enqueued")}
        manifest = Manifest(**given, size=len(content), sha256=hashlib.sha256(content).hexdigest())
        self.identity.require(manifest, source=f"{self.place.name}/{manifest.stem}")
        commit = Commit(manifest.stem, manifest, json_bytes(manifest.to_json()))
        if not self.place.has_hashed_checkpoints:
            # The name contains no hash, so make sure that the new checkpoint does not replace another writer's
            # checkpoint.
            is_ours = self._manifest_there(commit) in (None, commit.content)
            if not (is_ours and self.place.blobs.create(self.place.checkpoint(commit), content)):
                raise self._taken(commit)
        elif self._sent != (manifest.stem, manifest.sha256):
            self.put_checkpoint(commit, content)
            self._sent = (manifest.stem, manifest.sha256)
        elif self._manifest_there(commit) not in (None, commit.content):
            # An earlier attempt has already sent the checkpoint. If the store is still not answering, this read fails
            # before the queue's transaction begins.
            raise self._taken(commit)
        self._keep_near(lambda near: near.put_checkpoint(commit, content))
        return Staged(self, commit)

    def publish(self, commit: Commit) -> None:
        if not self.place.blobs.create(self.place.manifest(commit), commit.content):
            raise self._taken(commit)
        self._keep_near(lambda near: near.place.blobs.put(near.place.manifest(commit), commit.content))

    def discard(self, commit: Commit) -> None:
        """Remove the checkpoint of a commit that is known to be unpublished."""
        if self.near is not None:
            self.near.discard(commit)
        # In a store, keep the checkpoint: its manifest may exist although the store's answer was lost. `prune` removes
        # the checkpoint later.
        elif not self.place.has_hashed_checkpoints and self._manifest_there(commit) is None:
            self.place.blobs.remove(self.place.checkpoint(commit))

    def _manifest_there(self, commit: Commit) -> bytes | None:
        try:
            return self.place.blobs.read(self.place.manifest(commit), at_most=LARGEST_MANIFEST)
        except FileNotFoundError:
            return None

    def _taken(self, commit: Commit) -> CommitTaken:
        return CommitTaken(
            f"Another worker has already written commit {commit.base} of {self.identity.label} to "
            f"{self.place.blobs.url}. This worker discards its own commit and continues from the other worker's."
        )

    # -- removing ------------------------------------------------------------------------------------------------

    def prune(self) -> list[str]:
        """Remove all commits except the newest two and the commits of their best epochs.

        Return the removed commits' stems.

        Also remove checkpoints that have no manifest and are too old to be published.
        """
        found = self.commits()
        kept = {stem for commit in found[-_KEPT:] for stem in commit.manifest.needed_stems}
        removed = [commit for commit in found if commit.manifest.stem not in kept]
        for commit in removed:
            self.remove(commit)
        named = set(map(self.place.checkpoint, found))
        self._remove_unnamed(self._listed, named, older_by=GARBAGE_SECONDS)
        return [commit.manifest.stem for commit in removed]

    def remove(self, commit: Commit) -> None:
        super().remove(commit)
        if self.near is not None:
            self.near.remove(commit)

    def sweep(self) -> None:
        """Remove files that a dead process left on this machine."""
        if self.near is not None:
            self.near.sweep()
        elif isinstance(self.place.blobs, Folder):
            self.place.blobs.sweep(self.place.folder)
            # A process that died while it published, removed or set aside a commit may have left a checkpoint without a
            # manifest. The checkpoint's name contains the dead process's fence, so no other session writes to the
            # checkpoint.
            files = self._files()
            named = {
                self.place.path(file_name(file.base, CHECKPOINT))
                for _, _, file in files
                if self.place.is_manifest(file)
            }
            self._remove_unnamed(files, named, older_by=None)

    def _remove_unnamed(
        self, files: list[tuple[str, Listed, CommitFile]], named: set[str], *, older_by: float | None
    ) -> None:
        newest = max((listed.modified for _, listed, _ in files), default=0.0)
        for name, listed, file in files:
            is_old = older_by is None or listed.modified < newest - older_by
            if is_old and self.place.is_checkpoint(file) and self.place.path(name) not in named:
                self.place.blobs.remove(self.place.path(name))

    def _wrong(self, base: str, error: CheckpointError) -> None:
        if not isinstance(error, Damaged):
            raise error  # a commit of a newer format is intact, so do not set it aside
        if self._set_aside(base):
            self._on_wrong(base, str(error))

    def _set_aside(self, stem: str) -> bool:
        """Rename a damaged commit's files to names that are never read. Return False if the manifest is gone."""
        if self.near is not None:
            self.near._set_aside(stem)
        return self.rename(stem, lambda name: f"{name}.damaged")
