"""Take snapshots of the queue's database while it is in use, publish them, and check them before use.

A snapshot on the mount is NUMBER-DATABASE-HASH.db with its manifest, NUMBER-DATABASE-HASH.json; the manifest is written
last. mbqueue never changes a published snapshot. DATABASE is the id of the live database. NUMBER is higher than the
number of every snapshot that the database continues. HASH is the beginning of the manifest's SHA-256.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import re
import sqlite3
import time
from collections.abc import Callable, Mapping
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from mbqueue import files
from mbqueue.drive.reading import NOT_OURS, Listings, what_is_wrong
from mbqueue.drive.retention import positions_to_keep
from mbqueue.errors import QueueError, SchemaTooNew
from mbqueue.experiment import parse_spec
from mbqueue.project import NAME_PATTERN, PUBLISHED_SNAPSHOTS
from mbqueue.queue import sqlite_schema
from mbqueue.queue.edges import PRUNED
from mbqueue.queue.jobs import Event, Experiment, Job, SessionRow
from mbqueue.queue.schema import SCHEMA_VERSION
from mbqueue.storage.commits import read_described
from mbqueue.storage.manifest import Damaged
from mbqueue.storage.mounted import Drive
from mbqueue.storage.names import DUPLICATE, HASH_DIGITS, HIGHEST_FENCE, hashed_name

FORMAT = 1
#: Keep this many of the newest snapshots that count as uploaded.
KEPT = 3
#: The largest accepted snapshot, in bytes. A queue of 100,000 jobs takes 60 MB.
LARGEST_SNAPSHOT = 2 << 30
#: The time limit, in seconds, for checking a snapshot of up to `_CHECKED_IN_TIME` bytes. Larger snapshots get
#: proportionally more time.
CHECK_SECONDS = 120.0
_CHECKED_IN_TIME = 64 << 20

_STEM = r"(\d{8})-([0-9a-f]{8})"
_NAME = re.compile(rf"({_STEM}-[0-9a-f]{{{HASH_DIGITS}}}){DUPLICATE}\.(json|db)")
#: The largest priority that PostgreSQL can store.
_MOST_URGENT = 2**31 - 1
#: The latest accepted time, as a Unix timestamp: the year 8307, within the range of Python's dates.
_LATEST = 2e11
#: The highest snapshot number that fits into the eight digits of a file name.
_MOST_SNAPSHOTS = 10**8 - 1


class DamagedSnapshot(QueueError):
    """A file is not an intact snapshot of a queue's database."""


@dataclass(frozen=True, kw_only=True)
class Listing:
    """The manifest of a snapshot.

    Attributes:
        number: higher than the numbers of all snapshots that this one continues.
        database: id of the live database.
        ancestry: id of each earlier database → number of the snapshot that the next database started from.
        experiments: what `mbqueue recover` needs for each: spec, results_dir, priority, enqueued_at, prepare.
        last_event: id of the database's last event. mbqueue takes the next snapshot only after a later event.
    """

    number: int
    database: str
    ancestry: dict[str, int]
    session: str
    taken_at: float
    last_event: int
    size: int
    sha256: str
    experiments: list[dict[str, Any]]
    format: int = FORMAT

    def continues(self, other: Listing) -> bool:
        """Whether this snapshot contains everything in the snapshot ``other``."""
        return self.knew(other.number, other.database)

    def knew(self, number: int, database: str) -> bool:
        """Whether this snapshot contains everything in snapshot ``number`` of ``database``."""
        return number <= (self.number if database == self.database else self.ancestry.get(database, -1))


@dataclass(frozen=True)
class PublishedSnapshot:
    """A snapshot on the mount: the path of its files without the suffix, and its manifest."""

    base: str
    listing: Listing


def take(queue_db: Path, target: Path) -> None:
    """Copy a database that may be in use into one file, and check the copy.

    Raises:
        QueueError: if the copy is damaged, or the disk is full.
    """
    target.unlink(missing_ok=True)
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        with (
            closing(sqlite3.connect(f"{queue_db.absolute().as_uri()}?mode=ro", uri=True, timeout=30.0)) as source,
            closing(sqlite3.connect(target, isolation_level=None)) as copy,
        ):
            source.backup(copy)
            copy.execute("PRAGMA journal_mode = DELETE")
            found = copy.execute("PRAGMA integrity_check").fetchone()[0]
    except sqlite3.Error as error:
        target.unlink(missing_ok=True)
        raise QueueError(f"{queue_db} could not be copied: {error}.") from error
    if found != "ok":
        target.unlink(missing_ok=True)
        raise QueueError(f"The copy of {queue_db} is damaged: {found}. Rebuild the queue: mbqueue recover")


def check(path: Path) -> None:
    """Check that a file is an intact mbqueue database and nothing else, without running any SQL from the file.

    Raises:
        DamagedSnapshot: if the file is not an intact mbqueue database.
        SchemaTooNew: if a newer mbqueue wrote the file.
    """
    size = path.stat().st_size
    deadline = time.monotonic() + CHECK_SECONDS * max(1.0, size / _CHECKED_IN_TIME)
    if size > LARGEST_SNAPSHOT:
        raise DamagedSnapshot(f"{path} is too large for a queue.")
    try:
        with closing(
            sqlite3.connect(f"{path.absolute().as_uri()}?mode=ro&immutable=1", uri=True, isolation_level=None)
        ) as db:
            db.set_progress_handler(lambda: time.monotonic() > deadline, 100_000)
            db.execute("PRAGMA trusted_schema = OFF")
            db.execute("PRAGMA cell_size_check = ON")
            db.execute("PRAGMA query_only = ON")
            sqlite_schema.is_current(db, path=path)
            wrong = _wrong_structure(db)
            if wrong is None:
                for name, results_dir, spec in db.execute("SELECT name, results_dir, spec FROM experiments"):
                    check_experiment(name, results_dir, source=str(path))
                    parse_spec(json.loads(spec), source=f"the spec of {name} in {path}")
                _check_rows(db)
    except SchemaTooNew:
        raise
    except (sqlite3.Error, *NOT_OURS) as error:
        raise DamagedSnapshot(f"{path} is not an intact queue: {error}.") from error
    if wrong is not None:
        raise DamagedSnapshot(f"{path} {wrong}.")


def _wrong_structure(db: sqlite3.Connection) -> str | None:
    version = db.execute("PRAGMA user_version").fetchone()[0]
    if version not in range(1, SCHEMA_VERSION + 1):
        return "is not an mbqueue queue"
    if sqlite_schema.definitions(db) != sqlite_schema.expected_definitions(version):
        return "does not have the tables, triggers and views of a queue"
    found = db.execute("PRAGMA quick_check").fetchone()[0]
    return None if found == "ok" else f"is damaged: {found}"


def _job(row: sqlite3.Row) -> None:
    job = Job.from_row(row)
    if job.fence > HIGHEST_FENCE or abs(job.priority) > _MOST_URGENT:
        raise ValueError(f"{job.label} has an invalid fence or priority")
    if not all(isinstance(told, dict | None) for told in (job.progress, job.result)):
        raise TypeError(f"{job.label} has an invalid result")


#: (query, function that parses one row) for each kind of row that mbqueue reads from a queue.
_ROWS: tuple[tuple[str, Callable[[sqlite3.Row], object]], ...] = (
    ("SELECT * FROM experiments", Experiment.from_row),
    ("SELECT * FROM sessions", SessionRow.from_row),
    ("SELECT * FROM job_rows", _job),
    ("SELECT * FROM event_rows", Event.from_row),
)


def _check_rows(db: sqlite3.Connection) -> None:
    """Parse every row as the queue does, to find damaged rows before the snapshot is used."""
    db.row_factory = sqlite3.Row
    for statement, read in _ROWS:
        for row in db.execute(statement):
            read(row)
            for name in row.keys():  # noqa: SIM118 - a row is no mapping
                value = row[name]
                is_time = name == "at" or name.endswith(("_at", "_until", "_before"))
                if isinstance(value, float | int) and not (_is_time(value) if is_time else abs(value) < 2**63 - 1):
                    raise ValueError(f"it has an invalid value of {name}")


def check_experiment(name: object, results_dir: object, *, source: str) -> None:
    """Check that the name and results folder of an experiment cannot point outside the project.

    Raises:
        DamagedSnapshot: if the name or the folder is invalid.
    """
    fits = isinstance(name, str) and re.fullmatch(NAME_PATTERN, name)
    parts = PurePosixPath(results_dir).parts if isinstance(results_dir, str) else ()
    plain = all(re.fullmatch(NAME_PATTERN, part) for part in parts)
    if not (fits and plain and len(parts) >= 2 and parts[0] == "results"):
        raise DamagedSnapshot(f"{source} has an invalid experiment name or results folder: {name!r}, {results_dir!r}.")


class Snapshots:
    """The snapshots on a mount.

    Args:
        on_damaged: called once with the path and the reason for each damaged file.
    """

    def __init__(self, drive: Drive, on_damaged: Callable[[str, str], None] = lambda _path, _why: None) -> None:
        self._drive = drive
        self._listings = Listings(drive, _STEM, _listing, on_damaged)
        self._seen_at: dict[str, float] = {}

    def listed(self) -> list[PublishedSnapshot]:
        """List every snapshot with an intact manifest, oldest first, without reading its database."""
        found = itertools.starmap(PublishedSnapshot, self._listings.listed(PUBLISHED_SNAPSHOTS).items())
        return sorted(found, key=lambda one: (one.listing.number, one.listing.taken_at, one.listing.sha256))

    def fetch_newest(self, target: Path) -> PublishedSnapshot | None:
        """Copy the newest intact snapshot to a local file, and return it; return None if no snapshot is intact.

        Raises:
            SchemaTooNew: if a newer mbqueue wrote the newest snapshot; using an older snapshot would lose work.
        """
        for snapshot in reversed(self.listed()):
            listing = snapshot.listing
            paths = [path for path, base, match in self._files() if (base, match[4]) == (snapshot.base, "db")]
            try:
                content = read_described(
                    self._drive, paths, size=listing.size, sha256=listing.sha256, what="its database"
                )
                files.write_bytes(target, content)
                check(target)
            except (Damaged, DamagedSnapshot) as error:
                self._listings.tell(snapshot.base, str(error))
                target.unlink(missing_ok=True)
                continue
            return snapshot
        return None

    def publish(self, local: Path, fields: Mapping[str, Any]) -> PublishedSnapshot:
        """Write a snapshot and then its manifest to the mount, and read both back."""
        content = local.read_bytes()
        listing = Listing(**fields, size=len(content), sha256=hashlib.sha256(content).hexdigest())
        text = files.json_bytes(asdict(listing))
        base = f"{PUBLISHED_SNAPSHOTS}/{hashed_name(f'{listing.number:08d}-{listing.database}', text)}"
        self._drive.write_new(f"{base}.db", content)
        try:
            self._drive.write_new(f"{base}.json", text)
        except BaseException:
            # Remove this database, because the next attempt will use a different name.
            with contextlib.suppress(OSError):
                self._drive.remove(f"{base}.db")
            raise
        self._listings.remember(base, listing)
        return PublishedSnapshot(base, listing)

    def prune(self, newest: Listing, *, now: float, steady_since: float) -> None:
        """Remove snapshots whose content is also in ``newest``, except those that `positions_to_keep` selects.

        Leftovers older than the kept snapshots are removed too: damaged files, copies renamed by the drive, and
        databases without a manifest.

        Args:
            now, steady_since: see `mbqueue.drive.retention`.
        """
        ours = [one for one in self.listed() if newest.continues(one.listing)]
        self._seen_at = {one.base: self._seen_at.get(one.base, now) for one in ours}
        positions = sorted(positions_to_keep([*self._seen_at.values()], now, kept=KEPT, steady_since=steady_since))
        kept, oldest = {ours[position].base for position in positions}, ours[positions[0]].listing.number
        replaced = {one.base for one in ours} - kept
        there = self._files()
        for suffix in ("json", "db"):  # remove manifests first, so that each listed snapshot has its database
            for path, base, match in there:
                is_before = int(match[2]) < oldest and newest.knew(int(match[2]), match[3])
                if match[4] == suffix and (is_before or base in replaced):
                    self._drive.remove(path)

    def _files(self) -> list[tuple[str, str, re.Match[str]]]:
        """List the files of all snapshots as (path, path of the snapshot, parsed name)."""
        matches = filter(None, map(_NAME.fullmatch, self._drive.names(PUBLISHED_SNAPSHOTS)))
        return [(f"{PUBLISHED_SNAPSHOTS}/{one[0]}", f"{PUBLISHED_SNAPSHOTS}/{one[1]}", one) for one in matches]


def _listing(parts: Any, path: str) -> Listing:
    if parts["format"] > FORMAT:
        raise QueueError(f"{path} was written by a newer mbqueue. Update mbqueue.")
    listing = Listing(**{key: parts[key] for key in Listing.__dataclass_fields__})
    counts = (listing.number, listing.last_event, listing.size, *listing.ancestry.values())
    if not all(isinstance(count, int) and 0 <= count <= LARGEST_SNAPSHOT for count in counts):
        raise QueueError(f"{path} contains invalid numbers.")
    if max([listing.number, *listing.ancestry.values()]) > _MOST_SNAPSHOTS:
        raise QueueError(f"{path} has an invalid snapshot number.")
    if not (isinstance(listing.sha256, str) and isinstance(listing.database, str)):
        raise QueueError(f"{path} is not the manifest of a snapshot.")
    if not _is_time(listing.taken_at):
        raise QueueError(f"{path} is not the manifest of a snapshot.")
    for one in listing.experiments:
        check_enqueued(one, source=path)
    if not path.startswith(f"{PUBLISHED_SNAPSHOTS}/{listing.number:08d}-{listing.database}-"):
        raise QueueError(f"{path} is the manifest of a different snapshot.")
    return listing


def _is_time(value: object) -> bool:
    return isinstance(value, float | int) and 0 <= value < _LATEST


def check_enqueued(one: Mapping[str, Any], *, source: str) -> None:
    """Check an experiment's record in a file before the experiment is enqueued from it.

    Raises:
        DamagedSnapshot: if the record is damaged, or written by a newer mbqueue.
    """
    try:
        spec = parse_spec(one["spec"], source=source)
        check_experiment(spec.name, one["results_dir"], source=source)
        is_known = isinstance(one["priority"], int) and abs(one["priority"]) <= _MOST_URGENT
        is_known = is_known and _is_time(one["enqueued_at"])
        is_known = is_known and (one["prepare"] is None or isinstance(one["prepare"]["dataset_hash"], str))
        is_known = is_known and one.get("pruned", PRUNED).startswith(PRUNED)
    except DamagedSnapshot:
        raise
    except NOT_OURS as error:
        raise DamagedSnapshot(f"{source} contains an unreadable experiment record: {what_is_wrong(error)}") from error
    if not is_known:
        raise DamagedSnapshot(f"{source} contains an invalid experiment record.")
