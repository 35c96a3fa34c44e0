"""Save commits during training: a background thread stages a commit, and training publishes it between two steps."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from types import TracebackType
from typing import Any, Self

from mbqueue.errors import CheckpointError, StoreError
from mbqueue.storage.manifest import Manifest
from mbqueue.storage.own_commits import Staged
from mbqueue.train.checkpoint import Checkpoints
from mbqueue.train.state import TrainState, serialise

#: A function that publishes a staged commit in the transaction in which the queue checks the fence, or raises LeaseLost
#: if the lease is lost.
Save = Callable[[Staged], None]


class Saver:
    """Stages and publishes one fold's commits, one at a time.

    Use a `Saver` as a context manager. On exit, the `Saver` discards any commit that is staged but not published.
    """

    def __init__(self, checkpoints: Checkpoints, save: Save) -> None:
        self._checkpoints = checkpoints
        self._save = save
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="mbqueue-checkpoint")
        self._pending: Future[Staged] | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._drop_pending()
        self._thread.shutdown()

    @property
    def is_busy(self) -> bool:
        """Whether a commit is pending: being staged, or staged but not published yet."""
        return self._pending is not None

    def start(self, state: TrainState, fields: Mapping[str, Any]) -> None:
        """Stage a commit in the background. ``state`` must not share memory with the model being trained."""
        assert self._pending is None
        self._pending = self._thread.submit(lambda: self._checkpoints.stage(serialise(state), fields))

    def publish_if_ready(self) -> Manifest | None:
        """Publish the pending commit if its staging has finished; otherwise, return None immediately.

        If an object store isn't responding, the `Saver` drops the commit, and training continues until the next
        commit.

        Raises:
            LeaseLost: if the session lost its lease, in which case the commit is not published.
            OSError: if staging failed.
        """
        if self._pending is None or not self._pending.done():
            return None
        pending, self._pending = self._pending, None
        try:
            return self._publish(pending.result())
        except StoreError:  # the store has already reported the error
            return None

    def save_now(self, state: TrainState, fields: Mapping[str, Any]) -> Manifest:
        """Discard any pending commit, then stage and publish a new one before returning.

        If an object store isn't responding, the commit is retried for as long as `Checkpoints.hold_on` allows. Retries
        send the same bytes, so mbqueue detects that a commit arrived even if the store's reply was lost.

        Raises:
            StoreError: if the store is still not responding when `Checkpoints.hold_on` gives up.
        """
        self._drop_pending()
        content = serialise(state)
        while True:
            try:
                return self._publish(self._checkpoints.stage(content, fields))
            except StoreError as error:
                self._checkpoints.hold_on(error)

    def _publish(self, staged: Staged) -> Manifest:
        try:
            self._save(staged)
        finally:
            staged.discard()
        if not staged.is_published:
            raise CheckpointError(f"The queue accepted the commit {staged.manifest.stem}, but it was not published.")
        with suppress(StoreError):  # the next commit removes superseded files that are left
            self._checkpoints.prune()
        return staged.manifest

    def _drop_pending(self) -> None:
        if self._pending is not None:
            pending, self._pending = self._pending, None
            if pending.exception() is None:
                pending.result().discard()
