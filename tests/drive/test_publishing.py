"""Which files sessions publish to a mount and when, even while the mount fails."""

from __future__ import annotations

import errno
import hashlib
import json
import shutil
import sqlite3
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from small_project import ManualClock, make_newer
from stepped_session import RESULTS, TINY, SteppedSession, is_done, tiny_spec

from mbqueue import files
from mbqueue.drive.announcements import Announcements
from mbqueue.drive.livestate import publishing_status
from mbqueue.drive.published import PublishedFold
from mbqueue.drive.publishing import Publisher
from mbqueue.drive.reentry import enter
from mbqueue.drive.retention import SETTLED_SECONDS
from mbqueue.errors import SchemaTooNew
from mbqueue.project import ProjectFolder, Settings, init_project
from mbqueue.queue.jobs import published_seconds
from mbqueue.queue.store import Queue
from mbqueue.results.tables import history_file, predictions_file, read_history
from mbqueue.session.ending import run_end_command
from mbqueue.storage.mounted import Drive


class Mount:
    """A project on a drive that works correctly, and machines that use the project."""

    def __init__(self, base: Path) -> None:
        self.base, self.clock, self.machines = base, ManualClock(), 0
        self.root = init_project(base / "drive")[0].root

    def machine(self) -> ProjectFolder:
        """A new machine without a live folder."""
        self.machines += 1
        return ProjectFolder(self.root, Settings(), self.base / f"live{self.machines}")

    def enqueue(self, folds: tuple[int, ...] = (0,), epochs: int = 2) -> None:
        project = self.machine()
        project.live_dir.mkdir()
        with Queue(project.queue_db) as queue:
            queue.enqueue(tiny_spec(folds=folds, epochs=epochs), results_dir=RESULTS, now=self.clock.now())
        assert Publisher(project, None, note=lambda _text: None, clock=self.clock).round()

    def session(self, **publishing: Any) -> SteppedSession:
        """A session on a new machine."""
        project = self.machine()
        return SteppedSession(self.root, project.live_dir, self.clock, **publishing)

    def work(self, session: SteppedSession, steps: int) -> None:
        for _ in range(steps):
            self.clock.advance(5.0)
            session.step()

    def train(self, session: SteppedSession, commits: int) -> None:
        """Train until the session has published this many more commits."""
        goal = session.commits + commits
        for _ in range(20):
            if session.commits == goal:
                return
            self.work(session, 1)
        raise AssertionError("there was nothing to train")

    def names(self, folder: str) -> list[str]:
        return self.names_in(self.root / folder)

    @staticmethod
    def names_in(folder: Path) -> list[str]:
        return sorted(path.name for path in folder.rglob("*") if path.is_file())

    def manifests(self) -> list[Path]:
        """The manifests of the commits on the mount."""
        return sorted((self.root / "state" / "checkpoints").rglob("*.json"))


@pytest.fixture
def mount(tmp_path: Path) -> Mount:
    mount = Mount(tmp_path)
    mount.enqueue()
    return mount


class FailingDrive(Drive):
    """A drive on which writes, or all operations, fail with one error."""

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        self.fails_with: int | None = None

    def check(self) -> None:
        if self.fails_with is not None:
            raise OSError(self.fails_with, "injected")
        super().check()


class SlowDrive(Drive):
    """A drive that takes 50 seconds to write a file."""

    def __init__(self, root: Path, clock: ManualClock) -> None:
        super().__init__(root)
        self._clock = clock

    def write_new(self, path: str, content: bytes, **options: Any) -> None:
        super().write_new(path, content, **options)
        self._clock.advance(50.0)


@pytest.fixture
def deaf(monkeypatch: pytest.MonkeyPatch) -> None:
    """Prevent sessions from seeing each other's announcements."""
    monkeypatch.setattr(Announcements, "others", lambda _self: [])


def test_a_session_publishes_everything_at_its_end_and_the_next_machine_resumes(mount: Mount) -> None:
    first = mount.session()
    mount.train(first, 3)
    first.end()
    told = publishing_status(first.project)
    assert told is not None
    assert (told["state"], told["folds"][0]["seconds_at_risk"]) == ("published", 0.0)
    shutil.rmtree(first.project.live_dir)  # the first machine's disk is lost
    second = mount.session()
    mount.work(second, 20)
    assert is_done(second.queue)
    assert first.steps_trained + second.steps_trained == 4, "a step was done twice"


def test_replaced_result_files_on_the_mount_are_published_again(mount: Mount) -> None:
    session = mount.session()
    mount.work(session, 20)
    session.end()
    path = predictions_file(mount.root / RESULTS, 0)
    ours = path.read_bytes()
    path.write_bytes(ours[:-1])
    anew = Publisher(session.project, None, note=lambda _text: None, clock=mount.clock)
    assert anew.round()
    assert path.read_bytes() == ours


def test_only_new_files_with_unique_names_are_ever_written_to_the_state_on_the_mount(mount: Mount) -> None:
    session = mount.session()
    seen: dict[Path, bytes] = {}
    for _ in range(12):
        mount.work(session, 1)
        session.publish()
        for path in (mount.root / "state").rglob("*"):
            if path.is_file():
                assert seen.setdefault(path, path.read_bytes()) == path.read_bytes(), f"{path} changed"
    assert {path.parent.name for path in seen} >= {"fold_0", "snapshots", "sessions", "tiny", "state"}
    assert not (mount.root / "state" / "queue.db").exists()
    assert not list((mount.root / "state").rglob("*.lock"))


def test_the_mount_keeps_the_newest_commits_the_best_one_and_three_snapshots_once_they_are_settled(
    mount: Mount,
) -> None:
    session = mount.session()
    commits = []
    for _ in range(8):
        mount.clock.advance(100.0)
        session.step()
        session.publish()
        commits.append(len([name for name in mount.names("state/checkpoints") if name.endswith(".pt")]))
    assert max(commits) == 4, "one was removed before its successor had time to be uploaded"
    local = mount.names_in(session.project.checkpoints_dir("tiny", 0))
    mount.clock.advance(SETTLED_SECONDS)
    session.end()
    left = {path.stem[:-13]: json.loads(path.read_bytes()) for path in mount.manifests()}
    assert {f"{stem}.json" for stem in left} | {f"{stem}.pt" for stem in left} == set(local)
    done = [stem for stem in left if "-done-" in stem]
    assert [stem[:10] for stem in sorted(done)] == ["e0001-done", "e0002-done"]
    assert left[max(done)]["best"]["commit"] in left
    for path in mount.manifests():
        checkpoint = path.with_suffix(".pt").read_bytes()
        assert hashlib.sha256(checkpoint).hexdigest() == json.loads(path.read_bytes())["sha256"]
    snapshots = [name for name in mount.names("state/snapshots") if name.endswith(".db")]
    assert 3 <= len(snapshots) <= 4, "three that are settled, and the last one"
    trained = [job.state for job in mount.session().queue.jobs() if job.epoch is not None]
    assert trained == ["committed", "committed"], "by the newest snapshot"


@pytest.mark.parametrize("error", [errno.ENOTCONN, errno.EIO, errno.ENOSPC, errno.EROFS])
def test_a_failing_mount_degrades_the_session_and_gets_everything_once_it_returns(mount: Mount, error: int) -> None:
    drive = FailingDrive(mount.root)
    session = mount.session(drive=drive)
    mount.train(session, 1)
    assert session.publish()
    drive.fails_with = error
    mount.train(session, 1)
    assert session.publish() is False
    told = publishing_status(session.project)
    assert told is not None
    assert told["state"] == "degraded"
    assert "injected" in told["why"]
    assert told["folds"][0]["committed"] != told["folds"][0]["published"]
    assert told["folds"][0]["seconds_at_risk"] > 0
    assert any("DEGRADED" in note for note in session.notes)
    mount.train(session, 1)  # training continues despite the failing drive
    drive.fails_with = None
    assert session.publish()
    told = publishing_status(session.project)
    assert told is not None
    assert (told["state"], told["why"]) == ("published", None)


def test_recording_the_duration_of_publishing_causes_no_further_publishing(mount: Mount) -> None:
    session = mount.session(drive=SlowDrive(mount.root, mount.clock))
    mount.train(session, 2)
    session.publish()
    mount.clock.advance(100.0)
    assert session.publish()
    noted = [published_seconds(event.why) for event in session.queue.events(by=session.id, limit=1000)]
    took = [seconds for seconds in noted if seconds is not None]
    assert took
    assert all(seconds >= 50.0 for seconds in took), "each round wrote a file at least"
    before = mount.names("state/snapshots")
    for _ in range(3):
        mount.clock.advance(100.0)
        session.publish()
    assert mount.names("state/snapshots") == before
    session.end()


def test_a_mount_point_without_its_mount_is_not_written_to(mount: Mount) -> None:
    session = mount.session()
    mount.train(session, 1)
    mount.root.rename(mount.base / "elsewhere")
    mount.root.mkdir()
    assert session.publish() is False
    assert not any(mount.root.iterdir())


def test_training_does_not_wait_for_a_mount_that_hangs(mount: Mount, monkeypatch: pytest.MonkeyPatch) -> None:
    drive, over = FailingDrive(mount.root), threading.Event()
    session = mount.session(drive=drive)
    monkeypatch.setattr("mbqueue.drive.publishing.READ_SECONDS", 0.01)
    monkeypatch.setattr(drive, "check", lambda: over.wait(60.0))
    try:
        assert session.publisher.reconcile(session.queue, now=mount.clock.monotonic()) == []
    finally:
        over.set()
    assert any("has not answered" in note for note in session.notes)


def test_no_file_is_started_that_cannot_be_written_before_the_end(mount: Mount) -> None:
    left = [1000.0]
    drive = SlowDrive(mount.root, mount.clock)
    session = mount.session(drive=drive, remaining=lambda: left[0])
    mount.train(session, 1)
    assert session.publish()
    mount.train(session, 1)
    before = mount.names("state/checkpoints")
    left[0] = 10.0
    assert session.publish() is False
    assert mount.names("state/checkpoints") == before
    told = publishing_status(session.project)
    assert told is not None
    assert "no time left" in told["why"]


def test_a_second_session_sees_the_first_and_takes_another_fold(tmp_path: Path) -> None:
    mount = Mount(tmp_path)
    mount.enqueue(folds=(0, 1))
    first = mount.session()
    mount.train(first, 1)
    first.publish()
    second = mount.session()
    mount.work(second, 1)
    assert second.lease is not None
    assert first.lease is not None
    assert {first.lease.job.fold, second.lease.job.fold} == {0, 1}
    assert any(first.id in note and "skips the folds that the other session trains" in note for note in second.notes)
    told = publishing_status(second.project)
    assert told is not None
    assert [other["session"] for other in told["others"]] == [first.id]


def test_sessions_share_the_folds_and_one_of_them_records_the_results(tmp_path: Path) -> None:
    mount = Mount(tmp_path)
    mount.enqueue(folds=(0, 1))
    first = mount.session()
    mount.train(first, 1)
    first.publish()
    second = mount.session()
    for _ in range(40):
        for session in (first, second):
            mount.clock.advance(20.0)
            session.step()
            session.publish()
    assert is_done(first.queue) or is_done(second.queue)
    assert first.steps_trained + second.steps_trained == 8, "a step was done twice"


def test_of_two_lines_the_further_one_is_accepted_and_the_other_is_kept_and_reported(mount: Mount, deaf: None) -> None:
    first, second = mount.session(), mount.session()
    mount.train(first, 1)
    mount.train(second, 3)
    first.publish()
    second.publish()
    third = mount.session()
    chain = PublishedFold(Drive(mount.root), TINY).chain()
    assert chain
    assert chain[-1][0].manifest.session == second.id
    mount.work(third, 20)
    assert is_done(third.queue)
    third.end()
    told = publishing_status(third.project)
    assert told is not None
    assert told["aside"]
    lost = [PublishedFold(Drive(mount.root), TINY).commits()]
    assert any(commit.manifest.session == first.id for commit in lost[0]), "the other line was thrown away"
    history = read_history(history_file(mount.root / RESULTS, 0))
    assert [row["epoch"] for row in history] == [1, 2]
    assert all(first.id not in row["session"] for row in history)


def test_a_machine_moves_its_commits_to_aside_if_the_other_line_is_accepted(mount: Mount, deaf: None) -> None:
    first, second = mount.session(), mount.session()
    mount.train(first, 1)
    mount.train(second, 3)
    first.end()
    second.publish()
    folder = first.project.checkpoints_dir("tiny", 0)
    own = {path.name: path.read_bytes() for path in folder.glob("*.*")}
    notes: list[str] = []
    with Queue(first.project.queue_db) as queue:
        publisher = Publisher(first.project, None, note=notes.append, clock=mount.clock)
        assert publisher.reconcile(queue, now=mount.clock.monotonic())
    moved = {path.name: path.read_bytes() for path in (folder / "aside").iterdir()}
    assert moved == {f"{hashlib.sha256(content).hexdigest()[:12]}-{name}": content for name, content in own.items()}
    assert {Path(name).suffix for name in own} == {".json", ".pt"}
    assert any(f"was moved to {folder / 'aside'}" in note for note in notes)


def test_a_commit_that_disappears_before_it_is_moved_to_aside_gets_no_note(
    mount: Mount, deaf: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = mount.session(), mount.session()
    mount.train(first, 1)
    mount.train(second, 3)
    first.end()
    second.publish()
    manifests = set(first.project.checkpoints_dir("tiny", 0).glob("*.json"))
    hashed: list[Path] = []

    def hash_what_is_gone(path: Path) -> str:
        hashed.append(path)
        path.unlink()
        return files.sha256_of_file(path)

    monkeypatch.setattr("mbqueue.drive.reentry.sha256_of_file", hash_what_is_gone)
    notes: list[str] = []
    with Queue(first.project.queue_db) as queue:
        publisher = Publisher(first.project, None, note=notes.append, clock=mount.clock)
        assert publisher.reconcile(queue, now=mount.clock.monotonic())
    assert hashed
    assert set(hashed) == manifests
    assert not any("was moved to" in note for note in notes), notes


def test_with_equal_progress_every_machine_accepts_the_smaller_hash(mount: Mount, deaf: None) -> None:
    first, second = mount.session(), mount.session()
    for session in (first, second):
        mount.train(session, 1)
        session.publish()
    commits = PublishedFold(Drive(mount.root), TINY).commits()
    assert len({commit.manifest.stem for commit in commits}) == 1
    smallest = min(commits, key=lambda commit: commit.manifest.sha256)
    chain = PublishedFold(Drive(mount.root), TINY).chain()
    assert chain
    assert chain[-1][0].manifest == smallest.manifest


@pytest.mark.parametrize("damage", ["truncated", "flipped", "missing", "manifest truncated"])
def test_a_damaged_commit_on_the_mount_costs_only_the_work_after_the_one_before(mount: Mount, damage: str) -> None:
    session = mount.session()
    mount.train(session, 1)
    session.publish()
    mount.train(session, 1)
    session.publish()
    fold = PublishedFold(Drive(mount.root), TINY)
    newest = mount.root / fold.place.path(f"{fold.commits()[-1].base}.pt")
    content = newest.read_bytes()
    if damage == "truncated":
        newest.write_bytes(content[:-1])
    elif damage == "flipped":
        newest.write_bytes(content[:5] + bytes([content[5] ^ 1]) + content[6:])
    elif damage == "missing":
        newest.unlink()
    else:
        manifest = newest.with_suffix(".json")
        manifest.write_bytes(manifest.read_bytes()[:-10])
    notes: list[str] = []
    project = mount.machine()
    enter(project, note=notes.append, clock=mount.clock)
    told = publishing_status(project)
    assert told is not None
    assert any("is skipped" in note for note in notes)
    assert told["damaged"]
    mount.clock.advance(1000.0)  # by now, the other session counts as dead
    resumed = SteppedSession(mount.root, project.live_dir, mount.clock)
    mount.work(resumed, 20)
    assert is_done(resumed.queue)
    assert resumed.steps_trained <= 3


def _truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-4096])


def _garble(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[8192:12288] = b"\x5a" * 4096
    path.write_bytes(bytes(content))


def _run_sql(statement: str) -> Callable[[Path], None]:
    def change(path: Path) -> None:
        connection = sqlite3.connect(path)
        connection.executescript(statement)
        connection.close()

    return change


@pytest.mark.parametrize(
    "harm",
    [
        _truncate,
        _garble,
        _run_sql("CREATE TRIGGER evil AFTER INSERT ON sessions BEGIN DELETE FROM events; END"),
        _run_sql("CREATE VIEW evil AS SELECT 1"),
        _run_sql("UPDATE experiments SET results_dir = '../../outside'"),
        _run_sql("UPDATE experiments SET name = '../outside'"),
        _run_sql("UPDATE experiments SET spec = '{}'"),
        _run_sql("PRAGMA user_version = 0"),
    ],
    ids=["truncated", "garbled", "trigger", "view", "folder outside", "name outside", "no spec", "no version"],
)
def test_a_hostile_or_damaged_snapshot_is_skipped_for_the_one_before(
    mount: Mount, harm: Callable[[Path], None]
) -> None:
    session = mount.session()
    mount.train(session, 1)
    session.end()
    newest = max((mount.root / "state/snapshots").glob("*.db"))
    listing = json.loads(newest.with_suffix(".json").read_text())
    copy = mount.base / "evil.db"
    copy.write_bytes(newest.read_bytes())
    harm(copy)
    # Write a manifest that matches the harmful database, as an attacker could.
    listing |= {"size": copy.stat().st_size, "sha256": files.sha256_of_file(copy), "number": listing["number"] + 1}
    text = json.dumps(listing).encode()
    base = f"{listing['number']:08d}-{listing['database']}-{hashlib.sha256(text).hexdigest()[:12]}"
    (newest.parent / f"{base}.db").write_bytes(copy.read_bytes())
    (newest.parent / f"{base}.json").write_bytes(text)
    notes: list[str] = []
    project = mount.machine()
    enter(project, note=notes.append, clock=mount.clock)
    assert any(base in note and "is skipped" in note for note in notes), notes
    with Queue(project.queue_db, read_only=True) as queue:
        assert [experiment.results_dir for experiment in queue.experiments()] == [RESULTS]


def test_a_snapshot_of_a_newer_mbqueue_is_refused_with_the_reason(mount: Mount) -> None:
    newest = max((mount.root / "state/snapshots").glob("*.db"))
    listing = json.loads(newest.with_suffix(".json").read_text())
    make_newer(newest)
    listing |= {"size": newest.stat().st_size, "sha256": files.sha256_of_file(newest), "number": 99}
    text = json.dumps(listing).encode()
    base = f"00000099-{listing['database']}-{hashlib.sha256(text).hexdigest()[:12]}"
    newest.rename(newest.with_name(f"{base}.db"))
    (newest.parent / f"{base}.json").write_bytes(text)
    with pytest.raises(SchemaTooNew, match="pip install --upgrade mbqueue"):
        enter(mount.machine(), note=lambda _text: None, clock=mount.clock)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("experiment", "../../outside"),
        ("best", {"epoch": 1, "val_mae": 0.1, "commit": "../../../outside"}),
        ("epoch", 10**12),
        ("epoch", "1"),
        ("fold", 7),
        ("size", -1),
        ("size", 10**15),
        ("history", [{"epoch": 2}]),
        ("history", "x"),
        ("sha256", None),
        ("parent", "/etc/passwd"),
    ],
)
def test_a_hostile_manifest_is_skipped(mount: Mount, key: str, value: Any) -> None:
    session = mount.session()
    mount.train(session, 1)
    session.end()
    folder = mount.root / "state/checkpoints/tiny/fold_0"
    content = json.loads(next(folder.glob("*.json")).read_text())
    del content["checksum"]
    content |= {"epoch": 2, "fence": 9, key: value}
    content["checksum"] = files.sha256_of_json(content)  # an attacker can compute this checksum too
    text = json.dumps(content).encode()
    (folder / f"e0002-done-f0009-{hashlib.sha256(text).hexdigest()[:12]}.json").write_bytes(text)
    project = mount.machine()
    notes: list[str] = []
    enter(project, note=notes.append, clock=mount.clock)
    assert any("e0002-done-f0009" in note and "checksum" not in note for note in notes), notes
    with Queue(project.queue_db, read_only=True) as queue:
        assert sum(job.state == "committed" for job in queue.jobs() if job.epoch) == 0


def test_the_end_command_is_killed_if_it_takes_too_long(tmp_path: Path) -> None:
    notes: list[str] = []
    assert run_end_command(f"touch {tmp_path}/ended", timeout_seconds=30, note=notes.append)
    assert (tmp_path / "ended").exists()
    assert run_end_command("exec sleep 600", timeout_seconds=0.2, note=notes.append) is False
    assert "longer than 0.2 s" in notes[0]
    assert run_end_command("echo no drive here >&2; exit 3", timeout_seconds=30, note=notes.append) is False
    assert "code 3: no drive here" in notes[1]


def _newer_spec(record: dict[str, Any]) -> None:
    record["spec"]["train"]["a_key_of_next_year"] = 1


def _names_for_numbers(record: dict[str, Any]) -> None:
    record["spec"] = "tiny"


def _no_mapping(record: dict[str, Any]) -> None:
    record["prepare"] = ["d" * 64]


def _far_too_urgent(record: dict[str, Any]) -> None:
    record["priority"] = 10**30


RECORDS_OF_ANOTHER_MBQUEUE = pytest.mark.parametrize(
    "change",
    [_newer_spec, _names_for_numbers, _no_mapping, _far_too_urgent],
    ids=["a key of a newer mbqueue", "no spec", "no result of prepare", "an impossible priority"],
)


@RECORDS_OF_ANOTHER_MBQUEUE
def test_a_snapshot_with_unreadable_experiments_is_skipped_for_the_one_before(
    mount: Mount, change: Callable[[dict[str, Any]], None]
) -> None:
    base = _another_snapshot(mount, lambda listing: change(listing["experiments"][0]))
    notes: list[str] = []
    project = mount.machine()
    enter(project, note=notes.append, clock=mount.clock)
    assert any(base in note and "is skipped" in note for note in notes), notes
    with Queue(project.queue_db, read_only=True) as queue:
        assert [experiment.name for experiment in queue.experiments()] == ["tiny"]


@pytest.mark.parametrize("value", [["tiny"], "tiny", None, {"00000000": "1"}])
def test_a_snapshot_with_an_impossible_chain_of_databases_is_skipped(mount: Mount, value: Any) -> None:
    base = _another_snapshot(mount, lambda listing: listing.update(ancestry=value))
    notes: list[str] = []
    enter(mount.machine(), note=notes.append, clock=mount.clock)
    assert any(base in note and "is skipped" in note for note in notes), notes


def _another_snapshot(mount: Mount, change: Callable[[dict[str, Any]], None]) -> str:
    """Copy the newest snapshot to the next number, and change its manifest; return the copy's name without suffix."""
    newest = max((mount.root / "state/snapshots").glob("*.db"))
    listing = json.loads(newest.with_suffix(".json").read_text())
    listing["number"] += 1
    change(listing)
    text = json.dumps(listing).encode()
    base = f"{listing['number']:08d}-{listing['database']}-{hashlib.sha256(text).hexdigest()[:12]}"
    (newest.parent / f"{base}.db").write_bytes(newest.read_bytes())
    (newest.parent / f"{base}.json").write_bytes(text)
    return base


@RECORDS_OF_ANOTHER_MBQUEUE
def test_an_unreadable_experiment_does_not_affect_the_others(
    mount: Mount, change: Callable[[dict[str, Any]], None]
) -> None:
    session = mount.session()
    mount.train(session, 1)
    session.end()
    folder = mount.root / "state/checkpoints/tiny/fold_0"
    content = json.loads(next(folder.glob("*.json")).read_text())
    del content["checksum"]
    content["experiment"] = content["enqueued"]["spec"]["name"] = "later"
    content["enqueued"]["results_dir"] = "results/daily/2026-01-01/later"
    change(content["enqueued"])
    content["checksum"] = files.sha256_of_json(content)
    text = json.dumps(content).encode()
    other = mount.root / "state/checkpoints/later/fold_0"
    other.mkdir(parents=True)
    (other / f"e0001-s000001-f0001-{hashlib.sha256(text).hexdigest()[:12]}.json").write_bytes(text)
    project = mount.machine()
    enter(project, note=lambda _text: None, clock=mount.clock)
    with Queue(project.queue_db, read_only=True) as queue:
        assert [experiment.name for experiment in queue.experiments()] == ["tiny"]


def _raise_index_error(_self: Any) -> None:
    raise IndexError("injected")


def test_publishing_that_fails_in_an_unforeseen_way_is_reported_and_retried(
    mount: Mount, monkeypatch: pytest.MonkeyPatch
) -> None:
    session = mount.session()
    mount.train(session, 1)
    with monkeypatch.context() as patched:
        patched.setattr(PublishedFold, "commits", _raise_index_error)
        assert not session.publish()
    told = publishing_status(session.project)
    assert told is not None
    assert (told["state"], "IndexError" in told["why"]) == ("degraded", True)
    assert any("DEGRADED" in note for note in session.notes)
    assert session.publish()
    told = publishing_status(session.project)
    assert told is not None
    assert told["state"] == "published"
