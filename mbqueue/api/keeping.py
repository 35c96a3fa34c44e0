"""Keeping the state safe: recover, backup, restore."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from mbqueue.api.opened import OpenedProject, tell

if TYPE_CHECKING:
    from mbqueue.drive.archive import Backup
    from mbqueue.drive.recover import Recovered


class Keeping(OpenedProject):
    """recover, back_up, restore."""

    def recover(self, *, force: bool = False) -> Recovered:
        """Rebuild the queue from the manifests of the checkpoints alone. The queue before is kept beside it.

        Of a project with an object store, from the manifests in that.

        Raises:
            UsageError: when there is a whole queue already and ``force`` is not given, or a session works with it.
        """
        from mbqueue.drive.recover import recover  # noqa: PLC0415

        self._fetch_commits()
        return recover(self.folder, force=force, note=tell, clock=self._clock)

    def back_up(self, file: str | Path) -> Backup:
        """Write the whole state (queue, checkpoints, results, jobs, settings) to one archive, while sessions may work.

        Raises:
            UsageError: when the file exists, or there is no queue.
        """
        from mbqueue.drive.archive import back_up  # noqa: PLC0415

        self._fetch_commits()
        return back_up(self.folder, Path(file), clock=self._clock)

    def restore(self, file: str | Path, *, force: bool = False) -> Backup:
        """Put the state of an archive in place of this project's; what was there before is kept beside it.

        Raises:
            DamagedArchive: when it is not what `back_up` wrote; nothing was changed.
            UsageError: when there is a queue and ``force`` is not given, or a session works with it.
        """
        from mbqueue.drive.archive import restore  # noqa: PLC0415

        return restore(self.folder, Path(file), force=force, note=tell, clock=self._clock)

    def _fetch_commits(self) -> None:
        if self.folder.store:
            from mbqueue.objects import ObjectStore  # noqa: PLC0415 - only projects with a store need it
            from mbqueue.session.shared_commits import fetch_commits  # noqa: PLC0415

            fetch_commits(self.folder, ObjectStore.open(self.folder.store), note=tell)
