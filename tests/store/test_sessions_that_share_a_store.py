"""Sessions that share nothing except the queue and the object store."""

from __future__ import annotations

import json
import re
import shutil
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch
from postgres_server import PostgresServer
from processes import kill, outcome, start, until
from s3_server import S3Server, faulty, open_always
from small_project import RememberedReport, enqueue, make_project, small_spec
from typer.testing import CliRunner

from mbqueue import project as project_module
from mbqueue.api import Project
from mbqueue.buckets import MARKER, STORE_VARIABLE
from mbqueue.cli.app import app
from mbqueue.clock import SystemClock
from mbqueue.drive.livestate import publishing_status
from mbqueue.errors import QueueError, StoreAway, StoreError, UsageError
from mbqueue.project import STORED_CHECKPOINTS, STORED_CRYSTALS, STORED_FROZEN, STORED_RESULTS, ProjectFolder
from mbqueue.queue.jobs import Kind, State
from mbqueue.queue.opening import open_queue
from mbqueue.queue.store import Queue
from mbqueue.session import storewatch
from mbqueue.session.options import WorkOptions
from mbqueue.session.shared_commits import fetch_commits, finished_epochs
from mbqueue.session.storewatch import StoreWatch
from mbqueue.session.worker import Ending, work
from mbqueue.storage import objects
from mbqueue.storage.manifest import manifest_of
from mbqueue.storage.objects import ObjectStore
from mbqueue.topology import LIVE_VARIABLE, QUEUE_VARIABLE
from mbqueue.train import arithmetic

FEW = {"data__limit": 20}


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def _no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(objects, "_PAUSE_SECONDS", 0.0)
    monkeypatch.setattr(storewatch, "PAUSE_SECONDS", 0.0)


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> tuple[ProjectFolder, Path]:
    """An uninterrupted run on one machine, without a store."""
    project = make_project(tmp_path_factory.mktemp("plain"), checkpoint_minutes=10)
    folder = enqueue(project, small_spec(project, **FEW))
    assert work(project, WorkOptions(device="cpu"), report=RememberedReport()).ending is Ending.DONE
    return project, folder


class Machine:
    """One machine, with its own project folder and the queue that all machines share."""

    def __init__(self, folder: Path, queue_db: Path, *, minutes: float = 1e-6) -> None:
        self.project = make_project(folder, checkpoint_minutes=minutes)
        self.project.queue_db.symlink_to(queue_db)
        self.report = RememberedReport()

    def work(self, jobs: int | None = None) -> Any:
        return work(self.project, WorkOptions(device="cpu", max_jobs=jobs), report=self.report)


@pytest.fixture
def shared(tmp_path: Path, s3: S3Server, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, str]:
    """(database, address of the store) of an enqueued experiment."""
    url = s3.new_store()
    monkeypatch.setenv(STORE_VARIABLE, url)
    first = make_project(tmp_path / "queue")
    enqueue(first, small_spec(first, **FEW))
    return first.queue_db, url


def test_a_fold_that_moves_between_machines_after_every_job_gives_the_same_bytes(
    shared: tuple[Path, str], plain: tuple[ProjectFolder, Path], tmp_path: Path
) -> None:
    """At the end, a machine that has trained nothing reads the results."""
    queue_db, url = shared
    for number in range(5):
        machine = Machine(tmp_path / f"machine-{number}", queue_db)
        machine.work(1)
        assert not [line for line in machine.report.lines if "failed" in line], machine.report.lines
        shutil.rmtree(machine.project.live_dir / "checkpoints", ignore_errors=True)
    reader = Machine(tmp_path / "reader", queue_db)
    project = Project(reader.project.root)
    recorded = project.results("full_finetune")
    assert recorded.is_complete
    assert outcome(recorded.folder, 0) == outcome(plain[1], 0)
    assert len(project.predictions("full_finetune")) == 4
    assert project.model("full_finetune", 0) is not None
    assert project.report("full_finetune")[0].exists()
    assert project.retry("full_finetune") == 0, "nothing is lost although nothing was here"
    store = ObjectStore.open(url)
    of_the_map = {MARKER, STORED_CHECKPOINTS, STORED_CRYSTALS, STORED_FROZEN, STORED_RESULTS}
    assert {name.partition("/")[0] for name in store.names("")} == of_the_map
    assert of_the_map == set(
        re.findall(r"^    [├└]── ([\w-]+(?:\.json)?)", str(project_module.__doc__).split("STORE/")[1], re.M)
    )


def test_another_machine_resumes_where_a_killed_one_was_with_a_shared_server_and_store_and_nothing_else(
    postgres_server: PostgresServer,
    s3: S3Server,
    plain: tuple[ProjectFolder, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    url = s3.new_store()
    monkeypatch.setenv(STORE_VARIABLE, url)
    monkeypatch.setenv(QUEUE_VARIABLE, postgres_server.url())
    one, two = make_project(tmp_path / "one"), make_project(tmp_path / "two")
    spec = small_spec(one, **FEW)
    with open_queue(one) as queue:
        queue.enqueue(spec, results_dir=one.results_folder("2026-01-01", spec.folder_name), now=0.0)
    store = ObjectStore.open(url)
    killed = start(one.root, "work", "--device", "cpu", log=tmp_path / "log")
    until(lambda: any("e0002-s" in name for name in store.names("checkpoints")), killed)
    kill(killed)
    report = RememberedReport()
    assert work(two, WorkOptions(device="cpu"), report=report).ending is Ending.DONE, report.lines
    folder = Project(two.root).results("full_finetune").folder
    assert outcome(folder, 0) == outcome(plain[1], 0)
    assert not two.queue_db.exists()


def test_the_results_of_a_fold_in_training_are_seen_from_another_machine(
    shared: tuple[Path, str], tmp_path: Path
) -> None:
    Machine(tmp_path / "one", shared[0]).work(2)
    reader = Machine(tmp_path / "reader", shared[0])
    recorded = Project(reader.project.root).results("full_finetune")
    assert [row["epoch"] for row in recorded.histories[0]] == [1]


def test_a_change_of_device_during_training_is_seen_from_another_machine(
    shared: tuple[Path, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Machine(tmp_path / "one", shared[0]).work(2)
    monkeypatch.setattr(arithmetic, "device_name", lambda _device: "another CPU")
    Machine(tmp_path / "two", shared[0]).work(1)
    recorded = Project(Machine(tmp_path / "reader", shared[0]).project.root).results("full_finetune")
    assert not recorded.is_complete
    (change,) = recorded.content["run"]["fingerprint_changes"]
    assert change["fold"] == 0
    assert change["changes"]["device_name"][1] == "another CPU"


def machine_with_a_faulty_store(
    shared: tuple[Path, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> tuple[Machine, ObjectStore, Any]:
    """A machine, its store, and the backend that can make the store unavailable."""
    store, backend = faulty(shared[1])
    open_always(store, monkeypatch)
    return Machine(tmp_path / "one", shared[0]), store, backend


def test_training_continues_while_the_store_is_away_and_commits_once_it_is_back(
    shared: tuple[Path, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine, store, backend = machine_with_a_faulty_store(shared, tmp_path, monkeypatch)
    seen: list[Any] = []
    waits: list[str] = []

    def advanced(job: Any, what: str, done: int, total: int) -> None:
        if what == "step" and job.epoch == 1 and done == 1:
            backend.away = True

    note = machine.report.note

    def told(text: str) -> None:
        note(text)
        if text.startswith("DEGRADED"):
            seen.append(publishing_status(machine.project))

    class Back(StoreWatch):
        def pause(self, error: StoreError) -> float:
            waits.append(str(error))
            backend.away = len(waits) < 3  # the store returns while the epoch's commit is still waiting
            return super().pause(error)

    monkeypatch.setattr("mbqueue.session.worker.StoreWatch", Back)
    machine.report.on_advanced, machine.report.note = advanced, told  # type: ignore[method-assign]
    assert machine.work(2).jobs_done == 2, machine.report.lines
    assert len(waits) == 3
    assert seen[0] is not None
    assert seen[0]["state"] == "degraded"
    assert "is not responding" in seen[0]["why"]
    assert "note: The object store is responding again." in machine.report.lines
    after = publishing_status(machine.project)
    assert after is not None
    assert after["state"] == "published"
    with Queue(shared[0], read_only=True) as queue:
        assert any(event.why.startswith("DEGRADED") for event in queue.events(limit=1000))
        assert all(job.failures == 0 for job in queue.jobs()), "that the store is away is no failure of a job"
    assert finished_epochs(store) == {("full_finetune", 0): 1}


def test_a_job_that_finds_the_store_away_is_released_and_done_once_it_answers(
    shared: tuple[Path, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine, _, backend = machine_with_a_faulty_store(shared, tmp_path, monkeypatch)
    waits: list[str] = []

    class Back(StoreWatch):
        def pause(self, error: StoreError) -> float:
            waits.append(str(error))
            backend.away = len(waits) < 3
            return super().pause(error)

    def started(job: Any) -> None:
        backend.away = job.kind is Kind.TRAIN and not waits

    monkeypatch.setattr("mbqueue.session.worker.StoreWatch", Back)
    machine.report.job_started = started  # type: ignore[method-assign]
    assert machine.work(2).jobs_done == 2, machine.report.lines
    assert len(waits) == 3
    with Queue(shared[0], read_only=True) as queue:
        (job,) = queue.jobs(state=State.COMMITTED)[1:]
        assert (job.kind, job.failures, job.preemptions) == (Kind.TRAIN, 0, 1)


def test_a_job_claimed_before_the_store_went_away_is_released_during_the_wait(
    shared: tuple[Path, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine, _, backend = machine_with_a_faulty_store(shared, tmp_path, monkeypatch)
    watches: list[StoreWatch] = []
    meanwhile: list[tuple[Any, ...]] = []

    class Back(StoreWatch):
        def pause(self, error: StoreError) -> float:
            with Queue(shared[0]) as queue:
                meanwhile.extend((job.state, job.fence, job.preemptions) for job in queue.jobs() if job.epoch == 2)
                other = queue.start_session(device="cpu", now=clock.now(), alive_seconds=60)
                lease = queue.claim(other, now=clock.now(), lease_seconds=60)
                meanwhile.append((lease and lease.job.epoch,))
                queue.end_session(other, reason="test", now=clock.now())
            backend.away = False
            return super().pause(error)

        def __init__(self, *arguments: Any, **options: Any) -> None:
            super().__init__(*arguments, **options)
            watches.append(self)

    def finished(job: Any, _summary: str) -> None:
        if job.epoch == 1:
            with Queue(shared[0], read_only=True) as queue:
                assert [one.epoch for one in queue.jobs(state=State.LEASED)] == [2]
            backend.away = True
            watches[0].trouble("what is sent in the background found it away")

    clock = SystemClock()
    monkeypatch.setattr("mbqueue.session.worker.StoreWatch", Back)
    machine.report.job_finished = finished  # type: ignore[method-assign]
    assert machine.work(3).jobs_done == 3, machine.report.lines
    assert meanwhile == [(State.READY, 1, 0), (2,)]


def test_of_two_queues_on_one_store_the_second_adopts_the_firsts_commits(
    s3: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two workers have the same fence, as after a fail-over of the server, and finish the same epoch."""
    monkeypatch.setenv(STORE_VARIABLE, s3.new_store())
    one, two = (
        make_project(tmp_path / "one", checkpoint_minutes=10),
        make_project(tmp_path / "two", checkpoint_minutes=10),
    )
    for project in (one, two):
        enqueue(project, small_spec(project, train__epochs=1, **FEW))
    ahead = RememberedReport()
    late = RememberedReport()

    def overtake(job: Any, what: str, done: int, total: int) -> None:
        if what == "step" and done == total and not ahead.lines:
            work(one, WorkOptions(device="cpu", max_jobs=2), report=ahead)

    late.on_advanced = overtake
    assert work(two, WorkOptions(device="cpu", max_jobs=2), report=late).jobs_done == 2
    assert any("Another worker has already written" in line for line in late.lines), late.lines
    with Queue(one.queue_db, read_only=True) as first, Queue(two.queue_db, read_only=True) as second:
        rows = [next(job.result for job in queue.jobs() if job.kind is Kind.TRAIN) for queue in (first, second)]
    assert rows[0] is not None
    assert rows[1] is not None
    assert rows[0]["session"] == rows[1]["session"], "both tell of the commit that exists"


def test_a_project_on_a_drive_with_a_store_publishes_nothing_to_the_drive(
    s3: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(STORE_VARIABLE, s3.new_store())
    monkeypatch.setenv(LIVE_VARIABLE, str(tmp_path / "live"))
    root = make_project(tmp_path / "drive").root
    project = Project(root)
    spec = small_spec(project.folder, "pretrained_infer", **FEW)
    enqueue(project.folder, spec)
    assert work(project.folder, WorkOptions(device="cpu"), report=RememberedReport()).ending is Ending.DONE
    assert list((root / "state").iterdir()) == []
    assert list((root / "results").iterdir()) == []
    assert project.results(spec.name).folder.is_relative_to(tmp_path / "live")
    (page,) = project.report(spec.name)
    assert page.is_relative_to(root), "people look for it on the drive"
    publishing = project.status().overview["publishing"]
    assert (publishing["state"], publishing["mount"].split(":")[0]) == ("published", "s3")


def test_a_store_that_stays_away_ends_the_session_with_advice_and_commits_are_safe(
    shared: tuple[Path, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, backend = faulty(shared[1])
    open_always(store, monkeypatch)
    monkeypatch.setattr(storewatch, "PATIENCE_SECONDS", -1.0)
    machine = Machine(tmp_path / "one", shared[0])

    def advanced(job: Any, what: str, done: int, total: int) -> None:
        backend.away = backend.away or (what == "step" and job.epoch == 2)

    machine.report.on_advanced = advanced
    with pytest.raises(StoreAway, match=r"safe in the store.*mbqueue work"):
        machine.work()
    backend.away = False
    with Queue(shared[0], read_only=True) as queue:
        states = {(job.kind, job.epoch): job.state for job in queue.jobs()}
        assert states[Kind.TRAIN, 1] is State.COMMITTED
        assert states[Kind.TRAIN, 2] is State.READY, "released at once, for any session that can resume"
    assert finished_epochs(store) == {("full_finetune", 0): 1}


def test_a_lost_queue_is_rebuilt_from_the_store_on_a_machine_that_has_nothing(
    shared: tuple[Path, str], tmp_path: Path
) -> None:
    Machine(tmp_path / "one", shared[0]).work(3)
    fresh = make_project(tmp_path / "fresh")
    enqueue(fresh, small_spec(fresh, **FEW))
    with pytest.raises(QueueError, match="mbqueue recover --force"):
        work(fresh, WorkOptions(device="cpu"), report=RememberedReport())
    recovered = Project(fresh.root).recover(force=True)
    assert recovered.folds == [("full_finetune", 0, 2)]
    report = RememberedReport()
    work(fresh, WorkOptions(device="cpu", max_jobs=1), report=report)
    assert any("predict: test MAE" in line for line in report.lines), report.lines


def test_the_results_of_a_fold_in_training_are_seen_before_the_first_session_with_a_new_store(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    project = make_project(tmp_path / "project")
    enqueue(project, small_spec(project, **FEW))
    work(project, WorkOptions(device="cpu", max_jobs=2), report=RememberedReport())
    (tmp_path / "store").mkdir()
    monkeypatch.setenv(STORE_VARIABLE, (tmp_path / "store").as_uri())
    recorded = Project(project.root).results("full_finetune")
    assert [row["epoch"] for row in recorded.histories[0]] == [1]


def test_checkpoints_from_before_the_store_was_set_are_sent_to_it(
    plain: tuple[ProjectFolder, Path], s3: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = tmp_path / "moved"
    shutil.copytree(plain[0].root, root)
    project = ProjectFolder(root, plain[0].settings)
    url = s3.new_store()
    monkeypatch.setenv(STORE_VARIABLE, url)
    report = RememberedReport()
    assert work(project, WorkOptions(device="cpu"), report=report).jobs_done == 0
    assert any("were sent to" in line for line in report.lines)
    elsewhere = ProjectFolder(tmp_path / "elsewhere")
    fetch_commits(elsewhere, ObjectStore.open(url), note=report.note)
    there, here = elsewhere.checkpoints_dir("full_finetune", 0), project.checkpoints_dir("full_finetune", 0)
    newest = manifest_of((here / "e0002-done-f0001.json").read_bytes(), source="here")
    assert newest.best is not None
    kept = {newest.stem, newest.best["commit"]}  # on different CPUs, different epochs may be the best
    assert {path.name for path in there.iterdir()} == {
        f"{stem}{suffix}" for stem in kept for suffix in (".json", ".pt")
    }
    assert all(path.read_bytes() == (here / path.name).read_bytes() for path in there.iterdir())


def test_a_new_store_that_lacks_what_the_queue_has_committed_is_refused(
    plain: tuple[ProjectFolder, Path], s3: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = tmp_path / "moved"
    shutil.copytree(plain[0].root, root)
    shutil.rmtree(root / "state" / "checkpoints")
    url = s3.new_store()
    monkeypatch.setenv(STORE_VARIABLE, url)
    for _ in range(2):  # the second session finds what the first session stored
        with pytest.raises(StoreError, match="Check the address"):
            work(ProjectFolder(root), WorkOptions(device="cpu"), report=RememberedReport())


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({STORE_VARIABLE: "s3://no-such-bucket/prefix"}, "There is no bucket"),
        ({"AWS_ENDPOINT_URL": "http://127.0.0.1:9"}, "is not responding"),
        ({STORE_VARIABLE: "s3://key:very-secret@bucket"}, "must not contain credentials"),
        ({STORE_VARIABLE: "file:///no/such/folder"}, "There is no folder"),
    ],
)
def test_an_unusable_store_is_reported_before_any_work(
    change: dict[str, str], expected: str, shared: tuple[Path, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine = Machine(tmp_path / "one", shared[0])
    for name, value in change.items():
        monkeypatch.setenv(name, value)
    with pytest.raises((StoreError, UsageError), match=expected) as raised:
        machine.work()
    assert "very-secret" not in str(raised.value)
    with Queue(shared[0], read_only=True) as queue:
        assert queue.sessions() == ()


def test_a_missing_obstore_is_reported_with_what_to_install(
    shared: tuple[Path, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine = Machine(tmp_path / "one", shared[0])
    monkeypatch.setitem(sys.modules, "obstore", None)
    with pytest.raises(UsageError, match=r"pip install 'mbqueue\[objects\]'"):
        machine.work()


class _Refusing(BaseHTTPRequestHandler):
    """Answers like S3 when a request has a wrong key; the answer contains the key."""

    def _refuse(self) -> None:
        self.rfile.read(int(self.headers.get("Content-Length", 0)))
        body = b"<?xml version='1.0'?><Error><Code>AccessDenied</Code><Key>test-key</Key></Error>"
        self.send_response(403)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    do_PUT = do_GET = _refuse  # noqa: N815 - names that the library looks for

    def log_message(self, *_arguments: object) -> None:
        pass


def test_a_refusal_is_reported_without_any_key(monkeypatch: pytest.MonkeyPatch, s3: S3Server) -> None:
    with HTTPServer(("127.0.0.1", 0), _Refusing) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{server.server_port}")
        with pytest.raises(StoreError, match=r"refused.*Check the credentials") as raised:
            ObjectStore.open("s3://bucket/prefix").check()
        server.shutdown()
    assert not isinstance(raised.value, StoreAway)
    assert "test-key" not in str(raised.value)
    assert "test-secret" not in str(raised.value)


def test_doctor_reports_the_store_and_leaves_nothing_there(shared: tuple[Path, str], tmp_path: Path) -> None:
    machine = Machine(tmp_path / "one", shared[0])
    told = CliRunner().invoke(app, ["--project", str(machine.project.root), "doctor", "--json"])
    (found,) = [one for one in json.loads(told.stdout) if one["what"] == "object store"]
    assert (found["state"], found["found"].split(":")[0]) == ("ok", "s3")
    assert ObjectStore.open(shared[1]).check(), "still new"


def test_a_store_that_overwrites_a_name_is_refused(s3: S3Server) -> None:
    store = ObjectStore.open(s3.new_store())
    real = store.bulk

    class Careless:
        def put(self, path: str, content: bytes, **options: Any) -> Any:
            return real.put(path, content, **{**options, "mode": "overwrite"})

        def __getattr__(self, name: str) -> Any:
            return getattr(real, name)

    careless = ObjectStore(store.url, bulk=Careless(), brisk=Careless())
    with pytest.raises(StoreError, match="overwrites objects"):
        careless.check()
