"""Open a project's queue: the one place that chooses between SQLite and PostgreSQL.

Every command opens the queue here, so all of them report a lost queue alike, and none starts a second one.
"""

from __future__ import annotations

from collections.abc import Callable

from mbqueue.errors import QueueLost, UsageError
from mbqueue.project import ProjectFolder
from mbqueue.queue.store import Queue

#: A file in the live folder while `mbqueue restore` replaces its content; it names the archive.
RESTORING = "restoring"


def open_queue(
    project: ProjectFolder, *, read_only: bool = False, wait: Callable[[float], bool] | None = None
) -> Queue:
    """Open the queue of a project: on the server that MBQUEUE_QUEUE or its settings name, else in its SQLite file.

    Unless ``read_only``, create it if it does not exist.

    Args:
        wait: waits for the given seconds and returns True to give up. With it, as in a session, opening waits for an
            unreachable server. Without it, as in a command, an unreachable server is an error at once.

    Raises:
        QueueError: if it cannot be opened, or does not exist (reading only).
        QueueLost: if its file or its content is gone, but the files to rebuild it from still exist.
        SchemaTooNew: if a newer mbqueue wrote it.
        QueueMoved: if it is in another database now.
        UsageError: if psycopg is not installed, or the URL cannot be read.
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
    """Whether anything was ever enqueued, so that there is a queue to open; ``wait`` as for `open_queue`.

    Raises:
        QueueError: if its server cannot be reached.
        QueueLost, UsageError: as `open_queue`, if there was one.
    """
    if not project.topology.queue_url:
        _require_not_lost(project)
        return project.queue_db.exists()
    _require_psycopg()
    from mbqueue.queue.postgresql.server import exists  # noqa: PLC0415 - optional package

    return exists(project.topology.queue_url, wait=wait)


def is_queue_there(project: ProjectFolder) -> bool:
    """Whether a queue exists now (a lost one does not), for commands that work without one: results are files."""
    return queue_exists(project) if project.topology.queue_url else project.queue_db.exists()


def require_queue(project: ProjectFolder, *, wait: Callable[[float], bool] | None = None) -> None:
    """Check that there is a queue; ``wait`` as for `open_queue`.

    Raises:
        UsageError: if nothing was ever enqueued.
        QueueError: if its server cannot be reached.
        QueueLost: if there was one.
    """
    if queue_exists(project, wait=wait):
        return
    raise UsageError(f"Nothing is enqueued in {project.root}. Start with: mbqueue enqueue full_finetune")


def require_no_cut_off_restore(project: ProjectFolder) -> None:
    """Refuse a project that an interrupted restore left half replaced.

    Raises:
        UsageError: if it is.
    """
    archive = cut_off_restore(project)
    if archive is not None:
        raise UsageError(f"Restoring {project.root} was interrupted. Run it again: mbqueue restore {archive}")


def cut_off_restore(project: ProjectFolder) -> str | None:
    """The archive of an interrupted restore; None if no restore was interrupted."""
    if project.topology.queue_url or project.queue_db.exists():
        return None  # the queue is restored last
    try:
        return (project.live_dir / RESTORING).read_text(encoding="utf-8")
    except FileNotFoundError:
        return None


def _require_not_lost(project: ProjectFolder) -> None:
    """Refuse a project whose queue file is gone.

    Raises:
        QueueLost: if experiments that it held still exist.
        UsageError: if it is gone because a restore was interrupted.
    """
    if project.queue_db.exists():
        return
    require_no_cut_off_restore(project)
    if experiments_beside(project):
        raise QueueLost(
            f"There is no queue at {project.queue_db}, but there are checkpoints or notes of experiments, so it was "
            "lost. Rebuild it from them: mbqueue recover"
        )


def experiments_beside(project: ProjectFolder) -> set[str]:
    """Names of the experiments for which the live folder has commits or recorded requests."""
    trained = {path.parent.parent.name for path in project.live_dir.glob("checkpoints/*/fold_*/e*.json")}
    return trained | {path.stem for path in project.wanted_dir.glob("*.json")}


def lost_experiments(project: ProjectFolder, queue: Queue) -> list[str]:
    """Experiments that were trained here and are not in the queue: an earlier queue that held them was lost."""
    if project.topology.queue_url:
        return []
    return sorted(experiments_beside(project) - {experiment.name for experiment in queue.experiments()})


def what_is_lost(project: ProjectFolder, queue: Queue) -> str:
    """A warning about a queue created after another one was lost; empty if it lacks nothing."""
    names = ", ".join(lost_experiments(project, queue))
    if not names:
        return ""
    return (
        f"The queue lacks {names}, of which there are checkpoints or notes: it was begun after an earlier queue was "
        "lost. When no session runs, bring them back: mbqueue recover"
    )


def has_lost_content(project: ProjectFolder, queue: Queue) -> bool:
    """Whether a queue is empty although there are checkpoints, which means that something emptied it."""
    return not queue.experiments() and any(project.state_dir.glob("checkpoints/*/fold_*/e*.json"))


def require_content(project: ProjectFolder, queue: Queue) -> None:
    """Refuse a queue that has lost its content.

    Raises:
        QueueLost: if it has.
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
    """Open the queue at a URL like ``postgresql://USER@HOST/DATABASE?schema=NAME``; errors as for `open_queue`.

    With ``even_moved``, also open one that was moved away, to move it back (`mbqueue.queue.migrating`).
    """
    _require_psycopg()
    from mbqueue.queue.postgresql.server import PostgresServer  # noqa: PLC0415 - optional package

    return Queue(PostgresServer(url, read_only=read_only, even_moved=even_moved, wait=wait))


def _require_psycopg() -> None:
    try:
        import psycopg  # noqa: F401, PLC0415 - optional package
    except ImportError as error:
        raise UsageError(
            f"The queue is on PostgreSQL, but psycopg, its client, cannot be loaded here ({error}). Install it "
            "with: pip install 'mbqueue[postgresql]'"
        ) from error
