"""Read and copy the commits of a fold at one location. A commit is a checkpoint and its manifest.

A commit exists once its manifest exists. Staging, which may run in a background thread, writes the checkpoint durably.
Publishing is fast, because it only creates the manifest. A worker publishes inside the transaction that checks the
fence, so a worker that lost its lease publishes nothing. Published files never change.

`Commits` accepts commits of one identity only (`mbqueue.storage.manifest.Identity`). A commit of a different fold,
experiment, spec or dataset, for example one that was moved by hand, counts as damaged.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable

from mbqueue.errors import CheckpointError, counted
from mbqueue.storage.blobs import Blobs, Listed, Unreadable
from mbqueue.storage.manifest import LARGEST_MANIFEST, Commit, Damaged, Identity, Manifest, manifest_named
from mbqueue.storage.names import MANIFEST, CommitFile, commit_file, file_name
from mbqueue.storage.places import Place

#: A function that is called with the name of a skipped commit and the reason for skipping it.
OnWrong = Callable[[str, str], None]


def passed_over(where: str, note: Callable[[str], None]) -> OnWrong:
    """Make a callback that notes each skipped commit."""
    return lambda base, why: note(f"{where}/{base} is skipped: {why}")


def read_described(blobs: Blobs, paths: Iterable[str], *, size: int, sha256: str, what: str) -> bytes:
    """Read a file that a manifest describes.

    Args:
        paths: the possible names of the file. A mount renames a second file to ``name (1)``.
        what: what the file contains, as named in messages.

    Raises:
        Damaged: if no file has the expected size and hash.
        OSError, StoreError: if the folder, mount or store fails, although the file may be intact.
    """
    why = f"{what} is missing."
    for path in paths:
        try:
            content = blobs.read(path, at_most=size)
        except Unreadable as error:
            why = str(error)
            continue
        except FileNotFoundError:
            continue
        if len(content) != size:
            found = counted(len(content), "byte") if len(content) < size else f"over {counted(size, 'byte')}"
            why = f"{blobs.url}/{path} has {found}, but its manifest says {size:,}."
        elif hashlib.sha256(content).hexdigest() != sha256:
            why = f"{blobs.url}/{path} does not match the SHA-256 in its manifest."
        else:
            return content
    raise Damaged(why)


class Commits:
    """Reads the commits of one fold, and checks every file.

    Args:
        on_wrong: called once for each commit that is skipped because it is damaged or belongs to a different fold.
    """

    def __init__(self, place: Place, identity: Identity, on_wrong: OnWrong = lambda _base, _why: None) -> None:
        self.place, self.identity = place, identity
        self._on_wrong = on_wrong
        self._told: set[tuple[str, str]] = set()
        self._known: dict[str, tuple[str, Commit]] = {}
        #: The files that the last call to `commits` found.
        self._listed: list[tuple[str, Listed, CommitFile]] = []

    # -- reading -------------------------------------------------------------------------------------------------

    def commits(self) -> list[Commit]:
        """Read the commits that have an intact manifest with the expected identity, in the order of `Manifest.rank`."""
        found: dict[str, Commit] = {}
        wrong: dict[str, CheckpointError] = {}
        self._listed = self._files()
        for name, listed, file in self._listed:
            if not self.place.is_manifest(file) or file.base in found:
                continue
            try:
                found[file.base] = self._commit(name, file, listed)
            except Unreadable as error:
                wrong[file.base] = Damaged(str(error))
            except FileNotFoundError:
                continue  # the commit was superseded and removed after it was listed
            except CheckpointError as error:
                wrong[file.base] = error
        for base, why in wrong.items():
            if base not in found:  # a mount may have two files of the same name
                self._wrong(base, why)
        return sorted(found.values(), key=lambda commit: commit.manifest.rank)

    def manifests(self) -> list[Manifest]:
        """The manifests of the commits that `commits` returns."""
        return [commit.manifest for commit in self.commits()]

    def newest_manifest(self) -> Manifest | None:
        """The intact manifest with the highest rank; None if there is none. Its checkpoint is not read."""
        return next(reversed(self.manifests()), None)

    def newest(self, *, at_most_epoch: int | None = None) -> Commit | None:
        """The last commit of `chain`; None if no commit is intact."""
        chain = self.chain(at_most_epoch=at_most_epoch)
        return chain[-1][0] if chain else None

    def chain(self, *, at_most_epoch: int | None = None, above: Manifest | None = None) -> list[tuple[Commit, bytes]]:
        """Find the intact commit with the most work, and the commit of its best epoch.

        A commit counts as intact only if the commit of its best epoch is intact too, because that epoch gives the
        fold's result. Commits that are not intact are skipped and reported.

        Args:
            at_most_epoch: consider only commits up to this epoch.
            above: consider only commits with a higher rank than this commit.

        Returns:
            Pairs of a commit and the bytes of its checkpoint: first the commit of the best epoch, then the commit with
            the most work. If the commit with the most work is also that of the best epoch, there is only one pair. If
            no commit is intact, the list is empty.
        """
        found = self.commits()
        for commit in reversed(found):
            if above is not None and commit.manifest.rank <= above.rank:
                break
            if at_most_epoch is not None and commit.manifest.epoch > at_most_epoch:
                continue
            try:
                return [(needed, self.checkpoint(needed)) for needed in self._chain_to(commit, found)]
            except Damaged as error:
                self._wrong(commit.base, error)
        return []

    def _chain_to(self, commit: Commit, among: list[Commit]) -> list[Commit]:
        best, own = commit.manifest.needed_stems
        if best == own:
            return [commit]
        for candidate in among:
            if candidate.manifest.stem == best and commit.manifest.continues(candidate.manifest):
                return [candidate, commit]
        raise Damaged(f"The best epoch of {commit.base} is missing: {best} is not in {self.place.name}.")

    def bases(self) -> list[str]:
        """The names of all manifests, including damaged manifests, without the suffix."""
        return list(dict.fromkeys(file.base for _, _, file in self._files() if self.place.is_manifest(file)))

    def checkpoint(self, commit: Commit) -> bytes:
        """Read the bytes of a commit's checkpoint.

        Raises:
            Damaged: if the bytes are missing or do not match the manifest.
            OSError, StoreError: if the folder, mount or store fails, although the checkpoint may be intact.
        """
        manifest, path = commit.manifest, self.place.checkpoint(commit)
        return read_described(
            self.place.blobs,
            self._copies(path),
            size=manifest.size,
            sha256=manifest.sha256,
            what=f"its checkpoint {self.place.blobs.url}/{path}",
        )

    def _commit(self, name: str, file: CommitFile, listed: Listed) -> Commit:
        path = self.place.path(name)
        tag, known = self._known.get(path, ("", None))
        # A file whose name contains a hash cannot have changed. A file whose name contains no hash is unchanged if its
        # tag is the same.
        if known is not None and (file.digits or (tag and tag == listed.tag)):
            return known
        source = f"{self.place.blobs.url}/{path}"
        content = self.place.blobs.read(path, at_most=LARGEST_MANIFEST)
        if not hashlib.sha256(content).hexdigest().startswith(file.digits):
            raise Damaged(f"{source} is cut off or damaged: its content does not match its name.")
        commit = Commit(file.base, manifest_named(file.stem, content, source=source, identity=self.identity), content)
        self._known[path] = (listed.tag, commit)
        return commit

    def _files(self) -> list[tuple[str, Listed, CommitFile]]:
        listed = self.place.blobs.listed(self.place.folder)
        return [(name, one, file) for name, one in listed.items() if (file := commit_file(name)) is not None]

    def _copies(self, path: str) -> list[str]:
        """The paths under which a file may be stored. A mount renames a second file to ``name (1)``."""
        if not self.place.has_hashed_manifests:
            return [path]
        return [self.place.path(name) for name, _, file in self._files() if self.place.path(file.name) == path]

    def _wrong(self, base: str, error: CheckpointError) -> None:
        if (base, str(error)) not in self._told:
            self._told.add((base, str(error)))
            self._on_wrong(base, str(error))

    # -- copies --------------------------------------------------------------------------------------------------

    def put(self, commit: Commit, checkpoint: bytes) -> None:
        """Copy a commit from a different location, and write the manifest last.

        Write the files even if they already exist.
        """
        self.put_checkpoint(commit, checkpoint)
        self.place.blobs.put(self.place.manifest(commit), commit.content)

    def remove(self, commit: Commit) -> None:
        """Remove a commit, the manifest first, so that no manifest remains without its checkpoint."""
        for path in (self.place.manifest(commit), self.place.checkpoint(commit)):
            for copy in self._copies(path):
                self.place.blobs.remove(copy)
                self._known.pop(copy, None)

    def clear(self) -> None:
        """Remove the files of all commits, including damaged files. Manifests are removed first."""
        for name, _, _ in sorted(self._files(), key=lambda one: one[2].suffix):
            self.place.blobs.remove(self.place.path(name))
        self._known.clear()

    def rename(self, stem: str, renamed: Callable[[str], str]) -> bool:
        """Rename the files of a commit that `commits` has listed. Return False if the manifest is gone.

        Args:
            renamed: returns the new name of a file. It may read the file, and may raise FileNotFoundError.
        """
        if not self._move(file_name(stem, MANIFEST), renamed):
            return False
        for name, _, file in self._listed:
            if file.stem == stem and self.place.is_checkpoint(file):
                self._move(name, renamed)
        return True

    def _move(self, name: str, renamed: Callable[[str], str]) -> bool:
        try:
            return self.place.blobs.move(self.place.path(name), self.place.path(renamed(name)))
        except FileNotFoundError:
            return False  # the fold's session has just replaced or removed the commit

    def put_checkpoint(self, commit: Commit, checkpoint: bytes) -> None:
        """Write a copy of a commit's checkpoint, before the copy of its manifest."""
        self.place.blobs.put(self.place.checkpoint(commit), checkpoint)
