"""Where a project's queue is, and opening it: the one place that chooses between SQLite and PostgreSQL.

Every command comes through here, so that all say the same of a queue that is lost, and none begins a second one.
"""

from __future__ import annotations

from collections.abc import Callable

from mbqueue.errors import QueueLost, UsageError
from mbqueue.project import ProjectFolder
from mbqueue.queue.store import Queue

#: In the live folder while `mbqueue restore` puts an archive in the place of what was there; says which.
RESTORING = "restoring"


def open_queue(
    project: ProjectFolder, *, read_only: bool = False, wait: Callable[[float], bool] | None = None
) -> Queue:
    """The queue of a project: on the server that MBQUEUE_QUEUE or its settings name, else in its SQLite file.

    Unless ``read_only``, one that is not there is made.

    Args:
        wait: waits so many seconds, and says whether to give up. A session gives it, and waits for a server that is
            away. Without it, which is for what a person waits for, that is an error at once.

    Raises:
        QueueError: when it cannot be opened, or does not exist (reading only).
        QueueLost: when its file, or what was in it, is gone, and what it knew is still there to rebuild it from.
        SchemaTooNew: when a newer mbqueue wrote it.
        QueueMoved: when it is in another database now.
        UsageError: when psycopg is not installed, or the URL cannot be read.
    """
    if project.topology.queue_url:
        return open_on_server(project.topology.queue_url, read_only=read_only, wait=wait)
    _require_not_lost(project)
    queue = Queue(project.queue_db, read_only=read_only)
    try:
        require_content(project, queue)
    except BaseException:
        queue.close()
        raise
    return queue


def queue_exists(project: ProjectFolder, *, wait: Callable[[float], bool] | None = None) -> bool:
    """Whether anything was ever enqueued, so that there is a queue to open; ``wait`` as `open_queue` takes it.

    Raises:
        QueueError: when its server cannot be reached.
        QueueLost, UsageError: when there was one; as `open_queue`.
    """
    if not project.topology.queue_url:
        _require_not_lost(project)
        return project.queue_db.exists()
    _require_psycopg()
    from mbqueue.queue.postgresql.server import exists  # noqa: PLC0415 - optional package

    return exists(project.topology.queue_url, wait=wait)


def is_queue_there(project: ProjectFolder) -> bool:
    """Whether there is a queue now; one that was lost is not. For what needs none: results are files."""
    return queue_exists(project) if project.topology.queue_url else project.queue_db.exists()


def require_queue(project: ProjectFolder, *, wait: Callable[[float], bool] | None = None) -> None:
    """Make sure that there is a queue; ``wait`` as `open_queue` takes it.

    Raises:
        UsageError: when nothing was ever enqueued.
        QueueError: when its server cannot be reached.
        QueueLost: when there was one.
    """
    if queue_exists(project, wait=wait):
        return
    raise UsageError(f"Nothing is enqueued in {project.root}. Start with: mbqueue enqueue full_finetune")


def require_no_cut_off_restore(project: ProjectFolder) -> None:
    """Refuse a project that is half an archive's and half what was there before.

    Raises:
        UsageError: when it is.
    """
    archive = cut_off_restore(project)
    if archive is not None:
        raise UsageError(
            f"Restoring {project.root} was cut off before it was done. Do it again: mbqueue restore {archive}"
        )


def cut_off_restore(project: ProjectFolder) -> str | None:
    """The archive whose restoring was cut off before it was done; None when there is no such thing."""
    if project.topology.queue_url or project.queue_db.exists():
        return None  # the queue comes last
    try:
        return (project.live_dir / RESTORING).read_text(encoding="utf-8")
    except FileNotFoundError:
        return None


def _require_not_lost(project: ProjectFolder) -> None:
    """Refuse a project whose queue, in a file, is gone.

    Raises:
        QueueLost: when experiments are there that it held.
        UsageError: when it is gone because a restore was cut off.
    """
    if project.queue_db.exists():
        return
    require_no_cut_off_restore(project)
    if _experiments_beside(project):
        raise QueueLost(
            f"There is no queue at {project.queue_db}, but there are checkpoints or notes of experiments, so it was "
            "lost. Rebuild it from them: mbqueue recover"
        )


def _experiments_beside(project: ProjectFolder) -> set[str]:
    """Names of the experiments of which the live folder has commits, or notes of what was asked for."""
    trained = {path.parent.parent.name for path in project.live_dir.glob("checkpoints/*/fold_*/e*.json")}
    return trained | {path.stem for path in project.wanted_dir.glob("*.json")}


def lacks_experiments(project: ProjectFolder, queue: Queue) -> bool:
    """Whether a queue lacks experiments that were worked on here: the one that knew them was lost before it began."""
    return bool(_experiments_beside(project) - {experiment.name for experiment in queue.experiments()})


def has_lost_content(project: ProjectFolder, queue: Queue) -> bool:
    """Whether a queue is empty though there are checkpoints, so that something emptied it."""
    return not queue.experiments() and any(project.state_dir.glob("checkpoints/*/fold_*/e*.json"))


def require_content(project: ProjectFolder, queue: Queue) -> None:
    """Refuse a queue that has lost its content.

    Raises:
        QueueLost: when it has.
    """
    if has_lost_content(project, queue):
        raise QueueLost(
            f"{queue.database.name} is empty, but there are checkpoints, so its content was lost"
            + (
                " or is still in the queue from before: mbqueue migrate-queue --help"
                if project.topology.queue_url
                else ". Rebuild it from them: mbqueue recover"
            )
        )


def open_on_server(
    url: str, *, read_only: bool = False, even_moved: bool = False, wait: Callable[[float], bool] | None = None
) -> Queue:
    """The queue at a URL like ``postgresql://USER@HOST/DATABASE?schema=NAME``; errors as `open_queue`.

    With ``even_moved`` also one that was moved away, for moving it back (`mbqueue.queue.migrating`).
    """
    _require_psycopg()
    from mbqueue.queue.postgresql.server import PostgresServer  # noqa: PLC0415 - optional package

    return Queue(PostgresServer(url, read_only=read_only, even_moved=even_moved, wait=wait))


def _require_psycopg() -> None:
    try:
        import psycopg  # noqa: F401, PLC0415 - optional package
    except ImportError as error:
        raise UsageError(
            f"The queue is on PostgreSQL, and psycopg, which talks to it, cannot be loaded here ({error}). Install it "
            "with: pip install 'mbqueue[postgresql]'"
        ) from error
