"""Advance the searches in the queue between a session's jobs (`mbqueue.search.steps`)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from datetime import datetime
from typing import Any

from mbqueue.drive.asked_for import keep_wanted
from mbqueue.errors import SearchUnavailable, SpecError, StoreError
from mbqueue.experiment import Spec
from mbqueue.search import steps
from mbqueue.session.session import Session
from mbqueue.session.shared_commits import remove_released

#: How often to look for pruned trials whose checkpoints can be removed.
RELEASE_SECONDS = 600.0


def begin_trials(session: Session) -> None:
    """Enqueue the next trial of each search that wants one. If no trial can begin, the session still runs other jobs.

    Sessions on one drive with different databases could give the same number to trials with different settings. To
    avoid this, only the session that started first begins trials, and other sessions find the trials in its snapshots.
    """
    now = session.clock.now()
    earlier = session.publisher is not None and any(one.session.id < session.id for one in session.publisher.others)
    session.is_search_left_to_others = earlier and steps.wants_trial(session.queue, now=now)
    if earlier:
        return
    day = datetime.fromtimestamp(now).astimezone().strftime("%Y-%m-%d")
    try:
        begun = steps.begin_trials(
            session.queue, results_dir=lambda name: session.project.results_folder(day, name), now=now, by=session.id
        )
    except (SearchUnavailable, SpecError) as error:
        session.note_once(f"No trial can begin: {error}")
        session.is_search_stuck = True
        return
    session.is_search_stuck = False
    for name in begun:
        _keep_wanted(session, name)


def release_pruned(session: Session) -> None:
    """Every `RELEASE_SECONDS`, remove the checkpoints of trials that were pruned at least `pruned_hours` ago."""
    now = session.clock.monotonic()
    if session.released_at is not None and now - session.released_at < RELEASE_SECONDS:
        return
    session.released_at = now
    after = session.project.settings.pruned_hours * 3600
    for name in steps.release_pruned(session.queue, after_seconds=after, now=session.clock.now(), by=session.id):
        _keep_wanted(session, name)
    released = [trial for trial in session.queue.trials() if trial.is_released]
    with suppress(StoreError):  # the next call tries again
        remove_released(session.project, released, session.store)


def _keep_wanted(session: Session, name: str) -> None:
    try:
        keep_wanted(session.project, session.queue, name)
    except OSError as error:
        session.report.note(
            f"{session.project.wanted_dir} cannot be written ({error}), so mbqueue recover would not restore {name}."
        )


def verdict(session: Session, spec: Spec, fold: int, history: Sequence[Mapping[str, Any]]) -> str | None:
    """Decide whether to prune a trial after the last epoch of ``history``; return the reason, or None to continue."""
    try:
        return steps.verdict(session.queue, spec, fold=fold, history=history, now=session.clock.now())
    except SearchUnavailable as error:
        session.note_once(f"{error} This session prunes no trials.")
        return None
