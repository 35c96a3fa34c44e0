"""Track whether the object store answers, report outages, and plan the next attempt.

This module does not import torch.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

from mbqueue import files
from mbqueue.clock import Clock, backoff, format_duration
from mbqueue.drive.livestate import store_trouble
from mbqueue.errors import StoreAway, StoreError
from mbqueue.project import ProjectFolder
from mbqueue.storage.objects import Watch

#: The initial and maximum pause between attempts to commit while the store is failing. The pause doubles after each
#: failure.
PAUSE_SECONDS = 1.0
LONGEST_PAUSE_SECONDS = 60.0
#: How long a session waits for the store before it ends. The machine may cost money, so do not wait forever.
PATIENCE_SECONDS = 3600.0
#: How long a session trusts the record of an outage that another session on this machine wrote.
HEARSAY_SECONDS = 60.0


class StoreWatch(Watch):
    """Tracks outages of the store for one session.

    Args:
        note: called with a sentence when the store stops answering and when it answers again.
    """

    def __init__(self, project: ProjectFolder, *, clock: Clock, note: Callable[[str], None]) -> None:
        self._project, self._clock, self._note = project, clock, note
        self._lock = threading.Lock()
        # A session that died during an outage leaves its record of the outage behind. The store's next answer clears
        # the record.
        self._why: str | None = store_trouble(project).get("why")
        self._away_since: float | None = None
        self._answered_at = 0.0
        self._tries = 0

    @property
    def is_first_try(self) -> bool:
        """Whether this is the first `pause` since the store stopped answering."""
        return self._tries == 1

    @property
    def why(self) -> str | None:
        """The reason why commits are not reaching the store; None if the store is responding."""
        return self._why

    def trouble(self, why: str) -> None:
        """Record that the store did not answer, or refused a request."""
        with self._lock:
            first, self._why = self._away_since is None, why
            if first:
                self._away_since = self._clock.monotonic()
                self._write({"why": why, "since": self._clock.now()})
        if first:
            self._note(f"DEGRADED: {why} Training continues for now, but new commits wait until the store responds.")

    def answered(self) -> None:
        self._answered_at = self._clock.now()
        if self._why is None:
            return
        with self._lock:
            was_away, self._why, self._away_since, self._tries = self._away_since is not None, None, None, 0
            self._write({})
        if was_away:
            self._note("The object store is responding again.")

    def heard(self) -> str | None:
        """Why the store is not answering, according to another session on this machine; None if no session says so.

        Outages are recorded in the file that `mbqueue status` reads. A record is ignored if it is older than the
        store's last answer to this session, or so old that the session that wrote it may have died.
        """
        trouble = store_trouble(self._project)
        is_news = self._answered_at < trouble.get("since", 0.0) <= self._clock.now()
        is_fresh = trouble.get("since", 0.0) > self._clock.now() - HEARSAY_SECONDS
        return trouble.get("why") if is_news and is_fresh else None

    def pause(self, error: StoreError) -> float:
        """Return the seconds to wait before the next attempt.

        Raises:
            StoreError: if the session has waited for `PATIENCE_SECONDS`; the message explains what to do.
        """
        with self._lock:
            away = 0.0 if self._away_since is None else self._clock.monotonic() - self._away_since
            self._tries += 1
            tries = self._tries
        if away > PATIENCE_SECONDS:
            raise StoreAway(
                f"{error} The session waited {format_duration(away)}. Committed work is safe in the store, but "
                "later steps were not saved. Once mbqueue doctor reaches the store, resume with: mbqueue work"
            ) from error
        return backoff(tries, first=PAUSE_SECONDS, longest=LONGEST_PAUSE_SECONDS)

    def _write(self, content: dict[str, Any]) -> None:
        try:
            files.write_json(self._project.store_file, content)
        except OSError as error:
            self._note(f"{self._project.store_file} cannot be written: {error}")
