"""Advance the searches in the queue between a session's jobs (`mbqueue.search.steps`)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any

from mbqueue.clock import local_day
from mbqueue.drive.notes import keep_note
from mbqueue.errors import SearchUnavailable, SpecError, StoreError
from mbqueue.experiment import Spec
from mbqueue.search import steps
from mbqueue.session.session import Session
from mbqueue.session.shared_commits import remove_released

#: How often to look for pruned trials whose checkpoints can be removed.
RELEASE_SECONDS = 600.0


class Searching:
    """Advances the searches in a session's queue between the session's jobs.

    Attributes:
        is_stuck: whether a search needs another trial but cannot start it.
        is_left_to_others: whether a search needs another trial that a session on another machine must start.
    """

    def __init__(self, session: Session) -> None:
        self._session = session
        self.is_stuck = self.is_left_to_others = False
        #: When the session last looked for trials whose checkpoints can be removed, in monotonic seconds.
        self._released_at: float | None = None

    def advance(self) -> None:
        self._begin_trials()
        self._release_pruned()

    def _begin_trials(self) -> None:
        """Enqueue the next trial of each search that needs one; if no trial can start, the session runs other jobs.

        Sessions with different databases on one drive could give the same number to trials with different settings. So
        only the session that was started first enqueues new trials; the other sessions find the new trials in its
        snapshots.
        """
        session = self._session
        now = session.clock.now()
        earlier = session.publisher is not None and any(one.session.id < session.id for one in session.publisher.others)
        self.is_left_to_others = earlier and steps.wants_trial(session.queue, now=now)
        if earlier:
            return
        try:
            begun = steps.begin_trials(
                session.queue,
                results_dir=lambda name: session.project.results_folder(local_day(now), name),
                now=now,
                by=session.id,
            )
        except (SearchUnavailable, SpecError) as error:
            session.note_once(f"mbqueue cannot start another trial: {error}")
            self.is_stuck = True
            return
        self.is_stuck = False
        for name in begun:
            self._keep_note(name)

    def _release_pruned(self) -> None:
        """Every `RELEASE_SECONDS`, remove the checkpoints of trials that were pruned at least `pruned_hours` ago."""
        session = self._session
        now = session.clock.monotonic()
        if self._released_at is not None and now - self._released_at < RELEASE_SECONDS:
            return
        self._released_at = now
        after = session.project.settings.pruned_hours * 3600
        for name in steps.release_pruned(session.queue, after_seconds=after, now=session.clock.now(), by=session.id):
            self._keep_note(name)
        released = [trial for trial in session.queue.trials() if trial.is_released]
        with suppress(StoreError):  # the next call tries again
            remove_released(session.project, released, session.store)

    def _keep_note(self, name: str) -> None:
        session = self._session
        try:
            keep_note(session.project, session.queue, name)
        except OSError as error:
            session.report.note(
                f"{session.project.notes_dir} cannot be written ({error}), so mbqueue recover would not restore {name}."
            )


def verdict(session: Session, spec: Spec, fold: int, history: Sequence[Mapping[str, Any]]) -> str | None:
    """Decide whether to prune a trial after the last epoch of ``history``; return the reason, or None to continue."""
    try:
        return steps.verdict(session.queue, spec, fold=fold, history=history, now=session.clock.now())
    except SearchUnavailable as error:
        session.note_once(f"{error} This session does not prune trials.")
        return None
