"""Keeping the state safe: recover, backup, restore; taking the queue to another database."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from mbqueue.api.opened import OpenedProject, tell
from mbqueue.errors import QueueError, SearchUnavailable, UsageError
from mbqueue.project import ProjectFolder
from mbqueue.queue.opening import open_on_server, open_queue, queue_exists
from mbqueue.settings import wrong_queue_url

if TYPE_CHECKING:
    from mbqueue.drive.archive import Backup
    from mbqueue.drive.recover import Recovered
    from mbqueue.queue.migrating import Migrated
    from mbqueue.session.moving_commits import Moved

_TO_SERVER = "then move it to the server: MBQUEUE_QUEUE=sqlite mbqueue migrate-queue URL"
_FROM_SERVER = "after moving the queue into a file: mbqueue migrate-queue sqlite"


class Keeping(OpenedProject):
    """recover, back_up, restore, migrate_queue, move_commits."""

    def recover(self, *, force: bool = False) -> Recovered:
        """Rebuild the queue from the manifests of the checkpoints alone. The queue before is kept beside it.

        Of a project with an object store, from the manifests in that.

        Raises:
            UsageError: when there is a whole queue already and ``force`` is not given, or a session works with it.
        """
        from mbqueue.drive.recover import recover  # noqa: PLC0415

        self.folder.topology.require_queue_file(
            "Recovering", "then move it to the server: MBQUEUE_QUEUE=sqlite mbqueue migrate-queue URL"
        )
        self._fetch_commits()
        recovered = recover(self.folder, force=force, note=tell, clock=self._clock)
        self._judge_again()
        return recovered

    def _judge_again(self) -> None:
        """Prune the trials again that were pruned before: manifests do not tell of that."""
        from mbqueue.search.steps import judge_again  # noqa: PLC0415

        with open_queue(self.folder) as queue:
            try:
                judge_again(queue, now=self._clock.now(), by="recover")
            except SearchUnavailable as error:
                tell(f"{error} Until then trials that were pruned before would go on.")

    def back_up(self, file: str | Path) -> Backup:
        """Write the whole state (queue, checkpoints, results, jobs, settings) to one archive, while sessions may work.

        Raises:
            UsageError: when the file exists, or there is no queue.
        """
        from mbqueue.drive.archive import back_up  # noqa: PLC0415

        self.folder.topology.require_queue_file(
            "The backup", "after moving the queue into a file: mbqueue migrate-queue sqlite"
        )
        if queue_exists(self.folder):
            open_queue(self.folder, read_only=True).close()  # not of one that was moved away, for example
        self._fetch_commits()
        return back_up(self.folder, Path(file), clock=self._clock)

    def restore(self, file: str | Path, *, force: bool = False) -> Backup:
        """Put the state of an archive in place of this project's; what was there before is kept beside it.

        Raises:
            DamagedArchive: when it is not what `back_up` wrote; nothing was changed.
            UsageError: when there is a queue and ``force`` is not given, or a session works with it.
        """
        from mbqueue.drive.archive import restore  # noqa: PLC0415

        self.folder.topology.require_queue_file(
            "Restoring", "then move it to the server: MBQUEUE_QUEUE=sqlite mbqueue migrate-queue URL"
        )
        return restore(self.folder, Path(file), force=force, note=tell, clock=self._clock)

    def migrate_queue(self, to: str) -> Migrated:
        """Move the queue into an empty database, losslessly; the settings stay as they are.

        The database that it was in keeps all of it, and is marked: nothing works with it any more. It can be moved
        back there, whose former content, all of which the queue still has, then gives way.

        On a cluster's file system the commits come along, to where sessions with the other queue look for them.

        Args:
            to: ``postgresql://USER@HOST/DATABASE``, or ``sqlite`` for the file of this project.

        Raises:
            UsageError: when a session works with the queue, there is none, or the other database is not empty.
            QueueError: when a database cannot be reached or written; nothing was changed then.
        """
        from mbqueue.queue.migrating import copy_queue, copy_to_file  # noqa: PLC0415

        if not queue_exists(self.folder):
            raise UsageError(f"There is no queue in {self.folder.root} to be copied. For a new one, only set `queue`.")
        if to != "sqlite" and (wrong := wrong_queue_url(to)):
            raise UsageError(f"The argument {wrong}, or sqlite.")
        with open_queue(self.folder) as source:
            if to == "sqlite" and not self.folder.topology.queue_url:
                raise UsageError(f"The queue is in a file already, {source.database.name}.")
            there = self._take_along(to)
            if to == "sqlite":
                return copy_to_file(source, there.queue_db, now=self._clock.now())
            with open_on_server(to, even_moved=True) as target:
                if target.database.name == source.database.name:
                    raise UsageError(
                        f"The queue is at {target.database.name} already. To move it there from the file: "
                        "MBQUEUE_QUEUE=sqlite mbqueue migrate-queue URL"
                    )
                return copy_queue(source, target, now=self._clock.now())

    def move_commits(self, *, lost: bool = False) -> Moved:
        """Let the queue's commits be in the project's store from now on, or in its folder where it has none.

        What is in the store that they were in, or on this machine, is copied first. Sessions that would work with
        commits in another place than the queue knows of are refused, so this is how they are moved on purpose.

        Args:
            lost: go on also when finished epochs are nowhere to be found: they are trained again.

        Raises:
            UsageError: when there is no queue.
            QueueError: when a session works with it.
            StoreError: when a finished epoch would be lost, or a store does not answer. The queue was not changed.
        """
        from mbqueue.session.moving_commits import move_commits  # noqa: PLC0415

        if not queue_exists(self.folder):
            raise UsageError(f"There is no queue in {self.folder.root}, so no commits either. Only set `store`.")
        with open_queue(self.folder) as queue:
            return move_commits(self.folder, queue, lost=lost, note=tell, clock=self._clock)

    def _take_along(self, to: str) -> ProjectFolder:
        """Bring commits and results to where sessions look for them when the queue is there; the project then."""
        there = self.folder.with_queue(on_server=to != "sqlite")
        if there.live_dir != self.folder.live_dir:
            from mbqueue.drive.moving import follow_snapshots, take_commits, take_results  # noqa: PLC0415

            take_commits(self.folder, there, differs=_refuse)
            take_results(self.folder, there)
            if there.topology.is_split:
                follow_snapshots(there)
        return there

    def _fetch_commits(self) -> None:
        from mbqueue.session.same_place import opened_store  # noqa: PLC0415

        try:
            with open_queue(self.folder, read_only=True) as queue:
                store = opened_store(self.folder, queue)
        except QueueError:  # it is lost or damaged, and with it what it knew
            from mbqueue.storage.objects import store_of  # noqa: PLC0415 - only projects with a store need it

            store = store_of(self.folder.topology)
        if store is not None:
            from mbqueue.session.shared_commits import fetch_commits  # noqa: PLC0415

            fetch_commits(self.folder, store, note=tell)


def _refuse(why: str) -> None:
    raise UsageError(f"{why} Move the folder of those that are not wanted elsewhere. Nothing was changed.")
