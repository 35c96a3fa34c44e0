"""Track whether the object store answers: record it for `mbqueue status`, report it and wait. Imports no torch."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

from mbqueue import files
from mbqueue.clock import Clock, backoff, format_duration
from mbqueue.drive.livestate import store_trouble
from mbqueue.errors import StoreAway, StoreError
from mbqueue.project import ProjectFolder

#: Waits between two tries of a commit that the store rejected: doubled each time, up to the longest.
PAUSE_SECONDS = 1.0
LONGEST_PAUSE_SECONDS = 60.0
#: How long a session waits for the store before it ends: a paid machine must not wait forever.
PATIENCE_SECONDS = 3600.0
#: How long other sessions of this machine trust one session's record that the store does not answer.
HEARSAY_SECONDS = 60.0


class StoreWatch:
    """What one session knows about the store. `mbqueue.storage.objects` reports to it, from any thread.

    Args:
        note: called with a sentence when the store stops answering and when it answers again.
    """

    def __init__(self, project: ProjectFolder, *, clock: Clock, note: Callable[[str], None]) -> None:
        self._project, self._clock, self._note = project, clock, note
        self._lock = threading.Lock()
        # A session that died while the store did not answer leaves a record; the first answer clears it.
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
        """Why commits do not reach the store right now; None if they do."""
        return self._why

    def trouble(self, why: str) -> None:
        """Record that the store did not answer, or refused a request."""
        with self._lock:
            first, self._why = self._away_since is None, why
            if first:
                self._away_since = self._clock.monotonic()
                self._write({"why": why, "since": self._clock.now()})
        if first:
            self._note(f"DEGRADED: {why} Training continues here as far as it can; its commits wait.")

    def answered(self) -> None:
        """Record that the store answered."""
        self._answered_at = self._clock.now()
        if self._why is None:
            return
        with self._lock:
            was_away, self._why, self._away_since, self._tries = self._away_since is not None, None, None, 0
            self._write({})
        if was_away:
            self._note("The object store answers again.")

    def heard(self) -> str | None:
        """Why the store does not answer, if another session on this machine found that after our last answer.

        The reason comes from the file that `mbqueue status` reads. An old record is ignored, because its session may
        have died.
        """
        trouble = store_trouble(self._project)
        is_news = self._answered_at < trouble.get("since", 0.0) <= self._clock.now()
        is_fresh = trouble.get("since", 0.0) > self._clock.now() - HEARSAY_SECONDS
        return trouble.get("why") if is_news and is_fresh else None

    def pause(self, error: StoreError) -> float:
        """The wait before the next attempt, in seconds.

        Raises:
            StoreError: if the session has waited long enough; the message says what to do.
        """
        with self._lock:
            away = 0.0 if self._away_since is None else self._clock.monotonic() - self._away_since
            self._tries += 1
            tries = self._tries
        if away > PATIENCE_SECONDS:
            raise StoreAway(
                f"{error} The session waited {format_duration(away)}. What is committed is safe in the store; the "
                "steps after that are not saved. Once mbqueue doctor reaches the store, resume with: mbqueue work"
            ) from error
        return backoff(tries, first=PAUSE_SECONDS, longest=LONGEST_PAUSE_SECONDS)

    def _write(self, content: dict[str, Any]) -> None:
        try:
            files.write_json(self._project.store_file, content)
        except OSError as error:
            self._note(f"{self._project.store_file} cannot be written: {error}")
