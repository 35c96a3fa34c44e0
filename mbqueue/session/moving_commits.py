"""Move commits to the location in the project's settings, and record that location in the queue.

This module does not import torch.

The queue is updated last, after everything is copied. So you can repeat an interrupted move: it skips everything that
is already copied.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass

from mbqueue.buckets import MARKER
from mbqueue.clock import Clock
from mbqueue.errors import ResultsError, StoreError, UsageError
from mbqueue.project import ProjectFolder
from mbqueue.queue.commits_place import CommitsPlace
from mbqueue.queue.store import Queue
from mbqueue.session.commits_binding import (
    folder_place,
    lacking,
    local_epochs,
    require_store,
    send_missing,
    store_place,
)
from mbqueue.session.shared_commits import fetch_commits, finished_epochs
from mbqueue.session.shared_results import fetch_results, send_local_results
from mbqueue.storage.objects import ObjectStore, store_of


@dataclass(frozen=True, kw_only=True)
class Moved:
    """The result of moving the commits.

    Attributes:
        source: the location of the commits before the move, as text; empty if the queue had recorded none.
        target: the location of the commits after the move, as text.
        copied: number of objects copied from one store to the other.
        lost: epochs that are lost and will be trained again, as text; empty if no epochs are lost.
    """

    source: str
    target: str
    copied: int
    lost: str


def move_commits(
    project: ProjectFolder, queue: Queue, *, lost: bool, note: Callable[[str], None], clock: Clock
) -> Moved:
    """Copy all commits to the project's store, or to its folder if it has no store; then update the queue.

    Args:
        lost: continue even if finished epochs cannot be found; sessions then train these epochs again.

    Raises:
        StoreError: if a finished epoch would be lost, or a store is not responding.
        QueueError: if a session is using the queue.
    """
    queue.reap_dead(by="move-commits", now=clock.now())
    before = queue.commits_place()
    store = store_of(project.topology)
    is_new = store is not None and store.check()
    target = folder_place(project) if store is None else store_place(store)
    copied = 0
    if before is not None and before.id != target.id:
        copied = _bring(project, queue, before, store, note=note)
    if store is None:
        missing = lacking(queue, local_epochs(project))
    else:
        missing = send_missing(project, queue, store, finished_epochs(store), note=note)
        send_local_results(project, queue, store)
    if missing and not lost:
        if is_new and store is not None and store.names("") == [MARKER]:
            store.forget()
        raise StoreError(
            f"{target.address} lacks {missing}, and these checkpoints could not be found elsewhere. Make "
            f"{before.address if before else 'their location'} reachable from here, or copy the checkpoints; then try "
            "again. To train those epochs again: mbqueue move-commits --lost"
        )
    queue.bind_commits(target, instead_of=before, by="move-commits", now=clock.now())
    return Moved(source=before.shown if before else "", target=target.shown, copied=copied, lost=missing)


def _bring(
    project: ProjectFolder,
    queue: Queue,
    source: CommitsPlace,
    target: ObjectStore | None,
    *,
    note: Callable[[str], None],
) -> int:
    """Copy everything from the previous store; return how many objects were copied to ``target``."""
    if source.kind != "store":
        return 0
    try:
        store = ObjectStore.open(source.address)
        require_store(source, store)
    except (StoreError, UsageError) as error:
        note(f"{source.address} cannot be read, so nothing is copied from there: {error}")
        return 0
    if target is not None:
        return sum(_copy(store, target))
    fetch_commits(project, store, note=note)
    for experiment in queue.experiments():
        with suppress(ResultsError):  # sessions recreate missing results later
            jobs = queue.jobs(experiment=experiment.name)
            fetch_results(store, experiment, jobs, project.working_results(experiment.results_dir))
    return 0


def _copy(source: ObjectStore, target: ObjectStore) -> Iterator[bool]:
    """Copy every missing object to ``target``; yield True for each copied object.

    JSON objects are copied last, because they refer to other objects. The names of all other objects contain the
    content's hash, so objects of the same name and size are equal.
    """
    there = target.listed("")
    names = {name: listed.size for name, listed in source.listed("").items() if name != MARKER}
    for name in sorted(names, key=lambda name: (name.endswith(".json"), name)):
        is_named_by_hash = not name.endswith(".json")
        is_there = name in there and there[name].size == names[name]
        if is_there and is_named_by_hash:
            continue
        content = source.read(name, at_most=names[name])
        if not is_named_by_hash:
            if not target.create_patiently(name, content):
                raise StoreError(
                    f"{target.url}/{name} exists already and differs from {name} in {source.url}. Choose a prefix "
                    "that has no objects yet."
                )
        else:
            target.put(name, content)
        if not is_there:
            yield True
