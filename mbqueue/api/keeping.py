"""Recover, back up and restore a project's state; move its queue or its commits."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from mbqueue.api.base import OpenedProject, tell
from mbqueue.errors import QueueError, SearchUnavailable, UsageError
from mbqueue.project import ProjectFolder, from_here
from mbqueue.queue.opening import anything, open_on_server, open_queue, queue_exists
from mbqueue.settings import wrong_queue_url

if TYPE_CHECKING:
    from mbqueue.drive.archive import Backup
    from mbqueue.drive.recovery import Recovered
    from mbqueue.queue.migrating import Migrated
    from mbqueue.session.moving_commits import Moved

_TO_SERVER = "then move it to the server: MBQUEUE_QUEUE=sqlite mbqueue migrate-queue URL"
_FROM_SERVER = "after moving the queue into a file: mbqueue migrate-queue sqlite"


class Keeping(OpenedProject):
    def recover(self, *, force: bool = False) -> Recovered:
        """Rebuild the queue from the manifests of the checkpoints. The old queue is kept next to the new queue.

        With an object store, this method reads the manifests from the store.

        Raises:
            UsageError: if there is an intact queue and ``force`` is not given, or if a session is using the queue.
        """
        from mbqueue.drive.recovery import recover  # noqa: PLC0415

        self.folder.topology.require_queue_file("Recovering", _TO_SERVER)
        self._fetch_commits()
        recovered = recover(self.folder, force=force, note=tell, clock=self._clock)
        self._judge_again()
        return recovered

    def _judge_again(self) -> None:
        from mbqueue.search.steps import judge_again  # noqa: PLC0415

        with open_queue(self.folder) as queue:
            try:
                judge_again(queue, now=self._clock.now(), by="recover")
            except SearchUnavailable as error:
                tell(f"{error} Without Optuna, mbqueue cannot recognise pruned trials, so pruned trials resume too.")

    def back_up(self, file: str | Path) -> Backup:
        """Write the whole state (queue, checkpoints, results, jobs, settings) to one archive.

        Sessions can keep running during the backup.

        Raises:
            UsageError: if the file exists, or there is no queue.
        """
        from mbqueue.drive.archive import back_up  # noqa: PLC0415

        self.folder.topology.require_queue_file("The backup", _FROM_SERVER)
        if queue_exists(self.folder):
            open_queue(self.folder, read_only=True).close()  # raises an error if, for example, the queue has moved
        self._fetch_commits()
        return back_up(self.folder, from_here(Path(file)), clock=self._clock)

    def restore(self, file: str | Path, *, force: bool = False) -> Backup:
        """Replace this project's state with the state in an archive; the old state is kept next to the new one.

        Raises:
            DamagedArchive: if the archive differs from what `back_up` wrote. Nothing is changed.
            UsageError: if there is a queue and ``force`` is not given, or if a session is using the queue.
        """
        from mbqueue.drive.archive import restore  # noqa: PLC0415

        self.folder.topology.require_queue_file("Restoring", _TO_SERVER)
        return restore(self.folder, from_here(Path(file)), force=force, note=tell, clock=self._clock)

    def migrate_queue(self, to: str) -> Migrated:
        """Move the whole queue into an empty database; mbqueue.toml stays unchanged.

        The old database keeps its content, but is marked as moved and refuses all work. You can move the queue back
        into the old database; the move replaces the old content.

        On a cluster's file system, the commits also move to the folder where sessions of the new queue expect them.

        Args:
            to: ``postgresql://USER@HOST/DATABASE``, or ``sqlite`` for the project's own file.

        Raises:
            UsageError: if a session is using the queue, there is no queue, or the other database is not empty.
            QueueError: if a database cannot be reached or written. Nothing is changed.
        """
        from mbqueue.queue.migrating import copy_queue, copy_to_file  # noqa: PLC0415

        if not queue_exists(self.folder):
            raise UsageError(
                f"There is no queue in {self.folder.root} to move. To use a new queue, set `queue` in mbqueue.toml."
            )
        if to != "sqlite" and (wrong := wrong_queue_url(to)):
            raise UsageError(f"The argument {wrong}. To move the queue into a file, give the word sqlite.")
        with open_queue(self.folder, refuses=anything) as source:
            there = self._take_along(to)
            if to == "sqlite":
                return copy_to_file(source, there.queue_db, now=self._clock.now())
            with open_on_server(to, even_moved=True) as target:
                if target.database.name == source.database.name:
                    raise UsageError(
                        f"The queue is already at {target.database.name}. To move the queue in state/ there, "
                        "run: MBQUEUE_QUEUE=sqlite mbqueue migrate-queue URL"
                    )
                return copy_queue(source, target, now=self._clock.now())

    def move_commits(self, *, lost: bool = False) -> Moved:
        """Move the queue's commits to the project's store, or to its folder if it has no store.

        This method copies the commits from the old store or from this machine, then updates the queue. The queue
        records where its commits are, and refuses sessions that use a different location. Never move commits by hand.

        Args:
            lost: continue even if finished epochs cannot be found; sessions then train these epochs again.

        Raises:
            UsageError: if there is no queue.
            QueueError: if a session is using the queue.
            StoreError: if a finished epoch would be lost, or a store is not responding; the queue stays unchanged.
        """
        from mbqueue.session.moving_commits import move_commits  # noqa: PLC0415

        if not queue_exists(self.folder):
            raise UsageError(
                f"There is no queue in {self.folder.root}, so there are no commits to move. Just set `store` in "
                "mbqueue.toml."
            )
        with open_queue(self.folder, refuses=anything) as queue:
            return move_commits(self.folder, queue, lost=lost, note=tell, clock=self._clock)

    def _take_along(self, to: str) -> ProjectFolder:
        """Move commits and results to where sessions of the moved queue expect them; return the new project."""
        there = self.folder.with_queue(on_server=to != "sqlite")
        if there.live_dir != self.folder.live_dir:
            from mbqueue.drive.moving import follow_snapshots, take_commits, take_results  # noqa: PLC0415

            take_commits(self.folder, there, differs=_refuse)
            take_results(self.folder, there)
            if to == "sqlite":
                follow_snapshots(there)
        return there

    def _fetch_commits(self) -> None:
        from mbqueue.session.commits_binding import opened_store  # noqa: PLC0415

        try:
            with open_queue(self.folder, read_only=True) as queue:
                store = opened_store(self.folder, queue)
        except QueueError:  # the queue is lost or damaged
            from mbqueue.storage.objects import store_of  # noqa: PLC0415 - only projects with a store need it

            store = store_of(self.folder.topology)
        if store is not None:
            from mbqueue.session.shared_commits import fetch_commits  # noqa: PLC0415

            fetch_commits(self.folder, store, note=tell)


def _refuse(why: str) -> None:
    raise UsageError(f"{why} Keep the folder that you need, and move the other one away. Nothing was changed.")
