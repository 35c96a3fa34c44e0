"""Where the commits are whose epochs a queue holds for done: one place, which every session must find the same."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from mbqueue.errors import QueueError
from mbqueue.queue.database import Part, repeatable
from mbqueue.queue.dialect import POSTGRESQL
from mbqueue.queue.notes import note
from mbqueue.queue.sessions import at_work

_READ = "SELECT id, kind, address FROM commits_place"

_BIND = """
    INSERT INTO commits_place (number, id, kind, address, since, by) VALUES (1, :id, :kind, :address, :now, :by)
    ON CONFLICT (number) DO UPDATE SET id = :id, kind = :kind, address = :address, since = :now, by = :by
"""


@dataclass(frozen=True, kw_only=True)
class CommitsPlace:
    """A store, or a folder on a disk.

    Attributes:
        id: what it is known by, wherever it is mounted and whatever its address is; written in the place itself.
        address: where it was when the queue was told of it, for people: a URL without secrets, or HOST:FOLDER.
    """

    id: str
    kind: Literal["store", "folder"]
    address: str

    @property
    def shown(self) -> str:
        """For people."""
        return f"{self.address} (id {self.id})"


class CommitsPlaces(Part):
    """Telling a queue where its commits are."""

    @repeatable
    def commits_place(self) -> CommitsPlace | None:
        """Where the commits are; None while nobody has said, as in a queue that no session has worked with."""
        with self.reading() as db:
            row = db.execute(_READ).fetchone()
        return None if row is None else CommitsPlace(id=row["id"], kind=row["kind"], address=row["address"])

    @repeatable
    def bind_commits(self, place: CommitsPlace, *, instead_of: CommitsPlace | None, by: str, now: float) -> None:
        """Say where the commits are from now on.

        Args:
            instead_of: what `commits_place` gave; when another has said something else since, nothing is changed.

        Raises:
            QueueError: when that is so, or a session works with the queue: it would go on with the place before.
        """
        with self.writing() as db:
            if self.database.dialect is POSTGRESQL:
                # Whoever begins a session does so before or after; `commits_place` then gives it what is said here.
                db.execute("LOCK TABLE sessions, commits_place IN EXCLUSIVE MODE")
            now = self.database.instant(db, now)
            row = db.execute(_READ).fetchone()
            found = None if row is None else CommitsPlace(id=row["id"], kind=row["kind"], address=row["address"])
            is_same = found is not None and found.id == place.id != (instead_of.id if instead_of else "")
            if is_same or found == place:
                return  # another has just said it, maybe by the address that the place has on his machine
            if found != instead_of:
                where = "nowhere yet" if found is None else f"in {found.shown}"
                raise QueueError(
                    f"Another process has just recorded that the commits of {self.database.name} are {where}. Set "
                    "`store` to that and start again, or see mbqueue move-commits --help"
                )
            live = at_work(self.database, db, now=now)
            if live is not None:
                raise QueueError(
                    f"Session {live.id} on {live.host} works with {self.database.name}, and with commits that "
                    f"are not in {place.address}. End it first (mbqueue stop), or let both share one store "
                    "(docs/how-to/many-machines.md)."
                )
            values = {"id": place.id, "kind": place.kind, "address": place.address, "now": now, "by": by}
            db.execute(_BIND, values)
            before = "" if found is None else f", no longer in {found.shown}"
            note(db, f"commits are in {place.shown}{before}", by=by, now=now)
