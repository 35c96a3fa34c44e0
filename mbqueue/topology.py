"""Decide once where a project's files are, from the project's settings, the environment and the mount table.

| project on | queue | live state | commits and results | mirrored |
|---|---|---|---|---|
| a local disk | file in state/ | state/ | state/, results/ | no |
| a drive or network mount | file in the live folder | live folder | live folder | to the mount |
| any, with `store` | as without | as without | the store | crystals and frozen features too, in the store |
| a cluster's file system, queue on a server | server | state/ | state/, results/ | no |
| another mount, queue on a server | server | live folder | the store, which is required | no |

No other module reads settings, environment or mounts for this. Combinations that cannot work are refused here, each
with one sentence that says what to change.
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


@dataclass(frozen=True, kw_only=True)
class Topology:
    """The locations of a project's queue, live state, commits and results.

    Attributes:
        root: the project's folder.
        live: the folder for files that change, on a local disk; None if this is state/.
        queue_url: the server of the queue; empty if the queue is a file. Never show this URL: it may contain a
            password.
        store: address of the object store for commits, results and caches; empty if the project has no store.
    """

    root: Path
    live: Path | None
    queue_url: str
    store: str

    @classmethod
    def of(cls, root: Path, settings: Settings, *, live: Path | None) -> Topology:
        """Make the topology of a project whose live folder is known (`live_folder`).

        Raises:
            UsageError: if $MBQUEUE_QUEUE or $MBQUEUE_STORE is not a valid address.
        """
        store = os.environ.get(STORE_VARIABLE) or settings.store
        if wrong := wrong_address(store):
            raise UsageError(f"{STORE_VARIABLE} {wrong}.")
        return cls(root=root, live=live, queue_url=_queue_url(settings), store=store)

    @property
    def is_split(self) -> bool:
        """Whether the live state is elsewhere, so that state/ holds only published files."""
        return self.live is not None

    @property
    def is_mirrored(self) -> bool:
        """Whether sessions publish the queue and its commits to the project's drive."""
        return self.is_split and not self.store and not self.queue_url

    @property
    def publishes_to(self) -> str:
        """The place where other machines find commits; empty if it is the project's folder."""
        return self.store or (str(self.root) if self.is_mirrored else "")

    @property
    def shared_by_copies(self) -> str:
        """What a copy of the project's folder would share with the original; empty if nothing.

        On a drive the text is empty, too: `mbqueue.belonging` tells live folders apart there.
        """
        if self.is_split or bool(self.queue_url) == bool(self.store):
            return ""
        if self.queue_url:
            return "queue on the server, with different checkpoints"
        return f"store {self.store}, with different queues"

    # -- what cannot work ------------------------------------------------------------------------------------------

    @property
    def why_not_shared(self) -> str | None:
        """Why machines that share the queue would not see each other's commits; None if they would."""
        if self.store or not (self.queue_url and self.is_split):
            return None
        return (
            f"Other machines share this queue, but the checkpoints would be in {self.live}, where only this one "
            'sees them. Set store = "s3://…" in mbqueue.toml (docs/how-to/many-machines.md).'
        )

    def require_shared(self) -> None:
        """Check that the other sessions of the queue can see this session's commits.

        Raises:
            UsageError: if the other sessions cannot see these commits.
        """
        if self.why_not_shared is not None:
            raise UsageError(self.why_not_shared)

    def require_launchable(self, n_sessions: int) -> str | None:
        """Check that this many sessions on other machines can work here; return a note for the user, or None.

        Raises:
            UsageError: if the sessions cannot share the queue, or the live folder is not on a local disk.
        """
        if self.is_split and not self.queue_url and n_sessions > 1:
            raise UsageError(
                f"{self.root} is on a network mount, and its queue is a SQLite file, which several "
                'machines cannot share. Set queue = "postgresql://…" in mbqueue.toml'
                " (docs/how-to/many-machines.md), or "
                "launch one job."
            )
        if self.live is not None and (mount := mount_of(self.live)).is_remote:
            raise UsageError(
                f"The live folder {self.live} is on a network mount, too ({mount.fstype}), where a SQLite file "
                'is not safe. Set live_dir = "/tmp/mbqueue" (a local disk of each machine) in mbqueue.toml.'
            )
        self.require_shared()
        if mount_of(self.root).is_remote:
            return None
        return (
            f"{self.root} is on this machine's own disk: the jobs can only run here (--set nodelist=NAME chooses "
            "the machine). To use other machines, put the project on a disk that they share."
        )

    def require_queue_file(self, what: str, instead: str) -> None:
        """Check that the queue is a file, for operations that need one.

        Raises:
            UsageError: if the queue is on a server.
        """
        if self.queue_url:
            raise UsageError(
                f"{what} works only for a queue in a file; this project's is on a PostgreSQL server. Use the server's "
                "own backups (pg_dump, docs/how-to/many-machines.md). Or run this command with MBQUEUE_QUEUE=sqlite, "
                f"{instead}"
            )


def live_folder(root: Path, settings: Settings, *, on_server: bool | None = None) -> Path | None:
    """The live folder: from $MBQUEUE_LIVE_DIR, else the settings, else by the project's mount; None for state/.

    With the queue on a server, a project on a cluster's file system needs no live folder: the machines share the
    commits in state/.

    Args:
        on_server: whether to assume that the queue is on a server; by default, as in the settings.

    Raises:
        UsageError: if $MBQUEUE_QUEUE is not the URL of a server.
    """
    given = os.environ.get(LIVE_VARIABLE) or settings.live_dir
    if given:
        live = (root / Path(given).expanduser()).absolute()
        return None if live == root / "state" else live
    if on_server is None:
        on_server = bool(_queue_url(settings))
    mount = mount_of(root)
    if not mount.is_remote or (mount.is_clustered and on_server):
        return None
    return default_live_dir(root, str(root.resolve()))


def _queue_url(settings: Settings) -> str:
    """The server of the queue; empty for a file. ``MBQUEUE_QUEUE=sqlite`` selects the file even if the settings name a
    server."""
    given = os.environ.get(QUEUE_VARIABLE) or settings.queue
    if given == "sqlite":
        return ""
    if wrong := wrong_queue_url(given):
        raise UsageError(f"{QUEUE_VARIABLE} {wrong}.")
    return given
