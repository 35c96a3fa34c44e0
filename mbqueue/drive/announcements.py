"""Announce a session to sessions that use other databases of the same project, with small files on the mount.

Each announcement is a new file, SESSION-NUMBER.json. After each announcement, a session removes the previous one.
Announcements are only hints, because locks do not work on a mount. If two sessions train the same fold, mbqueue merges
their commits.

The clocks of two machines can differ by hours. Each machine therefore uses its own clock, and counts a session as live
for a while after seeing its newest announcement. A machine uses the times in an announcement only the first time that
it sees the announced session.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from typing import Any

from mbqueue.clock import Clock
from mbqueue.drive.reading import NOT_OURS
from mbqueue.project import PUBLISHED_SESSIONS
from mbqueue.queue.jobs import SeenSession, SessionRow
from mbqueue.queue.processes import is_known_dead
from mbqueue.storage.mounted import Drive
from mbqueue.storage.names import DUPLICATE

FORMAT = 1
LARGEST = 1 << 20
#: A session counts as live for this many seconds after its latest announcement was seen. Uploads may take minutes.
ALIVE_SECONDS = 300.0
_FORGOTTEN_SECONDS = 7 * 86_400.0
_NAME = re.compile(rf"([0-9TZ]{{10,30}}-[0-9a-f]{{6}})-(\d{{6,9}}){DUPLICATE}\.json")


@dataclass(frozen=True, kw_only=True)
class Announcement:
    """The announcement of a session.

    Attributes:
        number: 1 for the session's first announcement, 2 for the second, and so on.
        database: id of the live database that the session uses.
        folds: (experiment, fold) pairs that the session is working on.
        ended: why the session ended, or None.
    """

    session: SeenSession
    number: int
    database: str
    written_at: float
    folds: list[tuple[str, int]]
    ended: str | None
    format: int = FORMAT


@dataclass(frozen=True)
class _Heard:
    """When this machine last saw a new announcement from a session, in seconds on its own monotonic clock."""

    number: int
    at: float
    alive_until: float


class Announcements:
    """Reads all announcements on a mount, and writes those of one session."""

    def __init__(self, drive: Drive, session: str, database: str, *, clock: Clock) -> None:
        self._drive, self._session, self._database, self._clock = drive, session, database, clock
        self._number = 0
        self._known: dict[str, Announcement] = {}
        self._heard: dict[str, _Heard] = {}

    def announce(self, row: SessionRow, folds: Iterable[tuple[str, int]], *, ended: str | None) -> None:
        """Announce the folds that the session is working on, or why it ended."""
        now = self._clock.now()
        seen = {key: getattr(row, key) for key in SeenSession.__dataclass_fields__}
        seen |= {"heartbeat_at": now, "alive_until": now + ALIVE_SECONDS}
        self._number += 1
        announcement = Announcement(
            session=SeenSession(**seen),
            number=self._number,
            database=self._database,
            written_at=now,
            folds=sorted(folds),
            ended=ended,
        )
        text = json.dumps(asdict(announcement), allow_nan=False).encode()
        self._drive.write_new(f"{PUBLISHED_SESSIONS}/{self._session}-{self._number:06d}.json", text)
        for name in self._drive.names(PUBLISHED_SESSIONS):
            match = _NAME.fullmatch(name)
            if match and match[1] == self._session and int(match[2]) < self._number:
                self._drive.remove(f"{PUBLISHED_SESSIONS}/{name}")

    def others(self) -> list[Announcement]:
        """Return the newest announcement of every live session that uses another database.

        The times in the returned announcements are converted to this machine's clock. Announcements older than a week
        are removed from the mount.
        """
        now, mono = self._clock.now(), self._clock.monotonic()
        newest: dict[str, Announcement] = {}
        for name in self._drive.names(PUBLISHED_SESSIONS):
            match = _NAME.fullmatch(name)
            if not match or match[1] == self._session:
                continue
            found = self._known.get(name) or self._read(name)
            if found is None or found.session.id != match[1]:
                continue
            self._known[name] = found
            if found.written_at < now - _FORGOTTEN_SECONDS:
                self._drive.remove(f"{PUBLISHED_SESSIONS}/{name}")
            elif found.session.id not in newest or newest[found.session.id].number < found.number:
                newest[found.session.id] = found
        living = []
        for _, found in sorted(newest.items()):
            heard = self._hear(found, now, mono)
            # Skip sessions that use this machine's database, because its queue already lists them.
            if found.ended is not None or found.database == self._database or heard.alive_until <= mono:
                continue
            if not is_known_dead(found.session.identity):
                until = now + heard.alive_until - mono
                session = replace(found.session, heartbeat_at=now - (mono - heard.at), alive_until=until)
                living.append(replace(found, session=session))
        return living

    def _hear(self, found: Announcement, now: float, mono: float) -> _Heard:
        before = self._heard.get(found.session.id)
        if before is None or found.number > before.number:
            # A second announcement shows that a session is alive, even if its clock is wrong.
            seconds = ALIVE_SECONDS if before else min(ALIVE_SECONDS, found.session.alive_until - now)
            before = self._heard[found.session.id] = _Heard(found.number, mono, mono + seconds)
        return before

    def _read(self, name: str) -> Announcement | None:
        # Ignore a damaged or partly uploaded announcement, because the session soon writes another.
        try:
            return _announcement(json.loads(self._drive.read(f"{PUBLISHED_SESSIONS}/{name}", at_most=LARGEST)))
        except (FileNotFoundError, *NOT_OURS):
            return None


def _announcement(parts: Any) -> Announcement:
    told = parts["session"]
    seen = SeenSession(**{key: told[key] for key in SeenSession.__dataclass_fields__})
    times = (seen.started_at, seen.heartbeat_at, seen.alive_until, parts["written_at"])
    if not all(isinstance(value, float | int) and 0 <= value < 1e12 for value in times):
        raise ValueError("its times are invalid")
    if not (isinstance(seen.deadline_at, float | int | None) and isinstance(seen.pid, int)):
        raise TypeError("not an announcement")
    if not all(isinstance(text, str) for text in (seen.id, seen.host, seen.device)):
        raise TypeError("not an announcement")
    return Announcement(
        session=seen,
        number=int(parts["number"]),
        database=str(parts["database"]),
        written_at=float(parts["written_at"]),
        folds=[(str(experiment), int(fold)) for experiment, fold in parts["folds"]],
        ended=None if parts["ended"] is None else str(parts["ended"]),
    )
