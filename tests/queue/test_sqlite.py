"""Queue files that are old, too new, damaged or read-only."""

from __future__ import annotations

import sqlite3
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from pathlib import Path

import pytest
from small_project import make_newer

from mbqueue.errors import QueueDamaged, QueueError, SchemaTooNew
from mbqueue.queue import Queue, schema, sqlite_schema
from mbqueue.queue.sqlite import settle
from mbqueue.queue.transitions import TRANSITIONS

FIXTURES = Path(__file__).parent / "fixtures"


@pytest.fixture
def open_queue(tmp_path) -> Iterator[Callable[[], Queue]]:
    """Open queues as in conftest, but only on SQLite."""
    with ExitStack() as stack:
        yield lambda: stack.enter_context(Queue(tmp_path / "state" / "queue.db"))


def _path(world) -> Path:
    return world.queue.database.path


def _sql(path, statement):
    connection = sqlite3.connect(path)
    try:
        rows = connection.execute(statement).fetchall()
        connection.commit()
        return rows
    finally:
        connection.close()


def _schema_of(path):
    with closing(sqlite3.connect(path)) as connection:
        return sqlite_schema.definitions(connection)


def test_opening_creates_the_folder_and_a_durable_database(tmp_path):
    with Queue(tmp_path / "state" / "queue.db") as queue, queue.writing() as db:
        assert db.execute("PRAGMA journal_mode").fetchone()[0] == "wal"
        assert db.execute("PRAGMA synchronous").fetchone()[0] == 2
        assert db.execute("PRAGMA foreign_keys").fetchone()[0] == 1


def test_migrations_are_recorded(world):
    names = [name for (name,) in _sql(_path(world), "SELECT name FROM _sqlite_migrations")]
    assert names[:4] == ["0001_queue", "0002_adopting", "0003_commits_place", "0004_claiming_next"]
    assert len(names) == schema.SCHEMA_VERSION
    assert _sql(_path(world), "PRAGMA user_version") == [(schema.SCHEMA_VERSION,)]


def test_pages_are_small(world):
    assert _sql(_path(world), "PRAGMA page_size") == [(2048,)]


@pytest.mark.parametrize("version", range(1, schema.SCHEMA_VERSION + 1))
def test_a_database_of_every_version_opens_and_works(tmp_path, version):
    path = tmp_path / "queue.db"
    connection = sqlite3.connect(path)
    connection.executescript((FIXTURES / f"schema_{version}.sql").read_text(encoding="utf-8"))
    connection.close()
    with Queue(path) as queue, Queue(tmp_path / "new.db") as new:
        assert _schema_of(path) == _schema_of(new.database.path)
        (running, failed) = (job for job in queue.jobs() if job.state in {"leased", "failed"})
        assert (running.label, running.progress, running.preemptions) == ("full fold 0 epoch 2", {"step": 40}, 1)
        assert (failed.label, failed.error, failed.failures) == (
            "full fold 1 epoch 1",
            "Traceback\nValueError: bang",
            1,
        )
        assert queue.experiment("full").dataset_hash == "d" * 64
        now = 1_000_000_000.0
        session = queue.start_session(device="cpu", now=now, alive_seconds=60)
        lease = queue.claim(session, now=now, lease_seconds=60)
        assert (lease.job.id, lease.fence) == (running.id, running.fence + 1)
        queue.commit(lease, result={"val_mae": 0.1}, now=now)
        fold = queue.overview(now=now)["experiments"][0]["folds"][0]
        assert fold["val_mae"] == [0.05, 0.1]
        rows = set(_sql(path, "SELECT from_state, to_state, reason FROM transitions"))
        assert rows == {(row.from_state.value, row.to_state.value, row.reason) for row in TRANSITIONS}


@pytest.mark.parametrize("version", range(1, schema.SCHEMA_VERSION + 1))
def test_the_definitions_of_every_version_are_known(tmp_path, version):
    """mbqueue accepts a snapshot from an earlier version only if its definitions are exactly those of that version."""
    with closing(sqlite3.connect(tmp_path / "queue.db")) as connection:
        connection.executescript((FIXTURES / f"schema_{version}.sql").read_text(encoding="utf-8"))
        assert sqlite_schema.definitions(connection) == sqlite_schema.expected_definitions(version)


def test_the_table_of_transitions_in_the_newest_fixture_is_the_one_in_the_code(tmp_path):
    # If you change the table, increase SCHEMA_VERSION; otherwise existing databases keep the old table.
    path = tmp_path / "queue.db"
    connection = sqlite3.connect(path)
    connection.executescript((FIXTURES / f"schema_{schema.SCHEMA_VERSION}.sql").read_text(encoding="utf-8"))
    connection.close()
    assert set(_sql(path, "SELECT from_state, to_state, reason FROM transitions")) == {
        (row.from_state.value, row.to_state.value, row.reason) for row in TRANSITIONS
    }


@pytest.mark.parametrize("read_only", [False, True])
def test_a_newer_database_is_refused_and_left_as_it_is(world, read_only):
    path = _path(world)
    world.queue.close()
    make_newer(path)
    before = path.read_bytes()
    newer = schema.SCHEMA_VERSION + 1
    with pytest.raises(SchemaTooNew, match=rf"schema version {newer}.*pip install --upgrade mbqueue"):
        Queue(path, read_only=read_only)
    assert path.read_bytes() == before


@pytest.mark.parametrize("read_only", [False, True])
def test_a_version_with_a_flipped_bit_is_not_mistaken_for_a_newer_mbqueues(world, read_only):
    path = _path(world)
    world.queue.close()
    _sql(path, f"PRAGMA user_version = {schema.SCHEMA_VERSION + (1 << 24)}")
    with pytest.raises(QueueDamaged, match="mbqueue recover"):
        Queue(path, read_only=read_only)


def test_an_interrupted_creation_is_completed_at_the_next_opening(tmp_path):
    path = tmp_path / "queue.db"
    _sql(path, "PRAGMA journal_mode = WAL")  # creating a queue begins with this statement
    with Queue(path) as queue:
        assert queue.jobs() == ()


def test_many_processes_may_create_the_database_at_once(tmp_path):
    script = f"from pathlib import Path; from mbqueue.queue import Queue; Queue(Path({str(tmp_path / 'queue.db')!r}))"
    processes = [subprocess.Popen([sys.executable, "-c", script]) for _ in range(6)]
    assert [process.wait() for process in processes] == [0] * 6
    assert len(_sql(tmp_path / "queue.db", "SELECT name FROM _sqlite_migrations")) == schema.SCHEMA_VERSION


def _overwrite_header(path):
    path.write_bytes(b"not a database at all" * 500)


def _overwrite_middle(path):
    content = bytearray(path.read_bytes())
    content[4096:] = b"\x5a" * (len(content) - 4096)
    path.write_bytes(bytes(content))


def _truncate(path):
    path.write_bytes(path.read_bytes()[:5000])


@pytest.mark.parametrize("damage", [_overwrite_header, _overwrite_middle, _truncate])
@pytest.mark.parametrize("read_only", [False, True])
def test_a_damaged_database_is_an_error_that_says_what_to_do(world, damage, read_only):
    world.enqueue()
    path = _path(world)
    world.queue.close()
    damage(path)
    with pytest.raises(QueueError, match=r"is damaged.*mbqueue recover"):
        Queue(path, read_only=read_only).jobs()


def test_reading_needs_a_queue_that_exists(tmp_path):
    with pytest.raises(QueueError, match=r"no queue at .*mbqueue enqueue"):
        Queue(tmp_path / "queue.db", read_only=True)
    assert list(tmp_path.iterdir()) == []


def test_a_reader_cannot_write(world):
    world.enqueue()
    with Queue(_path(world), read_only=True) as reader:
        assert reader.jobs() == world.queue.jobs()
        with pytest.raises(QueueError, match="cannot be opened or written"):
            reader.pause("full", now=world.now)
    assert not world.queue.experiment("full").paused


def test_a_reader_brings_an_old_database_up_to_date_first(tmp_path):
    path = tmp_path / "queue.db"
    _sql(path, "PRAGMA user_version = 0")
    with Queue(path, read_only=True) as reader:
        assert reader.jobs() == ()


def test_paths_with_odd_characters_work(tmp_path):
    path = tmp_path / "my drive?mode=ro#1 %41 ü" / "queue.db"
    with Queue(path) as queue:
        assert queue.jobs() == ()
    assert path.exists()


def test_a_database_locked_for_too_long_is_an_error_that_says_so(world, monkeypatch):
    monkeypatch.setattr("mbqueue.queue.sqlite.BUSY_SECONDS", 0.05)
    blocker = sqlite3.connect(_path(world), isolation_level=None)
    blocker.execute("BEGIN IMMEDIATE")
    with Queue(_path(world)) as queue, pytest.raises(QueueError, match="locked by another process"):
        queue.start_session(device="cpu", now=world.now, alive_seconds=60)
    blocker.close()


def test_importing_and_reading_the_queue_imports_nothing_heavy(world):
    world.enqueue()
    script = (
        "import sys; from pathlib import Path; from mbqueue.queue import Queue; "
        f"Queue(Path({str(_path(world))!r}), read_only=True).overview(now=1.0); "
        "heavy = {'torch', 'numpy', 'pandas', 'pydantic', 'filelock', 'pymatgen'} & set(sys.modules); "
        "assert not heavy, heavy"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_a_database_is_settled_into_one_file_or_refused(tmp_path: Path) -> None:
    path = tmp_path / "queue.db"
    held = sqlite3.connect(path)
    held.execute("PRAGMA journal_mode = WAL")
    held.execute("CREATE TABLE facts (number)")
    held.execute("INSERT INTO facts VALUES (1)")
    held.commit()
    held.execute("BEGIN")
    held.execute("SELECT * FROM facts").fetchall()
    with sqlite3.connect(path) as other:
        other.execute("INSERT INTO facts VALUES (2)")
    other.close()
    with pytest.raises(QueueError, match="in use"):
        settle(path, busy_seconds=0.1)
    held.close()
    settle(path)
    assert [entry.name for entry in tmp_path.iterdir()] == ["queue.db"]
    again = sqlite3.connect(path)
    assert again.execute("SELECT count(*) FROM facts").fetchone() == (2,)
    again.close()
