"""The heartbeat thread, which renews the session and its lease while the worker trains."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any, Self

from mbqueue.clock import Clock
from mbqueue.errors import LeaseLost, QueueError, QueueReplaced
from mbqueue.queue.jobs import Lease
from mbqueue.queue.store import Queue

#: Heartbeats per lease period. A few heartbeats can fail before the lease expires.
BEATS_PER_LEASE = 4


class Heartbeat:
    """Renews the session and its lease, and reports the job's progress to the queue.

    A heartbeat that fails (for example because the database is busy) does no harm. The next heartbeat tries again, and
    the fence checks everything that the worker publishes. `withdrawn` is set only if the lease is known to be lost, the
    queue was replaced or the job was paused.
    """

    def __init__(
        self, queue: Queue, session: str, *, lease_seconds: float, clock: Clock, on_trouble: Callable[[str], None]
    ) -> None:
        self._queue = queue
        self._session = session
        self._lease_seconds = lease_seconds
        self._clock = clock
        self._on_trouble = on_trouble
        self._lock = threading.Lock()
        self._lease: Lease | None = None
        self._progress: dict[str, Any] | None = None
        self._rate: float | None = None
        self._held_since = 0.0
        self._seconds_before = 0.0
        self._withdrawn: str | None = None
        self._beaten_at = clock.now()
        self._reaps_from = self._beaten_at
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run, name="mbqueue-heartbeat", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_exception: object) -> None:
        self._over.set()
        self._thread.join()

    @property
    def withdrawn(self) -> str | None:
        """Why the session must give up its current job, for example "paused"; None if it may keep the job."""
        return self._withdrawn

    def may_reap(self) -> bool:
        """Whether this session may take over expired leases.

        If this session has been silent for longer than a lease (asleep, offline, or after a clock change), other
        sessions may have been silent too. After a long silence, a session waits for one lease length before it takes
        over leases, so that other sessions can renew theirs.
        """
        now = self._clock.now()
        with self._lock:
            if not 0 <= now - self._beaten_at <= self._lease_seconds:
                self._reaps_from = now + self._lease_seconds
            return now >= self._reaps_from

    def hold(self, lease: Lease) -> None:
        """Start renewing ``lease``."""
        with self._lock:
            self._lease, self._progress, self._withdrawn = lease, None, None
            self._held_since = self._clock.monotonic()
            self._seconds_before = float((lease.job.progress or {}).get("seconds", 0.0))

    @property
    def seconds(self) -> float:
        """Seconds of work on the current job, including the work of earlier sessions."""
        return self._seconds_before + self._clock.monotonic() - self._held_since

    def let_go(self) -> None:
        """Stop renewing the lease."""
        with self._lock:
            self._lease, self._progress = None, None

    def show(self, progress: dict[str, Any], structures_per_second: float | None = None) -> None:
        """Set the progress of the current job, which the next heartbeat reports to the queue."""
        with self._lock:
            self._progress = {**progress, "seconds": self.seconds}
            self._rate = structures_per_second or self._rate

    def beat(self) -> None:
        """Renew the session and its lease once."""
        with self._lock:
            lease, progress, rate = self._lease, self._progress, self._rate
        now = self._clock.now()
        try:
            self._queue.heartbeat(self._session, now=now, alive_seconds=self._lease_seconds, structures_per_second=rate)
            if lease is not None:
                renewed = self._queue.renew(lease, now=now, lease_seconds=self._lease_seconds, progress=progress)
                if renewed.job.paused:
                    self._withdraw(lease, "paused")
            may_reap = self.may_reap()  # read the clock again: the renewal may have waited for the server
            with self._lock:
                self._beaten_at = self._clock.now()
            if may_reap:
                # Release expired leases here too, because a session that trains epoch after epoch does not look for
                # other jobs.
                self._queue.reap_expired(by=self._session, now=now)
        except LeaseLost as error:
            assert lease is not None
            self._withdraw(lease, str(error))
        except QueueReplaced as error:
            if lease is not None:
                self._withdraw(lease, str(error))
        except QueueError as error:
            self._on_trouble(f"The heartbeat could not be written: {error}")

    def _withdraw(self, lease: Lease, why: str) -> None:
        with self._lock:
            if self._lease is lease:
                self._withdrawn = why

    def _run(self) -> None:
        while not self._over.wait(self._lease_seconds / BEATS_PER_LEASE):
            self.beat()
