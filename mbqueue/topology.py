"""Decide where a project's files are, from the project's settings, the environment and the mount table.

| project on | queue | live state | commits and results | mirrored |
|---|---|---|---|---|
| a local disk | file in state/ | state/ | state/, results/ | no |
| a drive or network mount | file in the live folder | live folder | live folder | to the mount |
| any, with `store` | as without `store` | as without `store` | the store | crystals and frozen features, in the store |
| a cluster's file system, queue on a server | server | state/ | state/, results/ | no |
| another mount, queue on a server | server | live folder | the store, which is required | no |

Only this module chooses where files are. The module also refuses combinations of settings that cannot work.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from mbqueue.belonging import default_live_dir
from mbqueue.buckets import STORE_VARIABLE, wrong_address
from mbqueue.errors import UsageError
from mbqueue.mounts import mount_of
from mbqueue.settings import Settings, wrong_queue_url

LIVE_VARIABLE = "MBQUEUE_LIVE_DIR"
QUEUE_VARIABLE = "MBQUEUE_QUEUE"
#: The folder of the live state in a project without a live folder.
STATE_FOLDER = "state"


@dataclass(frozen=True, kw_only=True)
class Topology:
    """The locations of a project's queue, live state, commits and results.

    Attributes:
        root: the project's folder.
        live: the live folder, on a local disk, for files that change; None if these files are in state/.
        queue_url: the queue's URL on a server; empty if the queue is a file. Never show this URL, because it may
            contain a password.
        store: address of the object store for commits, results and caches; empty if there is none.
    """

    root: Path
    live: Path | None
    queue_url: str
    store: str

    @classmethod
    def of(cls, root: Path, settings: Settings, *, live: Path | None) -> Topology:
        """Determine the topology of a project from its settings and the environment.

        Args:
            live: the result of `live_folder`.

        Raises:
            UsageError: if $MBQUEUE_QUEUE or $MBQUEUE_STORE is not a valid address.
        """
        store = os.environ.get(STORE_VARIABLE) or settings.store
        if wrong := wrong_address(store):
            raise UsageError(f"{STORE_VARIABLE} {wrong}.")
        return cls(root=root, live=live, queue_url=_queue_url(settings), store=store)

    @property
    def is_mirrored(self) -> bool:
        """Whether sessions publish the queue and its commits to the project's drive."""
        return self.live is not None and not self.store and not self.queue_url

    @property
    def how_to_recover(self) -> str:
        """The commands that rebuild the queue from the project's files, as shown in messages."""
        return self.with_queue_file("mbqueue recover")

    def with_queue_file(self, command: str) -> str:
        """How to run a command that requires a queue in a file, as shown in messages."""
        if not self.queue_url:
            return command
        return f"MBQUEUE_QUEUE=sqlite {command}, then move the queue to an empty schema: mbqueue migrate-queue --help"

    @property
    def publishes_to(self) -> str:
        """The drive or store to which sessions publish commits; empty if commits stay in the project's folder."""
        return self.store or (str(self.root) if self.is_mirrored else "")

    @property
    def shared_by_copies(self) -> str:
        """The resource that a copy of the project would share with the original, as text for an error message.

        Empty if a copy would share neither the queue nor the store, or both of them. Also empty if the project is on a
        drive, where `mbqueue.belonging` distinguishes the live folders.
        """
        if self.live is not None or bool(self.queue_url) == bool(self.store):
            return ""
        if self.queue_url:
            return "queue on the server, with different checkpoints"
        return f"store {self.store}, with different queues"

    # -- combinations of settings that cannot work -----------------------------------------------------------------

    @property
    def why_not_safe(self) -> str | None:
        """Explain why the queue's file in state/ may be damaged; None if it is safe, or the queue is elsewhere."""
        if self.live is not None or self.queue_url or not mount_of(self.root).is_remote:
            return None
        return (
            "A live database is not safe on a network mount. Remove live_dir from mbqueue.toml and unset "
            f"{LIVE_VARIABLE}, or set them to a local folder."
        )

    @property
    def why_not_shared(self) -> str | None:
        """Explain why other machines with this queue would not see this machine's commits; None if they would."""
        if self.store or self.live is None or not self.queue_url:
            return None
        return (
            f"Other machines share this queue, but only this machine can read the checkpoints in {self.live}. "
            'Set store = "s3://…" in mbqueue.toml (docs/how-to/many-machines.md).'
        )

    def require_shared(self) -> None:
        """Check that sessions on other machines can read this machine's commits.

        Raises:
            UsageError: if other machines cannot read the commits.
        """
        if self.why_not_shared is not None:
            raise UsageError(self.why_not_shared)

    def require_launchable(self, n_sessions: int) -> str | None:
        """Check that ``n_sessions`` sessions on other machines can work on this project.

        Returns:
            A note for the user if only this machine can run the jobs, else None.

        Raises:
            UsageError: if the sessions cannot share the queue, or the live folder is not on a local disk.
        """
        if self.live is not None and not self.queue_url and n_sessions > 1:
            raise UsageError(
                f"Several machines cannot share the queue of {self.root}, which is a SQLite file on a network mount. "
                'Set queue = "postgresql://…" in mbqueue.toml (docs/how-to/many-machines.md), or launch one job.'
            )
        if self.live is not None and (mount := mount_of(self.live)).is_remote:
            raise UsageError(
                f"The live folder {self.live} is also on a network mount ({mount.fstype}), where a SQLite file "
                'is not safe. Set live_dir in mbqueue.toml to a folder on a local disk: live_dir = "/tmp/mbqueue"'
            )
        self.require_shared()
        if mount_of(self.root).is_remote:
            return None
        return (
            f"{self.root} is on a local disk, so only this machine can run the jobs (choose it with --set "
            "nodelist=NAME). To use other machines, move the project to a disk that all machines share."
        )

    def require_queue_file(self, what: str, instead: str) -> None:
        """Check that the queue is a file, for operations that do not work with a queue on a server.

        Args:
            what: the operation, as the subject of the error message, such as "The backup".
            instead: the end of the error message, which says how to move the queue before or after the operation.

        Raises:
            UsageError: if the queue is on a server.
        """
        if self.queue_url:
            raise UsageError(
                f"{what} requires a queue in a file, but this project's queue is on a PostgreSQL server. Use the "
                "server's own backups (pg_dump, docs/how-to/many-machines.md). Or run this command with "
                f"MBQUEUE_QUEUE=sqlite, {instead}"
            )


def live_folder(root: Path, settings: Settings, *, on_server: bool | None = None) -> Path | None:
    """Choose the live folder of a project; None if its live state is in state/.

    $MBQUEUE_LIVE_DIR takes precedence over the settings. By default, a project on a drive or network mount gets a live
    folder in ~/.cache. A project on a cluster's file system needs no live folder if its queue is on a server.

    Args:
        on_server: whether to assume that the queue is on a server; by default, as in the settings.

    Raises:
        UsageError: if $MBQUEUE_QUEUE is not a valid URL.
    """
    given = os.environ.get(LIVE_VARIABLE) or settings.live_dir
    if given:
        live = (root / Path(given).expanduser()).absolute()
        return None if live == root / STATE_FOLDER else live
    if on_server is None:
        on_server = bool(_queue_url(settings))
    mount = mount_of(root)
    if not mount.is_remote or (mount.is_clustered and on_server):
        return None
    return default_live_dir(root, str(root.resolve()))


def _queue_url(settings: Settings) -> str:
    """The URL of the queue on a server; empty if the queue is a file.

    ``MBQUEUE_QUEUE=sqlite`` selects the file even if the settings contain a URL.
    """
    given = os.environ.get(QUEUE_VARIABLE) or settings.queue
    if given == "sqlite":
        return ""
    if wrong := wrong_queue_url(given):
        raise UsageError(f"{QUEUE_VARIABLE} {wrong}.")
    return given
