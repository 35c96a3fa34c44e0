"""Make every session use the commits at the location that the queue records. This module does not import torch.

Each location stores an id: an object store in its marker, a folder in ``commits.json`` next to the checkpoints. The
queue records the id of the location that the first session used (`mbqueue.queue.commits_place`). mbqueue refuses a
session with a different location, which would find no commits, train from the start and overwrite rows of the queue. A
SQLite queue without a store needs no check, because its commits are next to the queue's file.

A session may change the recorded location from a folder to a store or another folder if no commits can be lost. None
can be lost if no other session is running and the new location has every epoch that the queue counts as done. Any other
change of the location requires `mbqueue move-commits` (`mbqueue.session.moving_commits`).
"""

from __future__ import annotations

import json
import secrets
import socket
from collections.abc import Callable, Mapping

from mbqueue import files
from mbqueue.clock import Clock
from mbqueue.errors import QueueError, StoreError, counted
from mbqueue.project import ProjectFolder
from mbqueue.queue.commits_place import CommitsPlace
from mbqueue.queue.jobs import Kind, State
from mbqueue.queue.store import Queue
from mbqueue.session.shared_commits import epochs_of, finished_epochs, send_fold
from mbqueue.session.shared_results import send_local_results
from mbqueue.storage.objects import ObjectStore, store_of
from mbqueue.storage.places import manifests_below

FORMAT = 1
#: (experiment, fold) → the fold's last finished epoch.
Epochs = Mapping[tuple[str, int], int]
_HOW = "To move commits elsewhere: mbqueue move-commits --help"


def enter_place(
    project: ProjectFolder, queue: Queue, store: ObjectStore | None, *, note: Callable[[str], None], clock: Clock
) -> CommitsPlace | None:
    """Check that this session uses the recorded location of commits; if none is recorded, record this location.

    A new store also gets the commits that exist only on this machine.

    Returns:
        The recorded location, which `require_same` checks again once the session has started.

    Raises:
        StoreError: if the store is missing, denies access or ignores conditional puts; or if the queue records a
            different location.
        QueueError: if the queue records no location and epochs are missing from the folder; or if a new queue lacks
            epochs that the store has.
    """
    before = queue.commits_place()
    if store is None:
        return _enter_folder(project, queue, before, clock=clock)
    if before is not None and before.kind == "store":
        require_store(before, store)
        if store.check():  # the store was removed in the meantime, and `check` created a new one
            store.forget()
            require_store(before, store)
        _compare(project, queue, store, note=note)
        return before
    is_new = store.check()
    missing = _compare(project, queue, store, note=note)
    if missing:
        if is_new:
            store.forget()
        if before is not None:
            raise elsewhere(before, f"neither {store.url} nor this machine has all checkpoints of {missing}")
        raise StoreError(
            f"{store.url} {'is new' if is_new else 'is not known to the queue'}, and the queue has epochs whose "
            f"checkpoints are neither there nor on this machine: {missing}. Check the address. If another machine "
            f"has the checkpoints, start the first session there; it uploads the checkpoints to the store. {_HOW}"
        )
    send_local_results(project, queue, store)
    place = store_place(store)
    queue.reap_dead(by="work", now=clock.now())
    queue.bind_commits(place, instead_of=before, by="work", now=clock.now())
    return place


def require_same(queue: Queue, place: CommitsPlace | None) -> None:
    """Check that the commits were not moved while a session was starting.

    Raises:
        QueueError: if the queue now records a different location.
    """
    now = queue.commits_place()
    if (now and now.id) != (place and place.id):
        raise QueueError(
            f"The commits of this queue were moved to {now.shown if now else 'an unknown location'} while this session "
            "was starting. Start it again."
        )


def opened_store(project: ProjectFolder, queue: Queue) -> ObjectStore | None:
    """Open the project's store for reading; None if the project keeps commits and results in its folder.

    Raises:
        StoreError: if the queue records a different location for its commits.
    """
    place = queue.commits_place()
    store = store_of(project.topology)
    if place is not None and (place.kind == "store" or store is None):
        if store is not None:
            require_store(place, store)
        elif place.kind == "store":
            raise elsewhere(place, "this project has no store")
        elif queue.database.file is None and place.id != folder_id(project):
            raise elsewhere(place, f"this project uses a different folder, {project.live_dir}")
    return store


def require_store(place: CommitsPlace, store: ObjectStore) -> None:
    """Check that the queue's commits are in ``store``, without changing the store.

    Raises:
        StoreError: if ``store`` is a different store, or is not responding.
    """
    if store.is_the_one(place.id):
        return
    if store.url == place.address:
        raise StoreError(
            f"The commits of this queue are in {place.shown}, but there is now a different store, or none, at that "
            f"address. If the store is on a share, mount the share. If the store was deleted, restore it from a copy. "
            f"{_HOW}"
        )
    raise elsewhere(place, f"{store.url} is a different store, or nothing is mounted there")


def elsewhere(place: CommitsPlace, why: str) -> StoreError:
    """The error for a session whose commits are not at the location that the queue records."""
    if place.kind == "store":
        what = f'Set store = "{place.address}" in mbqueue.toml, or set MBQUEUE_STORE to this address.'
    else:
        what = (
            "Start sessions in that folder. Or set up a store (docs/how-to/many-machines.md) and start the first "
            "session in that folder."
        )
    return StoreError(f"The commits of this queue are in {place.shown}, but {why}. {what} {_HOW}")


def store_place(store: ObjectStore) -> CommitsPlace:
    """Return ``store`` as a `CommitsPlace`, for the queue to record; call `store.check` first."""
    return CommitsPlace(id=store.id, kind="store", address=store.url)


def folder_place(project: ProjectFolder) -> CommitsPlace:
    """Return the project's own folder as a `CommitsPlace`, for the queue to record.

    If the folder has no id, create an id.

    Raises:
        QueueError: if the file with the folder's id is damaged.
    """
    known = folder_id(project)
    if not known:
        content = {"format": FORMAT, "made_by": "mbqueue", "id": secrets.token_hex(8)}
        # If two machines share the folder, both use the id that the first machine writes.
        files.create_bytes(project.commits_file, files.json_bytes(content))
        known = folder_id(project)
    assert known, "the file was just written"
    return CommitsPlace(id=known, kind="folder", address=f"{socket.gethostname()}:{project.live_dir}")


def folder_id(project: ProjectFolder) -> str:
    """The id of the project's own folder; empty if the folder has no id."""
    try:
        return str(json.loads(project.commits_file.read_bytes())["id"])
    except FileNotFoundError:
        return ""
    except (ValueError, KeyError, TypeError) as error:
        raise QueueError(
            f"{project.commits_file} is damaged ({error}). If the checkpoints next to it are intact, remove the "
            "file, then run: mbqueue move-commits"
        ) from error


def lacking(queue: Queue, there: Epochs) -> str:
    """Describe the folds that have fewer epochs in ``there`` than in the queue; empty if there are none."""
    return ", ".join(
        f"{experiment} fold {fold} ({there.get((experiment, fold), 0)} of {counted(known, 'epoch')})"
        for (experiment, fold), known in known_epochs(queue).items()
        if there.get((experiment, fold), 0) < known
    )


def send_missing(
    project: ProjectFolder, queue: Queue, store: ObjectStore, there: Epochs, *, note: Callable[[str], None]
) -> str:
    """Upload epochs that the store lacks and this machine has; describe what the store still lacks (see `lacking`)."""
    sent = {
        (experiment, fold): known
        for (experiment, fold), known in known_epochs(queue).items()
        if there.get((experiment, fold), 0) < known
        and send_fold(project, store, queue.experiment(experiment), fold, known, note)
    }
    return lacking(queue, {**there, **sent})


def known_epochs(queue: Queue) -> dict[tuple[str, int], int]:
    """Map (experiment, fold) to the last epoch that the queue counts as done.

    Pruned trials whose checkpoints were removed are left out.
    """
    known = {(one.name, fold): 0 for one in queue.experiments() if not one.is_released for fold in one.spec["folds"]}
    for job in queue.jobs(state=State.COMMITTED):
        if job.kind is Kind.TRAIN and job.fold is not None and (job.experiment, job.fold) in known:
            key = (job.experiment, job.fold)
            known[key] = max(known[key], job.epoch or 0)
    return known


def local_epochs(project: ProjectFolder) -> dict[tuple[str, int], int]:
    """Map (experiment, fold) to the last finished epoch in the project's own folder, read from file names."""
    return epochs_of(manifests_below(project.all_checkpoints))


def _enter_folder(
    project: ProjectFolder, queue: Queue, before: CommitsPlace | None, *, clock: Clock
) -> CommitsPlace | None:
    if before is None and queue.database.file is not None:
        return None
    if before is not None and before.kind == "store":
        raise elsewhere(before, f"this session has no store: its commits would be in {project.live_dir}")
    if before is not None and before.id == folder_id(project):
        return before
    if missing := lacking(queue, local_epochs(project)):
        if before is not None:
            raise elsewhere(before, f"this project's folder, {project.live_dir}, lacks {missing}")
        raise QueueError(
            f"The queue has not recorded where its commits are, and {project.live_dir} lacks {missing}. Start the "
            f"first session in the folder with these epochs, or set `store` (docs/how-to/many-machines.md). {_HOW}"
        )
    place = folder_place(project)
    queue.reap_dead(by="work", now=clock.now())
    queue.bind_commits(place, instead_of=before, by="work", now=clock.now())
    return place


def _compare(project: ProjectFolder, queue: Queue, store: ObjectStore, *, note: Callable[[str], None]) -> str:
    """Like `send_missing`, but refuse a store that has epochs from an earlier queue."""
    there = finished_epochs(store)
    for (experiment, fold), known in known_epochs(queue).items():
        found = there.get((experiment, fold), 0)
        if found > known + 1:
            raise QueueError(
                f"{store.url} has {counted(found, 'epoch')} of {experiment}, fold {fold}, but the new queue has only "
                f"{known}. To use the epochs in the store: mbqueue recover --force. To train again from the start, set "
                "a different prefix in `store`, or enqueue under another name."
            )
    return send_missing(project, queue, store, there, note=note)
