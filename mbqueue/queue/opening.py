"""Open a project's queue. Only this module chooses between SQLite and PostgreSQL.

Every command opens the queue with this module. So all commands report a lost queue in the same way, and no command
creates a second queue.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import cache
from pathlib import Path

from mbqueue.errors import QueueLost, QueueMissing, UsageError
from mbqueue.project import ProjectFolder
from mbqueue.queue.lost_work import LostPart, described, lost_parts, traces
from mbqueue.queue.store import Queue
from mbqueue.storage.places import manifests_below

#: The file in the live folder that names the archive while `mbqueue restore` replaces the folder's content.
RESTORING = "restoring"

_log = logging.getLogger("mbqueue")


class RestoreCutOff(UsageError):
    """A restore was interrupted, so the project's files are half replaced."""


@cache
def note_once(text: str) -> None:
    """Log a note, unless this process has already logged it."""
    _log.warning(text)


def nothing(_lost: LostPart) -> bool:
    """Accept a queue even if parts of it are missing. Commands that only read pass this function as ``refuses``."""
    return False


def anything(_lost: LostPart) -> bool:
    """Reject a queue if any part of it is missing. Commands that change the queue pass this function as ``refuses``."""
    return True


def open_queue(
    project: ProjectFolder,
    *,
    read_only: bool = False,
    wait: Callable[[float], bool] | None = None,
    refuses: Callable[[LostPart], bool] = nothing,
    note: Callable[[str], None] = note_once,
) -> Queue:
    """Open a project's queue on the configured server, or otherwise in the project's SQLite file.

    If the queue does not exist, create it unless ``read_only`` is set.

    Args:
        wait: sleeps for the given number of seconds, and returns True to stop waiting for the server. Without ``wait``,
            an unreachable server is an error.
        refuses: returns True if a missing part of an earlier queue must be recovered before the command may run.
        note: called with a message if parts of an earlier queue are missing and `refuses` returned False for each part.

    Raises:
        QueueError: if the queue cannot be opened, or if it does not exist and ``read_only`` is set.
        QueueLost: if the queue or parts of it were lost, but can be rebuilt from files that still exist.
        SchemaTooNew: if a newer mbqueue wrote the queue.
        QueueMoved: if the queue was moved to a different database.
        UsageError: if psycopg is not installed, or the URL cannot be parsed.
    """
    if not read_only:
        queue_exists(project, wait=wait)  # raises an error if the queue was lost
    try:
        if url := project.topology.queue_url:
            queue = open_on_server(url, read_only=read_only, wait=wait)
        else:
            queue = Queue(project.queue_db, read_only=read_only)
    except QueueMissing:
        queue_exists(project, wait=wait)
        raise
    try:
        require_content(project, queue)
        _require_whole(project, queue, read_only=read_only, refuses=refuses, note=note)
    except BaseException:
        queue.close()
        raise
    return queue


def queue_exists(project: ProjectFolder, *, wait: Callable[[float], bool] | None = None) -> bool:
    """Whether the project has a queue. ``wait`` works as in `open_queue`.

    Raises:
        QueueError: if the queue's server cannot be reached.
        QueueLost: if the project had a queue that was lost.
        RestoreCutOff: if a restore was interrupted.
        UsageError: if psycopg is not installed, or the URL cannot be parsed.
    """
    if _is_there(project, wait=wait):
        return True
    require_no_cut_off_restore(project)
    if not traces(project):
        return False
    if _is_there(project, wait=wait):  # another process created the queue, and then wrote the first note
        return True
    raise QueueLost(
        f"There is no queue at {project.queue_name}, but there are checkpoints or notes of experiments in "
        f"{project.live_dir}. The queue was lost{_or_elsewhere(project)}. Rebuild the queue from these files: "
        f"{project.topology.how_to_recover}"
    )


def is_queue_there(project: ProjectFolder) -> bool:
    """Whether a queue exists. If the queue was lost, log a note instead of raising an error."""
    try:
        return queue_exists(project)
    except (QueueLost, RestoreCutOff) as error:
        note_once(str(error))
        return False


def require_queue(project: ProjectFolder, *, wait: Callable[[float], bool] | None = None) -> None:
    """Raise an error if the project has no queue. ``wait`` works as in `open_queue`.

    Raises:
        UsageError: if no experiment has ever been enqueued.
        QueueError: if the queue's server cannot be reached.
        QueueLost: if the project had a queue that was lost.
    """
    if queue_exists(project, wait=wait):
        return
    raise UsageError(f"Nothing is enqueued in {project.root}. Start with: mbqueue enqueue full_finetune")


def require_no_cut_off_restore(project: ProjectFolder) -> None:
    """Refuse a project whose restore was interrupted.

    Raises:
        RestoreCutOff: if a restore of the project was interrupted.
    """
    archive = cut_off_restore(project)
    if archive is not None:
        again = project.topology.with_queue_file(f"mbqueue restore {archive}")
        raise RestoreCutOff(f"Restoring {project.root} was interrupted. Restore it again: {again}")


def cut_off_restore(project: ProjectFolder) -> str | None:
    """The archive whose restore was interrupted; None if no restore was interrupted."""
    if project.queue_db.exists():
        return None  # a restore writes the queue's file last
    try:
        return (project.live_dir / RESTORING).read_text(encoding="utf-8")
    except FileNotFoundError:
        return None


def _is_there(project: ProjectFolder, *, wait: Callable[[float], bool] | None = None) -> bool:
    if not (url := project.topology.queue_url):
        return project.queue_db.exists()
    _require_psycopg()
    from mbqueue.queue.postgresql.server import exists  # noqa: PLC0415 - optional package

    return exists(url, wait=wait)


def has_lost_content(project: ProjectFolder, queue: Queue) -> bool:
    """Whether a queue has lost its content: it is empty although the project has checkpoints or notes."""
    return queue.is_empty() and bool(traces(project) or any(manifests_below(project.unsplit.all_checkpoints)))


def require_content(project: ProjectFolder, queue: Queue) -> None:
    """Reject a queue that has lost its content.

    Raises:
        QueueLost: if the queue is empty although the project has checkpoints or notes.
    """
    if has_lost_content(project, queue):
        raise QueueLost(
            f"{queue.database.name} is empty, but there are checkpoints or notes of experiments in "
            f"{project.live_dir}. The queue's content was lost{_or_elsewhere(project, queue.database.file)}. Rebuild "
            f"the queue from these files: {project.topology.how_to_recover}"
        )


def _require_whole(
    project: ProjectFolder,
    queue: Queue,
    *,
    read_only: bool,
    refuses: Callable[[LostPart], bool],
    note: Callable[[str], None],
) -> None:
    """Warn or fail if parts of an earlier queue are missing. The arguments and errors are those of `open_queue`."""
    lost = lost_parts(project, queue)
    if lost and not read_only:
        with queue.writing():
            pass  # wait for a process that may be recording published commits in the queue right now
        lost = lost_parts(project, queue)
    if not lost:
        return
    lacking = (
        f"The queue lacks {described(lost)}. A previous queue was lost or replaced, but {project.live_dir} still has "
        "its checkpoints or notes."
    )
    if any(map(refuses, lost)):
        raise QueueLost(
            f"{lacking} Nothing was changed. First rebuild the missing parts: {project.topology.how_to_recover}"
        )
    note(f"{lacking} When no session is running, rebuild the missing parts: {project.topology.how_to_recover}")


def _or_elsewhere(project: ProjectFolder, opened: Path | None = None) -> str:
    file = project.queue_db
    is_there = file != opened and file.exists()
    return f" or is still in {file} (mbqueue migrate-queue --help)" if is_there else ""


def open_on_server(
    url: str, *, read_only: bool = False, even_moved: bool = False, wait: Callable[[float], bool] | None = None
) -> Queue:
    """Open the queue at a URL such as ``postgresql://USER@HOST/DATABASE?schema=NAME``; errors as for `open_queue`.

    With ``even_moved``, also open a queue that was moved to a different database, so that `mbqueue.queue.migrating` can
    move the queue back.
    """
    _require_psycopg()
    from mbqueue.queue.postgresql.server import PostgresServer  # noqa: PLC0415 - optional package

    return Queue(PostgresServer(url, read_only=read_only, even_moved=even_moved, wait=wait))


def _require_psycopg() -> None:
    try:
        import psycopg  # noqa: F401, PLC0415 - optional package
    except ImportError as error:
        raise UsageError(
            f"The queue is on a PostgreSQL server, but Python cannot import the client psycopg ({error}). Install it "
            "with: pip install 'mbqueue[postgresql]'"
        ) from error
