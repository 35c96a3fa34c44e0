"""Read and write a fold's commits, whose checkpoints contain training states."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from mbqueue.errors import CheckpointError, StoreError
from mbqueue.storage.commits import OnWrong
from mbqueue.storage.manifest import Commit, Damaged, Identity
from mbqueue.storage.own_commits import OwnCommits
from mbqueue.storage.places import Place
from mbqueue.train.state import deserialise


class Checkpoints(OwnCommits):
    """The commits of a fold that is being trained.

    Args:
        place, identity, on_wrong, own: the same as for `OwnCommits`.
        hold_on: called when an object store rejects a commit; waits, or raises the given error if no time is left.
    """

    def __init__(
        self,
        place: Place,
        identity: Identity,
        on_wrong: OnWrong = lambda _base, _why: None,
        *,
        hold_on: Callable[[StoreError], None] | None = None,
        **own: Any,
    ) -> None:
        super().__init__(place, identity, on_wrong, **own)
        self.hold_on = hold_on or _raise
        #: The hash of each checkpoint that was loaded → the spec, dataset, fold and work that the checkpoint contains.
        self._contained: dict[str, tuple[object, ...]] = {}

    def checkpoint(self, commit: Commit) -> bytes:
        """Read a checkpoint, and check that its bytes are the training state that the manifest describes."""
        content, manifest = super().checkpoint(commit), commit.manifest
        path = f"{self.place.blobs.url}/{self.place.checkpoint(commit)}"
        # The bytes have the manifest's hash, so bytes that were loaded before need not be loaded again.
        if manifest.sha256 not in self._contained:
            try:
                state = deserialise(content)
            except CheckpointError as error:
                raise Damaged(f"{path}: {error}") from error
            contained = (state.spec_hash, state.dataset_hash, state.fold, state.epoch, state.complete, state.step)
            self._contained[manifest.sha256] = contained
        told = (manifest.spec_hash, manifest.dataset_hash, manifest.fold, *manifest.work)
        if self._contained[manifest.sha256] != told:
            raise Damaged(f"{path} and its manifest belong to different commits.")
        return content


def _raise(error: StoreError) -> None:
    raise error
