"""Copy an experiment's crystals to shared storage during training. This module does not import torch.

Copying a hundred megabytes to a drive can take minutes, so training continues during the copy. A session that is asked
to stop or runs out of time abandons the copy and removes the partial file. The next session that trains on the same
crystals restarts the copy.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Self

from filelock import FileLock, Timeout

from mbqueue.drive.crystals import SharedCrystals, publish_crystals
from mbqueue.drive.publish_times import NoTime, WriteTime
from mbqueue.project import ProjectFolder
from mbqueue.storage.objects import ObjectStore

#: How long a session waits at its end for unfinished copies of crystals.
END_SECONDS = 60.0
#: After a request to stop, a session waits this long for the current write, which may hang on a mount.
STOP_SECONDS = 2.0
_LOOK_SECONDS = 0.1


class CrystalCopies:
    """Copies one session's crystals for other machines. Call `keep` inside the ``with`` block of this object.

    Args:
        spare: returns the seconds left for copying.
        note: called from a different thread with a sentence if a file was not copied.
    """

    def __init__(
        self,
        project: ProjectFolder,
        *,
        should_stop: Callable[[], bool],
        spare: Callable[[], float],
        note: Callable[[str], None],
    ) -> None:
        self._project, self._should_stop, self._spare, self._note = project, should_stop, spare, note
        self._threads: dict[str, threading.Thread] = {}
        self._over = threading.Event()
        self._gave_up = False

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, _error: BaseException | None, _trace: TracebackType | None
    ) -> None:
        if kind is not None:
            self._over.set()
        self._wait(min(END_SECONDS, max(0.0, self._spare())), self._should_end)
        self._over.set()
        self._wait(STOP_SECONDS, lambda: False)

    def keep(self, shared: SharedCrystals, file: Path, dataset_hash: str) -> None:
        """Start copying a file of crystals to shared storage, unless it is already there."""
        if dataset_hash in self._threads:
            return
        if isinstance(shared.blobs, ObjectStore):
            # The session uses the last `put` to estimate how long a save takes. Crystals are large and would distort
            # the estimate, so upload them through a second `ObjectStore`.
            shared = replace(shared, blobs=replace(shared.blobs))
        thread = threading.Thread(
            target=self._keep, args=(shared, file, dataset_hash), name="mbqueue-crystals", daemon=True
        )
        self._threads[dataset_hash] = thread
        thread.start()

    def settled(self, should_stop: Callable[[], bool]) -> bool:
        """Wait until every copy is finished or has failed; return False if the session was asked to stop first."""
        return self._wait(float("inf"), should_stop) and not self._gave_up

    def _should_end(self) -> bool:
        return self._over.is_set() or self._should_stop()

    def _wait(self, seconds: float, is_enough: Callable[[], bool]) -> bool:
        end = time.monotonic() + seconds
        for thread in self._threads.values():
            while thread.is_alive():
                if is_enough() or time.monotonic() >= end:
                    return False
                thread.join(_LOOK_SECONDS)
        return True

    def _keep(self, shared: SharedCrystals, file: Path, dataset_hash: str) -> None:
        write_time, before = WriteTime(), (0, 0.0)

        def go_on(left: int) -> None:
            nonlocal before
            if self._should_end():
                raise NoTime("the session ends")
            now = time.monotonic()
            if before[0]:
                write_time.learn(before[0] - left, now - before[1])
            write_time.require(left, self._spare())
            before = left, now

        lock = FileLock(self._project.crystals_lock)
        try:
            while not lock.is_locked:
                try:
                    lock.acquire(timeout=1.0)  # another session on this machine may be copying the same crystals
                except Timeout:
                    if self._should_end():
                        raise NoTime("the session ends") from None
            try:
                publish_crystals(shared, file, dataset_hash, self._note, before_piece=go_on)
            finally:
                lock.release()
        except NoTime as error:
            self._gave_up = True
            self._note(f"The crystals were not copied to {shared.name} ({error}); the next session will try again.")
        except OSError as error:
            self._note(f"The crystals were not copied to {shared.name}: {error}")
