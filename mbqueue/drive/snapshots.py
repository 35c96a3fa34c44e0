"""Sealed snapshots of the queue's database: taken while it is used, published as a file that never changes, and
checked as the untrusted data that they are before one is ever used.

Names on the mount: NUMBER-DATABASE-HASH.db and .json beside it, written last. DATABASE is the id of the live database
that it was taken of, NUMBER grows with every snapshot that its database knows of, HASH begins the manifest's SHA-256.
"""

from __future__ import annotations

import hashlib
import json
import re
import sqlite3
import time
from collections.abc import Callable, Mapping
from contextlib import closing
from dataclasses import asdict, dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from mbqueue import files
from mbqueue.drive.mounted import Drive, is_about_one_file
from mbqueue.errors import MbqueueError, QueueError, SchemaTooNew
from mbqueue.experiment import NAME_PATTERN, parse_spec
from mbqueue.queue import schema

FORMAT = 1
SNAPSHOTS = "state/snapshots"
#: So many snapshots of one line of databases are kept.
KEPT = 3
#: No snapshot is larger: a queue of 100,000 jobs takes 60 MB.
LARGEST_SNAPSHOT = 2 << 30
LARGEST_LISTING = 16 << 20
#: Checking a snapshot must not take longer than this, whatever is in it.
CHECK_SECONDS = 120.0

_NAME = re.compile(r"(\d{8})-([0-9a-f]{8})-([0-9a-f]{12})(?: \(\d{1,4}\))?\.json")


class DamagedSnapshot(QueueError):
    """A file that is no whole snapshot of a queue's database."""


@dataclass(frozen=True, kw_only=True)
class Listing:
    """The manifest of a snapshot.

    Attributes:
        number: grows along a line of databases.
        database: id of the live database.
        ancestry: database id → number of the snapshot from which a later database of this line went on.
        experiments: what `mbqueue recover` needs of each: spec, results_dir, priority, enqueued_at, prepare.
        last_event: id of the database's last event; only one with more events is worth another snapshot.
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
        """Whether everything that the other snapshot knows was known to the database of this one."""
        if other.database == self.database:
            return other.number <= self.number
        return other.number <= self.ancestry.get(other.database, -1)


@dataclass(frozen=True)
class PublishedSnapshot:
    """A snapshot on the mount: the path of its files without the suffix, and its manifest."""

    base: str
    listing: Listing
    content: bytes = field(repr=False)


def take(queue_db: Path, target: Path) -> None:
    """Copy a database that may be in use into one file, whole and checked.

    Raises:
        QueueError: when the copy is not whole, or there is no room for it.
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
        raise QueueError(f"The copy of {queue_db} is not whole: {found}. Rebuild the queue: mbqueue recover")


def check(path: Path) -> None:
    """Make sure that a file is a whole database of this program and nothing else; runs nothing that is in it.

    Raises:
        DamagedSnapshot: when it is not.
        SchemaTooNew: when a newer mbqueue wrote it.
    """
    deadline = time.monotonic() + CHECK_SECONDS
    if path.stat().st_size > LARGEST_SNAPSHOT:
        raise DamagedSnapshot(f"{path} is larger than any queue.")
    try:
        with closing(
            sqlite3.connect(f"{path.absolute().as_uri()}?mode=ro&immutable=1", uri=True, isolation_level=None)
        ) as db:
            db.set_progress_handler(lambda: time.monotonic() > deadline, 100_000)
            db.execute("PRAGMA trusted_schema = OFF")
            db.execute("PRAGMA cell_size_check = ON")
            db.execute("PRAGMA query_only = ON")
            schema.is_current(db, path=path)
            version = db.execute("PRAGMA user_version").fetchone()[0]
            if version not in range(1, schema.SCHEMA_VERSION + 1):
                raise DamagedSnapshot(f"{path} is not a queue of mbqueue.")
            if schema.definitions(db) != schema.expected_definitions(version):
                raise DamagedSnapshot(f"{path} has tables, triggers or views that are not those of a queue.")
            found = db.execute("PRAGMA quick_check").fetchone()[0]
            if found != "ok":
                raise DamagedSnapshot(f"{path} is damaged: {found}.")
            for name, results_dir, spec in db.execute("SELECT name, results_dir, spec FROM experiments"):
                check_experiment(name, results_dir, source=str(path))
                parse_spec(json.loads(spec), source=f"the spec of {name} in {path}")
    except SchemaTooNew:
        raise
    except (sqlite3.Error, ValueError, RecursionError, MbqueueError) as error:
        raise (
            error if isinstance(error, DamagedSnapshot) else DamagedSnapshot(f"{path} is not a whole queue: {error}.")
        ) from error


def check_experiment(name: object, results_dir: object, *, source: str) -> None:
    """Refuse names that would lead out of the project.

    Raises:
        DamagedSnapshot: for such a name.
    """
    fits = isinstance(name, str) and re.fullmatch(NAME_PATTERN, name)
    parts = PurePosixPath(results_dir).parts if isinstance(results_dir, str) else ()
    plain = all(re.fullmatch(NAME_PATTERN, part) for part in parts)
    if not (fits and plain and len(parts) >= 2 and parts[0] == "results"):
        raise DamagedSnapshot(f"{source} names an experiment {name!r} with results in {results_dir!r}: not ours.")


class Snapshots:
    """The snapshots on a mount.

    Args:
        on_damaged: told the path and the reason of each file that is not what it should be, once each.
    """

    def __init__(self, drive: Drive, on_damaged: Callable[[str, str], None] = lambda _path, _why: None) -> None:
        self._drive = drive
        self._on_damaged = on_damaged
        self._known: dict[str, PublishedSnapshot] = {}
        self._told: set[str] = set()

    def listed(self) -> list[PublishedSnapshot]:
        """Every snapshot with a whole manifest, the oldest first. The databases are not looked at."""
        found = {}
        for name in self._drive.names(SNAPSHOTS):
            match = _NAME.fullmatch(name)
            if not match:
                continue
            base = f"{SNAPSHOTS}/{match[1]}-{match[2]}-{match[3]}"
            snapshot = self._known.get(base) or self._read(f"{SNAPSHOTS}/{name}", base, match[3])
            if snapshot is not None:
                self._known[base] = found[base] = snapshot
        return sorted(found.values(), key=lambda one: (one.listing.number, one.listing.taken_at, one.listing.sha256))

    def fetch_newest(self, target: Path) -> PublishedSnapshot | None:
        """Copy the newest snapshot that is whole to a local file; None when there is none.

        Raises:
            SchemaTooNew: when a newer mbqueue wrote it: an older one must not be taken instead.
        """
        for snapshot in reversed(self.listed()):
            content = self._content(snapshot)
            if content is None:
                continue
            files.write_bytes(target, content)
            try:
                check(target)
            except DamagedSnapshot as error:
                self._tell(snapshot.base, str(error))
                target.unlink()
                continue
            return snapshot
        return None

    def publish(self, local: Path, facts: Mapping[str, Any]) -> PublishedSnapshot:
        """Write a snapshot and then its manifest to the mount, both read back."""
        content = local.read_bytes()
        listing = Listing(**facts, size=len(content), sha256=hashlib.sha256(content).hexdigest())
        text = (json.dumps(asdict(listing), indent=2, allow_nan=False, ensure_ascii=False) + "\n").encode()
        digits = hashlib.sha256(text).hexdigest()[:12]
        base = f"{SNAPSHOTS}/{listing.number:08d}-{listing.database}-{digits}"
        self._drive.write_new(f"{base}.db", content)
        self._drive.write_new(f"{base}.json", text)
        self._known[base] = PublishedSnapshot(base, listing, text)
        return self._known[base]

    def prune(self, newest: Listing) -> None:
        """Remove all but the newest few of those that a published snapshot continues."""
        ours = [one for one in self.listed() if newest.continues(one.listing)]
        for snapshot in ours[:-KEPT]:
            for suffix in (".json", ".db"):
                self._drive.remove(snapshot.base + suffix)
            self._known.pop(snapshot.base, None)

    def _content(self, snapshot: PublishedSnapshot) -> bytes | None:
        listing, name = snapshot.listing, PurePosixPath(snapshot.base).name
        pattern = re.compile(re.escape(name) + r"(?: \(\d{1,4}\))?\.db")
        why = "its database is missing"
        for candidate in self._drive.names(SNAPSHOTS):
            if not pattern.fullmatch(candidate):
                continue
            try:
                content = self._drive.read(f"{SNAPSHOTS}/{candidate}", at_most=listing.size)
            except OSError as error:
                if not is_about_one_file(error):
                    raise
                why = str(error)
                continue
            if len(content) == listing.size and hashlib.sha256(content).hexdigest() == listing.sha256:
                return content
            why = f"its database is cut off or damaged ({len(content)} of {listing.size} bytes)"
        self._tell(snapshot.base, why)
        return None

    def _read(self, path: str, base: str, digits: str) -> PublishedSnapshot | None:
        try:
            content = self._drive.read(path, at_most=LARGEST_LISTING)
            if hashlib.sha256(content).hexdigest()[:12] != digits:
                self._tell(path, "it is cut off or damaged: its content does not fit its name")
                return None
            listing = _listing(json.loads(content), path)
        except OSError as error:
            if not is_about_one_file(error):
                raise
            self._tell(path, str(error))
            return None
        except (ValueError, TypeError, KeyError, RecursionError, QueueError) as error:
            self._tell(path, str(error))
            return None
        return PublishedSnapshot(base, listing, content)

    def _tell(self, path: str, why: str) -> None:
        if path not in self._told:
            self._told.add(path)
            self._on_damaged(path, why)


def _listing(parts: Any, path: str) -> Listing:
    if parts["format"] > FORMAT:
        raise QueueError(f"{path} was written by a newer mbqueue. Update mbqueue.")
    listing = Listing(**{key: parts[key] for key in Listing.__dataclass_fields__})
    counts = (listing.number, listing.last_event, listing.size, *listing.ancestry.values())
    if not all(isinstance(count, int) and 0 <= count <= LARGEST_SNAPSHOT for count in counts):
        raise QueueError(f"{path} has impossible numbers.")
    if not (isinstance(listing.sha256, str) and isinstance(listing.database, str)):
        raise QueueError(f"{path} is not the manifest of a snapshot.")
    if not isinstance(listing.taken_at, float | int):
        raise QueueError(f"{path} is not the manifest of a snapshot.")
    for one in listing.experiments:
        check_enqueued(one, source=path)
    return listing


def check_enqueued(one: Mapping[str, Any], *, source: str) -> None:
    """Check what a file says of an experiment before it is enqueued.

    Raises:
        QueueError, SpecError: when it is not what mbqueue writes.
    """
    spec = parse_spec(one["spec"], source=source)
    check_experiment(spec.name, one["results_dir"], source=source)
    if not isinstance(one["priority"], int) or not isinstance(one["enqueued_at"], float | int):
        raise DamagedSnapshot(f"{source} is not what mbqueue writes of an experiment.")
    prepare = one["prepare"]
    if prepare is not None and not isinstance(prepare.get("dataset_hash"), str):
        raise DamagedSnapshot(f"{source} is not what mbqueue writes of an experiment.")
