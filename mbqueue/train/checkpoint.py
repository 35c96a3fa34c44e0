"""Commits whose checkpoints are training states."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from mbqueue.errors import CheckpointError, StoreError
from mbqueue.storage.commits import OnWrong, OwnCommits
from mbqueue.storage.manifest import Damaged, Manifest
from mbqueue.storage.places import Place
from mbqueue.train.state import TrainState, deserialise


class Checkpoints(OwnCommits):
    """The commits of one fold that is trained.

    Args:
        place, on_wrong, enqueued: as of `OwnCommits`.
        hold_on: called when the place, an object store, does not take a commit: waits, or raises the error it is
            given when there is no time to.
    """

    def __init__(
        self,
        place: Place,
        on_wrong: OnWrong = lambda _stem, _why: None,
        *,
        enqueued: Mapping[str, Any] | None = None,
        hold_on: Callable[[StoreError], None] | None = None,
    ) -> None:
        super().__init__(place, on_wrong, enqueued=enqueued)
        self.hold_on = hold_on or _raise

    def checkpoint(self, manifest: Manifest) -> bytes:
        """As `Commits.checkpoint`; they are also those of the training state that the manifest describes."""
        content = super().checkpoint(manifest)
        self._state(manifest, content)
        return content

    def load(self, manifest: Manifest) -> TrainState:
        """The state of a commit.

        Raises:
            Damaged: when the file is missing, or its size, hash or content is not as the manifest says.
            OSError: when the file system fails, which says nothing about the file.
        """
        return self._state(manifest, super().checkpoint(manifest))

    def _state(self, manifest: Manifest, content: bytes) -> TrainState:
        path = f"{self.where}/{manifest.stem}.pt"
        try:
            state = deserialise(content)
        except CheckpointError as error:
            raise Damaged(f"{path}: {error}") from error
        told = (state.spec_hash, state.dataset_hash, state.fold, state.epoch, state.complete, state.step)
        if told != (manifest.spec_hash, manifest.dataset_hash, manifest.fold, *manifest.work):
            raise Damaged(f"{path} and its manifest are of different commits.")
        return state


def _raise(error: StoreError) -> None:
    raise error
