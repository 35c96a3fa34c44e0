"""Copying a queue to PostgreSQL and back."""

from __future__ import annotations

from pathlib import Path
from shutil import rmtree

import pytest
from fake_training import LocalProject
from postgres_server import PostgresServer
from processes import run
from small_project import ManualClock, make_project

from mbqueue import Project, mounts
from mbqueue.errors import QueueError, UsageError
from mbqueue.project import ProjectFolder, find_project
from mbqueue.queue import Queue
from mbqueue.queue.commits_place import CommitsPlace
from mbqueue.queue.migrating import COLUMNS, copy_queue, rows_of
from mbqueue.queue.opening import open_on_server


def dump(queue: Queue) -> dict[str, list[tuple]]:
    with queue.reading() as db:
        return {table: list(rows_of(db, table)) for table in COLUMNS}


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
        queue.skip_rest(take(), result={"val_mae": 0.25}, why="no better", now=9.0)
        queue.fail(take(), error="Traceback\nValueError: bang", now=10.0, final=True)
        queue.fail(take(), error="Traceback\nValueError: again", now=10.5)
        queue.cancel("b", now=11.0)
        queue.pause("a", fold=2, now=12.0)
        queue.end_session(session, reason="done", now=13.0)
    return project


@pytest.fixture
def url(postgres_server: PostgresServer) -> str:
    return postgres_server.url()


def test_a_queue_comes_back_from_postgresql_row_by_row_as_it_was(used, url):
    with Queue(used.queue_db) as queue:
        before = dump(queue)
    made = Project(used.root).migrate_queue(url)
    assert made.rows == {table: len(rows) for table, rows in before.items()}
    with open_on_server(url) as queue:
        assert dump(queue) == before
        queue.verify()  # its triggers guard it again
        with pytest.raises(QueueError, match="never deleted"), queue.writing() as db:
            db.execute("DELETE FROM jobs")
    used.queue_db.rename(used.queue_db.with_name("before.db"))
    (used.root / "mbqueue.toml").write_text(f'queue = "{url}"\n')
    Project(used.root).migrate_queue("sqlite")
    with Queue(used.queue_db) as queue:
        assert dump(queue) == before
        queue.verify()
        with pytest.raises(QueueError, match="never deleted"), queue.writing() as db:
            db.execute("DELETE FROM jobs")


def test_a_copied_queue_goes_on_with_new_ids_and_the_fences_it_had(used, url, make_spec):
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
    with pytest.raises(UsageError, match=f"Session {session} .* works with .*mbqueue stop"):
        Project(used.root).migrate_queue(url)


def test_nothing_is_copied_into_a_queue_that_is_in_use(used, url, make_spec):
    with open_on_server(url) as queue:
        queue.enqueue(make_spec("mine"), results_dir="r", now=1.0)
        before = dump(queue)
        with pytest.raises(UsageError, match="is not empty"):
            Project(used.root).migrate_queue(url)
        assert dump(queue) == before


def test_what_the_other_database_cannot_hold_is_refused_and_nothing_is_written(used, url):
    with Queue(used.queue_db) as source, open_on_server(url) as target:
        source.note("a NUL: \x00", by="test", now=14.0)
        with pytest.raises(QueueError, match="cannot be kept as it is"):
            copy_queue(source, target, now=15.0)
        assert not any(dump(target).values())


def test_a_file_that_is_there_is_not_overwritten(used, url):
    Project(used.root).migrate_queue(url)
    (used.root / "mbqueue.toml").write_text(f'queue = "{url}"\n')
    before = used.queue_db.read_bytes()
    with pytest.raises(UsageError, match="Move it and the files beside it"):
        Project(used.root).migrate_queue("sqlite")
    assert used.queue_db.read_bytes() == before


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
    monkeypatch.setattr("mbqueue.project.mount_of", lambda _path: mount)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "caches"))
    split = find_project(root)
    split.live_dir.mkdir(parents=True)
    project.project.queue_db.rename(split.queue_db)
    project.project = split
    session = project.train(5)
    for _ in range(4):
        session.step()  # to the fold's predictions
    session.queue.end_session(session.id, reason="ended", now=project.clock.now())
    session.queue.close()
    published = root / "state/checkpoints/fake/fold_0/e0001-done-f0001-0123456789ab.json"
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
    assert not Project(root).folder.is_split
    assert commits_and_results(Project(root).folder) == before

    rmtree(tmp_path / "caches")
    Project(root).migrate_queue("sqlite")
    for queue in ("sqlite", ""):
        monkeypatch.setenv("MBQUEUE_QUEUE", queue)
        assert commits_and_results(Project(root).folder) == before
    made = Project(root).back_up(tmp_path / "b.tar")
    assert made.commits > 0
