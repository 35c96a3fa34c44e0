"""The queue records the location of its commits, and refuses a session that would use a different one."""

from __future__ import annotations

import json
import logging
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from postgres_server import PostgresServer
from s3_server import S3Server, faulty, open_always
from small_project import ManualClock, RememberedReport, enqueue, make_project, small_spec
from typer.testing import CliRunner

from mbqueue.api import Project
from mbqueue.buckets import MARKER, STORE_VARIABLE
from mbqueue.cli.app import app
from mbqueue.errors import QueueError, StoreAway, StoreError, UsageError
from mbqueue.project import ProjectFolder, find_project
from mbqueue.queue.commits_place import CommitsPlace
from mbqueue.queue.opening import open_queue
from mbqueue.session import commits_binding
from mbqueue.session.commits_binding import enter_place, require_same
from mbqueue.session.options import WorkOptions
from mbqueue.session.worker import work
from mbqueue.storage import objects as objects_module
from mbqueue.storage.objects import ObjectStore
from mbqueue.topology import QUEUE_VARIABLE

EPOCH = "full_finetune/fold_0/e0001-done-f0001"


def done(project: ProjectFolder, *, jobs: int, **result: Any) -> None:
    """Enqueue a small experiment, and commit its first jobs without computing."""
    spec = small_spec(project)
    with open_queue(project) as queue:
        queue.enqueue(spec, results_dir=project.results_folder("2026-01-01", spec.folder_name), now=1.0)
        session = queue.start_session(device="cpu", now=2.0, alive_seconds=60)
        for _ in range(jobs):
            lease = queue.claim(session, now=2.0, lease_seconds=60)
            assert lease is not None
            queue.commit(lease, result={"dataset_hash": "d" * 64, "seconds": 1.0, **result}, now=2.0)
        queue.end_session(session, reason="test", now=3.0)


def session(project: ProjectFolder) -> str:
    """Run a session that may do no jobs; return why the session ended."""
    report = RememberedReport()
    return work(find_project(project.root), WorkOptions(device="cpu", max_jobs=0), report=report).reason


def place_of(project: ProjectFolder) -> CommitsPlace | None:
    with open_queue(project, read_only=True) as queue:
        return queue.commits_place()


def with_an_epoch(store: ObjectStore) -> None:
    """Add a commit with dummy content, because a starting session checks only the names of commits."""
    store.put(f"checkpoints/{EPOCH}-0123456789ab.pt", b"state")
    store.put(f"checkpoints/{EPOCH}.json", b"{}")


@pytest.fixture
def share(tmp_path: Path) -> ObjectStore:
    """A folder that several machines have mounted."""
    (tmp_path / "share").mkdir()
    return ObjectStore.open((tmp_path / "share").as_uri())


@pytest.fixture
def project(share: ObjectStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ProjectFolder:
    """A project with one finished epoch, whose commits are in the shared folder."""
    monkeypatch.setenv(STORE_VARIABLE, share.url)
    project = make_project(tmp_path / "project")
    enqueue(project, small_spec(project))
    session(project)
    done(project, jobs=2)
    with_an_epoch(share)
    return project


def test_a_session_without_the_store_of_the_queue_is_refused_and_told_where_it_is(
    project: ProjectFolder, share: ObjectStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = place_of(project)
    assert place is not None
    assert (place.kind, place.address) == ("store", share.url)
    monkeypatch.delenv(STORE_VARIABLE)
    with pytest.raises(StoreError, match=rf"{share.url} \(id {place.id}\).*no store.*Set store =.*move-commits"):
        session(project)
    with open_queue(project, read_only=True) as queue:
        assert all(row.ended_at is not None for row in queue.sessions())
        assert sum(job.state == "committed" for job in queue.jobs()) == 2, "nothing is done again"


def test_a_session_with_another_store_is_refused_and_changes_nothing_there(
    project: ProjectFolder, share: ObjectStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("bare", "other"):
        (tmp_path / name).mkdir()
        store = ObjectStore.open((tmp_path / name).as_uri())
        if name == "other":
            store.check()
        before = sorted(path.name for path in (tmp_path / name).rglob("*"))
        monkeypatch.setenv(STORE_VARIABLE, store.url)
        with pytest.raises(StoreError, match=rf"are in {share.url}.*a different store"):
            session(project)
        assert sorted(path.name for path in (tmp_path / name).rglob("*")) == before


def test_an_unmounted_share_is_not_mistaken_for_a_new_store(
    project: ProjectFolder, share: ObjectStore, tmp_path: Path
) -> None:
    """After a reboot, the share's mount point is an empty folder until the share is mounted."""
    (tmp_path / "share").rename(tmp_path / "unmounted")
    (tmp_path / "share").mkdir()
    with pytest.raises(StoreError, match=rf"are in {share.url} .*If the store is on a share, mount the share"):
        session(project)
    assert list((tmp_path / "share").iterdir()) == []
    (tmp_path / "share").rmdir()
    (tmp_path / "unmounted").rename(tmp_path / "share")
    assert session(project) == "reached the limit of 0 jobs"


def test_a_share_that_is_mounted_elsewhere_is_the_same_store(
    project: ProjectFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "mounted").symlink_to(tmp_path / "share")
    monkeypatch.setenv(STORE_VARIABLE, (tmp_path / "mounted").as_uri())
    assert session(project) == "reached the limit of 0 jobs"


def test_another_store_at_the_same_address_is_refused(share: ObjectStore) -> None:
    share.check()
    share.put(MARKER, json.dumps({"format": 1, "id": "another"}).encode())
    with pytest.raises(StoreAway, match="now leads to a different store"):
        share.ping()


def test_commands_look_for_results_only_in_the_queues_place(
    project: ProjectFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """If commands looked for results in a different store, `retry` would consider them lost and predict again."""
    done(project, jobs=2, files={"predictions_fold_0.csv": {"size": 1, "sha256": "0" * 64}})
    (tmp_path / "other").mkdir()
    for address in ("", (tmp_path / "other").as_uri()):
        monkeypatch.setenv(STORE_VARIABLE, address)
        api = Project(project.root)
        for command in (
            partial(api.results, "full_finetune"),
            partial(api.back_up, tmp_path / "a.tar"),
            api.recover,
        ):
            with pytest.raises(StoreError, match="The commits of this queue are in"):
                command()
        assert api.retry("full_finetune") == 0
        assert "could not be checked" in caplog.text
        caplog.clear()
    assert list((tmp_path / "other").iterdir()) == []


def test_reading_needs_no_write_permission(project: ProjectFolder, tmp_path: Path) -> None:
    share = tmp_path / "share"
    before = {path: path.stat().st_mtime_ns for path in [share, *share.rglob("*")]}
    Project(project.root).back_up(tmp_path / "all.tar")
    assert {path: path.stat().st_mtime_ns for path in [share, *share.rglob("*")]} == before


def test_an_old_queue_without_a_place_records_only_one_that_has_its_epochs(
    share: ObjectStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(STORE_VARIABLE, share.url)
    project = make_project(tmp_path / "project")
    done(project, jobs=2)
    share.check()
    with pytest.raises(StoreError, match=r"full_finetune fold 0 \(0 of 1 epoch\).*Check the address"):
        session(project)
    assert place_of(project) is None
    with_an_epoch(share)
    session(project)
    assert (place := place_of(project)) is not None
    assert place.address == share.url


def test_sessions_that_begin_at_once_with_a_new_store_agree_on_it_and_one_with_another_is_refused(
    share: ObjectStore, tmp_path: Path
) -> None:
    """All sessions see that no location of commits is recorded, before the first session records one."""
    project, clock = make_project(tmp_path / "project"), ManualClock()
    enqueue(project, small_spec(project))
    (tmp_path / "other").mkdir()
    again, other = ObjectStore.open(share.url), ObjectStore.open((tmp_path / "other").as_uri())
    with open_queue(project) as queue, pytest.MonkeyPatch.context() as patched:
        patched.setattr(queue, "commits_place", lambda: None)
        one = enter_place(project, queue, share, note=print, clock=clock)
        queue.start_session(device="cpu", now=clock.now(), alive_seconds=60)
        two = enter_place(project, queue, again, note=print, clock=clock)
        assert one == two
        with pytest.raises(QueueError, match=share.url):
            enter_place(project, queue, other, note=print, clock=clock)
        patched.undo()
        require_same(queue, one)
        with pytest.raises(QueueError, match="Start it again"):
            require_same(queue, CommitsPlace(id="moved since", kind="store", address="s3://a/b"))


def test_machines_that_share_only_a_queue_cannot_both_work_with_it(
    postgres_server: PostgresServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A single machine with a queue on a server needs no store."""
    monkeypatch.setenv(QUEUE_VARIABLE, postgres_server.url())
    one, two = make_project(tmp_path / "one"), make_project(tmp_path / "two")
    enqueue(one, small_spec(one))
    session(one)
    done(one, jobs=2)
    folder = one.live_dir / "checkpoints" / EPOCH
    folder.parent.mkdir(parents=True)
    folder.with_name(f"{folder.name}.json").write_text("{}")
    assert session(one) == "reached the limit of 0 jobs"
    with pytest.raises(
        StoreError, match=rf"{one.live_dir} .*{two.live_dir}, lacks full_finetune fold 0 .*set up a store"
    ):
        session(two)
    with pytest.raises(StoreError, match="a different folder"):
        Project(two.root).results("full_finetune")
    # A moved folder is still accepted, because the id inside it is the same.
    one.root.rename(tmp_path / "mounted")
    assert session(find_project(tmp_path / "mounted")) == "reached the limit of 0 jobs"


def test_a_file_that_was_copied_from_a_server_works_beside_its_commits_and_nowhere_else(tmp_path: Path) -> None:
    """The copied queue names the folder of the previous machine."""
    project = make_project(tmp_path)
    with open_queue(project) as queue:
        before = CommitsPlace(id="another folder", kind="folder", address="host:/elsewhere/state")
        queue.bind_commits(before, instead_of=None, by="test", now=0.0)
    done(project, jobs=2)
    with pytest.raises(StoreError, match=r"host:/elsewhere/state .* lacks full_finetune fold 0"):
        session(project)
    folder = project.all_checkpoints / EPOCH
    folder.parent.mkdir(parents=True)
    folder.with_name(f"{folder.name}.json").write_text("{}")
    session(project)
    assert (place := place_of(project)) is not None
    assert place.address.endswith(str(project.live_dir))


def test_two_machines_on_a_new_shared_queue_without_a_store_are_refused_before_any_work(
    postgres_server: PostgresServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(QUEUE_VARIABLE, postgres_server.url())
    one, two = make_project(tmp_path / "one"), make_project(tmp_path / "two")
    enqueue(one, small_spec(one))
    session(one)
    with open_queue(one) as queue:
        queue.start_session(device="cpu", now=0.0, alive_seconds=60)
    with pytest.raises(QueueError, match="share one store"):
        session(two)


def test_a_folder_asked_by_two_machines_at_once_for_its_id_has_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    project = make_project(tmp_path)
    first = commits_binding.folder_place(project)
    seen = iter(["", first.id])
    # The second machine looks for an id before the first machine has written one.
    monkeypatch.setattr(commits_binding, "folder_id", lambda _project: next(seen))
    assert commits_binding.folder_place(project) == first


def test_commits_are_moved_to_another_store_by_one_command(
    project: ProjectFolder, share: ObjectStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    share.put("results/full_finetune/0123-a.csv", b"a table")
    (tmp_path / "new").mkdir()
    target = ObjectStore.open((tmp_path / "new").as_uri())
    monkeypatch.setenv(STORE_VARIABLE, target.url)
    told = CliRunner().invoke(app, ["--project", str(project.root), "move-commits"])
    assert told.exit_code == 0, told.stderr
    assert "3 objects copied" in told.stdout
    assert set(target.names("")) == set(share.names(""))
    assert session(project) == "reached the limit of 0 jobs"
    monkeypatch.setenv(STORE_VARIABLE, share.url)
    with pytest.raises(StoreError, match=target.url):
        session(project)


def test_a_move_interrupted_anywhere_is_finished_by_the_next(
    project: ProjectFolder, share: ObjectStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "new").mkdir()
    url = (tmp_path / "new").as_uri()
    monkeypatch.setenv(STORE_VARIABLE, url)
    real = ObjectStore.open
    monkeypatch.setattr(objects_module, "_CREATE_TRIES", 1)
    at, ended = 0, False
    while not ended:
        at += 1
        stores = {url: faulty(url, at=at)[0], share.url: real(share.url)}
        with monkeypatch.context() as patched:
            patched.setattr(ObjectStore, "open", stores.get)
            try:
                Project(project.root).move_commits()
                ended = True
            except StoreAway:
                place = place_of(project)
                assert place is not None
                assert place.address == share.url, "the queue is told last"
    assert at > 5
    assert set(ObjectStore.open(url).names("")) == set(share.names(""))
    assert session(project) == "reached the limit of 0 jobs"


def test_another_manifest_of_the_same_size_does_not_count_as_a_copy(
    project: ProjectFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "new").mkdir()
    target = ObjectStore.open((tmp_path / "new").as_uri())
    assert target.check()
    target.create(f"checkpoints/{EPOCH}.json", b"[]")
    monkeypatch.setenv(STORE_VARIABLE, target.url)
    with pytest.raises(StoreError, match="exists already"):
        Project(project.root).move_commits()
    assert target.read(f"checkpoints/{EPOCH}.json", at_most=9) == b"[]"


def test_missing_commits_are_given_up_only_with_lost(
    project: ProjectFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "share").rename(tmp_path / "unmounted")
    (tmp_path / "new").mkdir()
    monkeypatch.setenv(STORE_VARIABLE, (tmp_path / "new").as_uri())
    api = Project(project.root)
    with pytest.raises(StoreError, match=r"lacks full_finetune fold 0.*--lost"):
        api.move_commits()
    assert list((tmp_path / "new").iterdir()) == []
    assert api.move_commits(lost=True).lost == "full_finetune fold 0 (0 of 1 epoch)"
    assert session(project) == "reached the limit of 0 jobs"


def test_commits_are_not_moved_under_a_session(project: ProjectFolder, tmp_path: Path, monkeypatch: Any) -> None:
    with open_queue(project) as queue:
        queue.start_session(device="cpu", now=4e9, alive_seconds=60)
    (tmp_path / "new").mkdir()
    monkeypatch.setenv(STORE_VARIABLE, (tmp_path / "new").as_uri())
    with pytest.raises(QueueError, match="mbqueue stop"):
        Project(project.root).move_commits()


def test_doctor_reports_a_store_that_is_not_the_queues_and_of_none(
    project: ProjectFolder, share: ObjectStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def finding() -> dict[str, str]:
        told = CliRunner().invoke(app, ["--project", str(project.root), "doctor", "--json"])
        (found,) = [one for one in json.loads(told.stdout) if one["what"] == "commits"]
        return dict(found)

    assert finding()["state"] == "ok"
    (tmp_path / "other").mkdir()
    for address in ("", (tmp_path / "other").as_uri()):
        monkeypatch.setenv(STORE_VARIABLE, address)
        assert finding()["state"] == "problem"
        assert share.url in finding()["remedy"]
    assert list((tmp_path / "other").iterdir()) == []


def test_an_empty_variable_does_not_switch_the_store_off(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = make_project(tmp_path).root
    with (root / "mbqueue.toml").open("a") as settings:
        settings.write('store = "s3://bucket/prefix"\n')
    monkeypatch.setenv(STORE_VARIABLE, "")
    assert find_project(root).topology.store == "s3://bucket/prefix"


def test_a_retry_while_the_store_is_away_is_done_and_remembered(
    s3: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    store, backend = faulty(s3.new_store())
    monkeypatch.setenv(STORE_VARIABLE, store.url)
    open_always(store, monkeypatch)
    project = Project(make_project(tmp_path).root)
    done(project.folder, jobs=4, files={"predictions_fold_0.csv": {"size": 1, "sha256": "0" * 64}})
    assert project.cancel("full_finetune") == 1
    note = project.folder.notes_dir / "full_finetune.json"
    assert json.loads(note.read_text())["cancelled"]
    backend.away = True
    with caplog.at_level(logging.WARNING):
        assert project.retry("full_finetune") == 1, "what was predicted is not predicted again"
    assert "could not be checked" in caplog.text
    assert not json.loads(note.read_text())["cancelled"], "a queue that is rebuilt would not forget it"


@pytest.mark.parametrize("shares", ["store", "queue"])
def test_a_copy_that_would_use_the_store_or_the_queue_of_its_original_is_refused(
    shares: str, share: ObjectStore, tmp_path: Path, postgres_server: PostgresServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    if shares == "store":
        monkeypatch.setenv(STORE_VARIABLE, share.url)
    else:
        monkeypatch.setenv(QUEUE_VARIABLE, postgres_server.url())
    original = make_project(tmp_path / "project")
    enqueue(original, small_spec(original))
    session(original)
    shutil.copytree(original.root, tmp_path / "copy")
    copy = find_project(tmp_path / "copy")
    said = rf"copy is a copy of {original.root}, and both would use the same {shares}.*Change `{shares}`"
    with pytest.raises(UsageError, match=said):
        session(copy)
    assert session(original) == "reached the limit of 0 jobs"
    with open_queue(original, read_only=True) as queue:
        assert len(queue.sessions()) == 2, "the copy began no session"

    monkeypatch.setenv(STORE_VARIABLE, share.url)
    if shares == "queue":  # with the same store, the copy counts as a second machine
        assert session(find_project(copy.root)) == "reached the limit of 0 jobs"
        return
    original.root.rename(tmp_path / "away")  # with the original gone, mbqueue treats the copy as a moved project
    assert session(copy) == "reached the limit of 0 jobs"
