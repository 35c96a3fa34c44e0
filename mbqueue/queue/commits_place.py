"""Record where the commits of a queue are stored. All sessions must store their commits at the same location."""

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
    """The location where commits are stored: an object store, or a folder on a disk.

    Attributes:
        id: identifies the location even if its address or mount point changes; also stored at the location itself.
        address: the address when the location was recorded; a URL without secrets, or HOST:FOLDER. Messages show it.
    """

    id: str
    kind: Literal["store", "folder"]
    address: str

    @property
    def shown(self) -> str:
        """The address and the id, as shown in messages."""
        return f"{self.address} (id {self.id})"


class CommitsPlaces(Part):
    @repeatable
    def commits_place(self) -> CommitsPlace | None:
        """The location of the commits; None until a session records one."""
        with self.reading() as db:
            row = db.execute(_READ).fetchone()
        return None if row is None else CommitsPlace(id=row["id"], kind=row["kind"], address=row["address"])

    @repeatable
    def bind_commits(self, place: CommitsPlace, *, instead_of: CommitsPlace | None, by: str, now: float) -> None:
        """Record the new location of the commits.

        Args:
            instead_of: the location that `commits_place` returned and that the queue must still record.

        Raises:
            QueueError: if another process has recorded a different location in the meantime, or if a running session
                would keep using the old one.
        """
        with self.writing() as db:
            if self.database.dialect is POSTGRESQL:
                # A session that starts now waits for this lock, then reads the new location.
                db.execute("LOCK TABLE sessions, commits_place IN EXCLUSIVE MODE")
            now = self.database.instant(db, now)
            row = db.execute(_READ).fetchone()
            found = None if row is None else CommitsPlace(id=row["id"], kind=row["kind"], address=row["address"])
            is_same = found is not None and found.id == place.id != (instead_of.id if instead_of else "")
            if is_same or found == place:
                return  # another process has just recorded this location, maybe with a different address
            if found != instead_of:
                where = "not stored anywhere yet" if found is None else f"in {found.shown}"
                raise QueueError(
                    f"Another process has just recorded that the commits of {self.database.name} are {where}. Set "
                    "`store` to that place and start again, or see mbqueue move-commits --help"
                )
            live = at_work(self.database, db, now=now)
            if live is not None:
                raise QueueError(
                    f"Session {live.id} on {live.host} is using {self.database.name} but storing its commits outside "
                    f"{place.address}. End that session first (mbqueue stop), or let both sessions share one store "
                    "(docs/how-to/many-machines.md)."
                )
            values = {"id": place.id, "kind": place.kind, "address": place.address, "now": now, "by": by}
            db.execute(_BIND, values)
            before = "" if found is None else f", no longer in {found.shown}"
            note(db, f"commits are in {place.shown}{before}", by=by, now=now)
