"""What a session does for the searches of its queue, between its jobs (`mbqueue.search.steps`)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from datetime import datetime
from typing import Any

from mbqueue.drive.asked_for import keep_wanted
from mbqueue.errors import SearchUnavailable, SpecError, StoreError
from mbqueue.experiment import Spec
from mbqueue.search import steps
from mbqueue.session.shared_commits import remove_released
from mbqueue.session.workplace import Workplace

#: How often to look for trials that were pruned long enough ago.
RELEASE_SECONDS = 600.0


def begin_trials(place: Workplace) -> None:
    """Enqueue the next trial of each search that wants one. A failure is reported, and other jobs run.

    Of sessions with other databases on one drive, only the one that started first does it. Otherwise two could give one
    number to different settings. The others learn of its trials from its snapshots.
    """
    now = place.clock.now()
    earlier = place.publisher is not None and any(one.session.id < place.session for one in place.publisher.others)
    place.is_search_left_to_others = earlier and steps.wants_trial(place.queue, now=now)
    if earlier:
        return
    day = datetime.fromtimestamp(now).astimezone().strftime("%Y-%m-%d")
    try:
        begun = steps.begin_trials(
            place.queue, results_dir=lambda name: place.project.results_folder(day, name), now=now, by=place.session
        )
    except (SearchUnavailable, SpecError) as error:
        place.note_once(f"No trial can begin: {error}")
        place.is_search_stuck = True
        return
    place.is_search_stuck = False
    for name in begun:
        _keep_wanted(place, name)


def release_pruned(place: Workplace) -> None:
    """Remove the checkpoints of trials that were pruned `pruned_hours` ago, at intervals, if the store answers."""
    now = place.clock.monotonic()
    if place.released_at is not None and now - place.released_at < RELEASE_SECONDS:
        return
    place.released_at = now
    after = place.project.settings.pruned_hours * 3600
    for name in steps.release_pruned(place.queue, after_seconds=after, now=place.clock.now(), by=place.session):
        _keep_wanted(place, name)
    released = [trial for trial in place.queue.trials() if trial.is_released]
    with suppress(StoreError):  # the next time
        remove_released(place.project, released, place.store)


def _keep_wanted(place: Workplace, name: str) -> None:
    try:
        keep_wanted(place.project, place.queue, name)
    except OSError as error:
        place.report.note(f"{place.project.wanted_dir} cannot be written ({error}); recover would not know {name}.")


def verdict(place: Workplace, spec: Spec, fold: int, history: Sequence[Mapping[str, Any]]) -> str | None:
    """Why to prune a trial after the last epoch of a history; None to keep training it, or if it is no trial."""
    try:
        return steps.verdict(place.queue, spec, fold=fold, history=history, now=place.clock.now())
    except SearchUnavailable as error:
        place.note_once(f"{error} Until then this session prunes no trial.")
        return None
