"""Copying a queue to PostgreSQL and back."""

from __future__ import annotations

import re
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from shutil import rmtree

import pytest
from postgres_server import PostgresServer as RunningServer
from processes import holding_open, run
from small_project import ManualClock, make_project
from stepped_session import LocalProject

from mbqueue import Project, mounts
from mbqueue.errors import QueueError, QueueMoved, UsageError
from mbqueue.project import ProjectFolder, find_project
from mbqueue.queue import Queue
from mbqueue.queue.commits_place import CommitsPlace
from mbqueue.queue.dialect import POSTGRESQL, SQLITE
from mbqueue.queue.migrating import copy_queue, copy_to_file, rows_of
from mbqueue.queue.opening import open_on_server, open_queue
from mbqueue.queue.postgresql.address import parse_address
from mbqueue.queue.postgresql.server import PostgresServer
from mbqueue.queue.processes import identity_of
from mbqueue.queue.schema import TABLES
from mbqueue.queue.sqlite import SqliteFile


def dump(queue: Queue) -> dict[str, list[dict]]:
    with queue.reading() as db:
        return {table: list(rows_of(db, table)) for table in TABLES}


@pytest.fixture
def used(tmp_path: Path, make_spec) -> ProjectFolder:
    """A project whose queue has jobs in every state, sessions that ended, errors and progress."""
    project = make_project(tmp_path / "project")
    with Queue(project.queue_db) as queue:
        queue.enqueue(make_spec("a", folds=(0, 1, 2), epochs=3), results_dir="ra", now=1.0, priority=2)
        place = CommitsPlace(id="0123456789abcdef", kind="store", address="s3://bucket/prefix")
        queue.bind_commits(place, instead_of=None, by="test", now=1.5)
        queue.enqueue(make_spec("b", folds=(0,), epochs=0), results_dir="rb", now=2.0)
        session = queue.start_session(device="cpu ü", now=3.0, alive_seconds=60, deadline_at=99.5)
        take = lambda: queue.claim(session, now=4.25, lease_seconds=60)  # noqa: E731
        queue.commit(take(), result={"dataset_hash": "d", "val_mae": 1 / 3, "seconds": 0.1}, now=5.0)
        queue.commit(take(), result={"val_mae": 1e-300, "note": "Å \\u0000"}, now=6.0)
        queue.save_progress(take(), progress={"step": 7})
        queue.end_session(session, reason="deadline", now=7.0)
        session = queue.start_session(device="cpu", now=8.0, alive_seconds=60)
        queue.commit(take(), result={"val_mae": 0.25}, skip_rest="no better", now=9.0)
        queue.fail(take(), error="Traceback\nValueError: bang", now=10.0, final=True)
        queue.fail(take(), error="Traceback\nValueError: again", now=10.5)
        queue.cancel("b", now=11.0)
        queue.pause("a", fold=2, now=12.0)
        queue.end_session(session, reason="done", now=13.0)
    return project


@pytest.fixture
def url(postgres_server: RunningServer) -> str:
    return postgres_server.url()


def test_a_queue_comes_back_from_postgresql_with_the_same_rows(used, url):
    with Queue(used.queue_db) as queue:
        before = dump(queue)
    made = Project(used.root).migrate_queue(url)
    assert made.rows == {table: len(rows) for table, rows in before.items()}
    with open_on_server(url) as queue:
        assert dump(queue) == before
        queue.verify()  # `verify` also checks that the triggers are enabled
        with pytest.raises(QueueError, match="never deleted"), queue.writing() as db:
            db.execute("DELETE FROM jobs")
    (used.root / "mbqueue.toml").write_text(f'queue = "{url}"\n')
    Project(used.root).migrate_queue("sqlite")
    with Queue(used.queue_db) as queue:
        assert dump(queue) == before
        queue.verify()
        with pytest.raises(QueueError, match="never deleted"), queue.writing() as db:
            db.execute("DELETE FROM jobs")


def test_a_copied_queue_continues_with_new_ids_and_the_fences_it_had(used, url, make_spec):
    Project(used.root).migrate_queue(url)
    with open_on_server(url) as queue:
        known = {job.id: job.fence for job in queue.jobs()}
        queue.enqueue(make_spec("c", folds=(0,), epochs=0), results_dir="rc", now=20.0)
        assert not known.keys() & {job.id for job in queue.jobs(experiment="c")}
        queue.retry("a", now=21.0)
        session = queue.start_session(device="cpu", now=22.0, alive_seconds=60)
        lease = queue.claim(session, now=22.0, lease_seconds=60)
        assert lease.fence == known[lease.job.id] + 1


def test_a_queue_that_a_session_works_with_is_not_copied(used, url):
    with Queue(used.queue_db) as queue:
        session = queue.start_session(device="cpu", now=1.0, alive_seconds=1e12)
    with pytest.raises(UsageError, match=f"Session {session} .* is using .*mbqueue stop"):
        Project(used.root).migrate_queue(url)


def test_a_queue_whose_session_is_silent_but_lives_is_not_copied(used, url):
    with holding_open(used.queue_db) as pid, Queue(used.queue_db) as queue:
        session = queue.start_session(device="cpu", now=1.0, alive_seconds=0.0, identity=identity_of(pid))
        with pytest.raises(UsageError, match=f"Session {session} .* is using .*mbqueue stop"):
            Project(used.root).migrate_queue(url)


def test_nothing_is_copied_into_a_queue_that_is_in_use(used, url, make_spec):
    with open_on_server(url) as queue:
        queue.enqueue(make_spec("mine"), results_dir="r", now=1.0)
        before = dump(queue)
        with pytest.raises(UsageError, match="is not empty"):
            Project(used.root).migrate_queue(url)
        assert dump(queue) == before


def test_values_that_the_other_database_cannot_hold_are_refused_and_nothing_is_written(used, url):
    with Queue(used.queue_db) as source, open_on_server(url) as target:
        source.note("a NUL: \x00", by="test", now=14.0)
        with pytest.raises(QueueError, match="cannot be stored unchanged"):
            copy_queue(source, target, now=15.0)
        assert not any(dump(target).values())


def test_a_queue_is_not_moved_to_its_own_address(used, url, monkeypatch):
    with pytest.raises(UsageError, match="already an SQLite file"):
        Project(used.root).migrate_queue("sqlite")
    with Queue(used.queue_db) as source, pytest.raises(UsageError, match="already an SQLite file"):
        copy_to_file(source, used.queue_db, now=15.0)
    assert Project(used.root).status().overview["experiments"]
    Project(used.root).migrate_queue(url)
    monkeypatch.setenv("MBQUEUE_QUEUE", url)
    other = url.replace("127.0.0.1", "localhost") if "127.0.0.1" in url else url.replace("localhost", "127.0.0.1")
    assert other != url
    with pytest.raises(UsageError, match="are the same queue"):
        Project(used.root).migrate_queue(other)
    assert Project(used.root).status().overview["experiments"]


def test_an_empty_queue_is_not_mistaken_for_one_moved_into_a_file(used, url, monkeypatch):
    open_on_server(url).close()
    monkeypatch.setenv("MBQUEUE_QUEUE", url)
    with pytest.raises(UsageError, match="rename this file and all files next to it"):
        Project(used.root).migrate_queue("sqlite")
    with open_on_server(url) as queue:
        assert queue.experiments() == ()


def test_a_file_that_is_there_is_not_overwritten(used, url, make_spec, monkeypatch):
    Project(used.root).migrate_queue(url)
    used.queue_db.rename(used.queue_db.with_name("elsewhere.db"))
    with Queue(used.queue_db) as queue:
        queue.enqueue(make_spec("another"), results_dir="r", now=1.0)
    before = used.queue_db.read_bytes()
    monkeypatch.setenv("MBQUEUE_QUEUE", url)
    with pytest.raises(UsageError, match="rename this file and all files next to it"):
        Project(used.root).migrate_queue("sqlite")
    assert used.queue_db.read_bytes() == before
    with open_on_server(url, read_only=True) as queue:
        assert queue.experiments()  # the queue is still on the server


def test_a_moved_queue_names_its_new_address_and_refuses_work(used, url, monkeypatch):
    for place, target, shown in (("sqlite", url, url), (url, "sqlite", str(used.queue_db))):
        monkeypatch.setenv("MBQUEUE_QUEUE", place)
        project = Project(used.root)
        project.migrate_queue(target)
        calls = [
            project.status,
            project.events,
            lambda project=project: project.enqueue("pretrained_infer"),
            lambda project=project: project.work(device="cpu"),
            lambda project=project: project.pause("a"),
            lambda project=project, target=target: project.migrate_queue(target),
        ]
        if place == "sqlite":
            calls += [project.recover, lambda project=project: project.back_up(used.root / "x.tar")]
        for call in calls:
            with pytest.raises(QueueMoved, match=f"to {re.escape(shown)}. To use the queue there"):
                call()
    told = run(used.root, "status")
    assert told.returncode == 1
    assert "This queue was moved on" in told.stderr
    assert "This queue was moved on" in run(used.root, "doctor").stdout


def test_a_moved_queue_is_replaced_only_with_force(used, url):
    Project(used.root).migrate_queue(url)
    with pytest.raises(QueueMoved, match="recover --force"):
        Project(used.root).recover()
    with pytest.raises(QueueError, match="nothing to rebuild"):  # the project has no checkpoints
        Project(used.root).recover(force=True)
    assert list(used.queue_db.parent.glob("queue.db.replaced-*"))


def test_a_queue_can_be_moved_back_and_forth_any_number_of_times(used, url, make_spec, monkeypatch):
    for number, (place, target) in enumerate((("sqlite", url), (url, "sqlite")) * 2):
        monkeypatch.setenv("MBQUEUE_QUEUE", place)
        project = Project(used.root)
        with open_queue(project.folder) as queue:
            queue.enqueue(make_spec(f"new{number}", epochs=1), results_dir=f"r{number}", now=20.0 + number)
            before = dump(queue)
        project.migrate_queue(target)
        monkeypatch.setenv("MBQUEUE_QUEUE", target)
        with open_queue(Project(used.root).folder) as queue:
            assert dump(queue) == before
            queue.verify()
    aside = list(used.queue_db.parent.glob("queue.db.moved-*"))
    assert aside
    assert not [path for path in aside if path.name.endswith(("-wal", "-shm"))]


@pytest.mark.parametrize("source", ["file", "server"])
def test_a_session_that_was_frozen_while_its_queue_was_moved_writes_nothing_to_it(used, url, monkeypatch, source):
    project = Project(used.root)
    if source == "server":
        project.migrate_queue(url)
        monkeypatch.setenv("MBQUEUE_QUEUE", url)
        project = Project(used.root)
    with open_queue(project.folder) as frozen:
        frozen.retry("b", now=30.0)
        session = frozen.start_session(device="cpu", now=30.0, alive_seconds=60)
        lease = frozen.claim(session, now=30.0, lease_seconds=1.0)
        with frozen.writing() as db:  # make the session's heartbeat overdue
            db.execute("UPDATE sessions SET alive_until = 0 WHERE id = ?", (session,))
        project.migrate_queue(url if source == "file" else "sqlite")
        published = []
        publish = partial(published.append, 1)
        for write in (
            partial(frozen.renew, lease, now=30.5, lease_seconds=60),
            partial(frozen.save_progress, lease, progress={}, publish=publish),
            partial(frozen.commit, lease, result={}, now=31.0, publish=publish),
            partial(frozen.heartbeat, session, now=31.0, alive_seconds=60),
            partial(frozen.start_session, device="cpu", now=31.0, alive_seconds=60),
            partial(frozen.claim, session, now=31.0, lease_seconds=60),
        ):
            with pytest.raises(QueueError, match="was moved to another database"):
                write()
        assert published == []


@pytest.mark.parametrize("place", ["file", "server"])
def test_a_run_that_died_between_the_copy_and_the_mark_is_completed_by_the_next(used, url, monkeypatch, place):
    targets = {"file": (url, "sqlite"), "server": ("sqlite", url)}
    source, target = targets[place]
    if source == url:
        Project(used.root).migrate_queue(url)
    monkeypatch.setenv("MBQUEUE_QUEUE", source)
    project = Project(used.root)

    class Died(Exception):
        pass

    kind = PostgresServer if source == url else SqliteFile
    writing = kind.writing

    @contextmanager
    def dies(self):
        with writing(self) as db:
            yield db
            if self.name == marked:
                raise Died

    with open_queue(project.folder) as queue:
        marked, before = queue.database.name, dump(queue)
    with monkeypatch.context() as death:
        death.setattr(kind, "writing", dies)
        with pytest.raises(Died):
            project.migrate_queue(target)
    with open_queue(project.folder, read_only=True) as queue:
        assert dump(queue) == before
    project.migrate_queue(target)
    with pytest.raises(QueueMoved):
        open_queue(project.folder)
    monkeypatch.setenv("MBQUEUE_QUEUE", target)
    with open_queue(Project(used.root).folder) as queue:
        assert dump(queue) == before


def test_another_queue_does_not_replace_one_that_was_moved(used, url, make_spec, monkeypatch):
    Project(used.root).migrate_queue(url)
    monkeypatch.setenv("MBQUEUE_QUEUE", url)
    Project(used.root).migrate_queue("sqlite")
    used.queue_db.unlink()
    monkeypatch.setenv("MBQUEUE_QUEUE", "sqlite")
    with Queue(used.queue_db) as queue:
        queue.enqueue(make_spec("another"), results_dir="r", now=1.0)
    with pytest.raises(UsageError, match="still contains tables left over from a different queue"):
        Project(used.root).migrate_queue(url)
    with pytest.raises(QueueMoved):
        open_on_server(url)


def test_remains_of_a_queue_moved_by_another_version_are_not_reused(used, url, postgres_server, monkeypatch):
    Project(used.root).migrate_queue(url)
    monkeypatch.setenv("MBQUEUE_QUEUE", url)
    Project(used.root).migrate_queue("sqlite")
    monkeypatch.setenv("MBQUEUE_QUEUE", "sqlite")
    postgres_server.sql(f"UPDATE {parse_address(url).schema}.moved SET version = 3")
    with pytest.raises(
        UsageError, match=r"another version of mbqueue moved\. .* version 3, .*a different schema with schema=NAME"
    ):
        Project(used.root).migrate_queue(url)
    with Queue(used.queue_db) as queue:
        assert queue.jobs()


def test_a_number_that_the_server_cannot_hold_is_named(used, url):
    with Queue(used.queue_db) as queue, queue.writing() as db:
        db.execute("UPDATE jobs SET priority = 3000000000 WHERE id = 2")
    with pytest.raises(QueueError, match=r"Row 2 of jobs has priority = 3000000000, .*Nothing was changed"):
        Project(used.root).migrate_queue(url)
    with Queue(used.queue_db) as queue:
        assert queue.jobs()


def test_moving_by_the_sessions_role_is_refused_with_the_owner_named(used, url, postgres_server, monkeypatch):
    Project(used.root).migrate_queue(url)
    place = url.rpartition("=")[2]
    postgres_server.sql(
        f"DROP ROLE IF EXISTS mover; CREATE ROLE mover LOGIN; GRANT USAGE ON SCHEMA {place} TO mover; "
        f"GRANT SELECT, INSERT ON ALL TABLES IN SCHEMA {place} TO mover; "
        f"GRANT UPDATE ON {place}.jobs, {place}.sessions, {place}.experiments, {place}.receipts TO mover"
    )
    monkeypatch.setenv("MBQUEUE_QUEUE", url.replace("postgres@", "mover@"))
    with pytest.raises(QueueError, match=r"permission denied.*Only the owner of the tables can move a queue"):
        Project(used.root).migrate_queue("sqlite")
    postgres_server.sql("DROP OWNED BY mover; DROP ROLE mover")


def test_commands_work_on_the_copied_queue_and_show_no_password(used, url, monkeypatch):
    secret = url.replace("postgres@", "postgres:s3cr3t%40word@")
    told = run(used.root, "migrate-queue", secret)
    assert told.returncode == 0, told.stderr
    monkeypatch.setenv("MBQUEUE_QUEUE", secret)
    said = [told]
    for command in (
        ["status"],
        ["status", "--json"],
        ["events"],
        ["pause", "a"],
        ["resume", "a"],
        ["retry", "a"],
        ["priority", "a", "5"],
    ):
        said.append(run(used.root, *command))
        assert said[-1].returncode == 0, said[-1].stderr
    for command in (["backup", "x.tar"], ["recover"], ["migrate-queue", secret]):
        said.append(run(used.root, *command))
        assert said[-1].returncode == 2, said[-1].stderr
    assert "MBQUEUE_QUEUE=sqlite" in said[-1].stderr
    for one in said:
        assert "s3cr3t" not in one.stdout + one.stderr
    assert "priority set to 5" in run(used.root, "events").stdout


def test_on_a_clusters_file_system_the_commits_and_results_come_along_both_ways(tmp_path, url, monkeypatch):
    project = LocalProject(tmp_path / "project", ManualClock())
    root = project.project.root
    mount = mounts.Mount(point=root, fstype="nfs4", source="server:/x")
    monkeypatch.setattr("mbqueue.topology.mount_of", lambda _path: mount)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "caches"))
    split = find_project(root)
    split.live_dir.mkdir(parents=True)
    project.project.queue_db.rename(split.queue_db)
    project.project = split
    session = project.train(5)
    for _ in range(4):
        session.step()
    session.die()
    with Queue(split.queue_db) as queue:
        queue.end_session(session.id, reason="ended", now=project.clock.now())
    published = root / "state/checkpoints/tiny/fold_0/e0001-done-f0001-0123456789ab.json"
    published.parent.mkdir(parents=True)
    published.write_text("{}")

    def commits_and_results(folder: ProjectFolder) -> dict[str, bytes]:
        live = [path for fold in folder.fold_dirs() for path in fold.iterdir() if path != published]
        results = [path for path in folder.working_results("results").rglob("*") if path.is_file()]
        return {path.name: path.read_bytes() for path in (*live, *results)}

    before = commits_and_results(split)
    assert any(name.endswith(".pt") for name in before)
    assert any(name.endswith(".csv") for name in before)
    Project(root).migrate_queue(url)
    monkeypatch.setenv("MBQUEUE_QUEUE", url)
    assert Project(root).folder.live is None
    assert commits_and_results(Project(root).folder) == before

    rmtree(tmp_path / "caches")
    Project(root).migrate_queue("sqlite")
    for queue in ("sqlite", ""):
        monkeypatch.setenv("MBQUEUE_QUEUE", queue)
        assert commits_and_results(Project(root).folder) == before
    made = Project(root).back_up(tmp_path / "b.tar")
    assert made.commits > 0


def test_every_table_of_a_queue_is_copied(world):
    """This test fails if a future schema adds a table that the copy leaves out."""
    of_sqlite = "SELECT name FROM sqlite_master WHERE type = 'table'"
    of_postgresql = (
        "SELECT table_name AS name FROM information_schema.tables "
        "WHERE table_schema = current_schema() AND table_type = 'BASE TABLE'"
    )
    with world.queue.reading() as db:
        rows = db.execute(of_sqlite if world.queue.database.dialect is SQLITE else of_postgresql).fetchall()
    rules_and_bookkeeping = {
        SQLITE: {"transitions", "_sqlite_migrations"},
        POSTGRESQL: {"transitions", "receipts", "mbqueue_schema"},
    }
    assert {row["name"] for row in rows} == {*TABLES} | rules_and_bookkeeping[world.queue.database.dialect]
