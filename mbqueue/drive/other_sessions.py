"""Find sessions that are working on the same project with different databases, and leave their folds alone."""

from __future__ import annotations

from collections.abc import Callable

from mbqueue.clock import Clock
from mbqueue.drive.announcements import Announcement, Announcements
from mbqueue.drive.livestate import LiveState
from mbqueue.project import ProjectFolder
from mbqueue.queue.jobs import Job, State
from mbqueue.queue.store import Queue
from mbqueue.storage.mounted import Drive

#: Seconds between a session's announcements.
ANNOUNCE_SECONDS = 120.0


class OtherSessions:
    """Finds the live sessions that use other databases of the same project.

    Attributes:
        living: the live sessions that the last call of `meet` found.

    Args:
        note: called with a sentence for each new session.
    """

    def __init__(self, project: ProjectFolder, drive: Drive, *, clock: Clock, note: Callable[[str], None]) -> None:
        self._project, self._drive, self._clock, self._note = project, drive, clock, note
        self._announcements: Announcements | None = None
        self._announced_at: float | None = None
        self._announced_folds: set[tuple[str, int]] = set()
        self._first_numbers: dict[str, int] = {}
        self.living: list[Announcement] = []

    @property
    def active(self) -> list[Announcement]:
        """The live sessions that have written a new announcement since this session first saw them."""
        return [one for one in self.living if one.number > self._first_numbers[one.session.id]]

    def meet(self, queue: Queue, session: str, ended: str | None) -> None:
        """Announce the folds that a session is working on, or why it ended, and record the other sessions in the queue.

        Raises:
            OSError: if the mount fails.
        """
        now, mono = self._clock.now(), self._clock.monotonic()
        if self._announcements is None:
            database = LiveState.load(self._project.publishing_file).database
            self._announcements = Announcements(self._drive, session, database, clock=self._clock)
        row = queue.session(session)
        folds = {
            (job.experiment, job.fold)
            for job in queue.jobs()
            if job.fold is not None and session in (job.session, job.affinity) and not _is_done(job)
        }
        due = self._announced_at is None or mono - self._announced_at >= ANNOUNCE_SECONDS
        if due or folds != self._announced_folds or ended is not None:
            self._announcements.announce(row, folds, ended=ended)
            self._announced_at, self._announced_folds = mono, folds
        before = {one.session.id for one in self.living}
        others = self._announcements.others()
        for one in others:
            # If two sessions are working on one fold, the older session keeps the fold. Ids sort by start time.
            left = [fold for fold in one.folds if fold not in folds or one.session.id < session]
            queue.see_session(one.session, folds=left, now=now)
            self._first_numbers.setdefault(one.session.id, one.number)
            if one.session.id not in before:
                folds_told = ", ".join(f"{experiment} fold {fold}" for experiment, fold in one.folds) or "no fold yet"
                self._note(
                    f"Another session, {one.session.id} on {one.session.host} ({one.session.device}), is working on "
                    f"this project: {folds_told}. This session skips the folds that the other session trains."
                )
        self.living = others
        with LiveState.changing(self._project.publishing_file) as state:
            state.others = [
                {
                    "session": one.session.id,
                    "host": one.session.host,
                    "device": one.session.device,
                    "folds": [list(fold) for fold in one.folds],
                }
                for one in others
            ]


def _is_done(job: Job) -> bool:
    return job.state in {State.COMMITTED, State.SKIPPED, State.CANCELLED}
