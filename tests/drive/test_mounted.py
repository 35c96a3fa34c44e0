"""What remains after a failed write to a mount."""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path
from typing import Any

import pytest
from small_project import ManualClock
from stepped_session import RESULTS, TINY, SteppedSession, tiny_spec

from mbqueue.drive.published import PublishedFold
from mbqueue.drive.publishing import Publisher
from mbqueue.drive.retention import SETTLED_SECONDS
from mbqueue.experiment import parse_spec
from mbqueue.project import ProjectFolder, Settings, init_project
from mbqueue.queue.store import Queue
from mbqueue.storage.mounted import Drive

PATH = "state/checkpoints/tiny/fold_0/e0001-done-f0001-0123456789ab.pt"


class FullDrive(Drive):
    """A drive that writes the start of a file and is then full, while `is_full` is set."""

    is_full = True

    def write_new(self, path: str, content: bytes, **options: Any) -> None:
        with pytest.MonkeyPatch.context() as patched:
            if self.is_full and self.is_about(path):
                patched.setattr(os, "fsync", _no_room)
            super().write_new(path, content, **options)

    def is_about(self, path: str) -> bool:
        """Whether the drive has no room for this file."""
        return True


def _no_room(fd: int) -> None:
    if stat.S_ISREG(os.fstat(fd).st_mode):
        os.ftruncate(fd, 100)
    raise OSError(errno.ENOSPC, "injected")


def _no_removing(_path: Path, missing_ok: bool = False) -> None:
    raise OSError(errno.EIO, "not this one")


def names(root: Path, folder: str) -> list[str]:
    return sorted(path.name for path in (root / folder).rglob("*") if path.is_file())


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return init_project(tmp_path / "drive")[0].root


def test_a_file_that_could_not_be_written_leaves_nothing_behind_and_is_written_later(root: Path) -> None:
    drive = FullDrive(root)
    for _ in range(3):
        with pytest.raises(OSError, match="injected"):
            drive.put(PATH, b"x" * 5000)
    assert names(root, "state") == []
    drive.is_full = False
    drive.put(PATH, b"x" * 5000)
    assert names(root, "state") == [Path(PATH).name]


def test_a_file_is_published_even_if_damaged_files_have_its_name(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drive = FullDrive(root)
    with monkeypatch.context() as patched:
        patched.setattr(Path, "unlink", _no_removing)
        for _ in range(150):
            with pytest.raises(OSError, match=r"injected|not this one"):
                drive.put(PATH, b"x" * 5000)
    assert len(names(root, "state")) <= 10
    drive.is_full = False
    drive.put(PATH, b"x" * 5000)
    assert [path.read_bytes() for path in (root / "state").rglob("*.pt")].count(b"x" * 5000) == 1


def enqueue_in(live: Path, clock: ManualClock, *, epochs: int) -> None:
    """Create a live folder whose queue has one fold to train."""
    live.mkdir()
    with Queue(live / "queue.db") as queue:
        queue.enqueue(tiny_spec(folds=(0,), epochs=epochs), results_dir=RESULTS, now=clock.now())


@pytest.mark.parametrize("name", ["desktop.ini", ".DS_Store", "Icon\r"])
def test_files_of_the_drive_program_are_ignored(root: Path, tmp_path: Path, clock: ManualClock, name: str) -> None:
    enqueue_in(tmp_path / "live", clock, epochs=2)
    session = SteppedSession(root, tmp_path / "live", clock)
    for _ in range(4):
        session.step()
    session.end()
    folders = [path for path in (root / "state").rglob("*") if path.is_dir()]
    assert {path.name for path in folders} >= {"fold_0", "snapshots"}
    for folder in [root / "state", *folders]:
        (folder / name).write_bytes(b"[.ShellClassInfo]")
    clock.advance(1000.0)
    next_one = SteppedSession(root, tmp_path / "live2", clock)
    assert not any("is skipped" in note for note in next_one.notes)
    while next_one.step():
        clock.advance(1.0)
    next_one.end()
    assert session.steps_trained + next_one.steps_trained == 4


class NoRoomForManifests(FullDrive):
    """A drive that has no room for a snapshot's manifest."""

    def is_about(self, path: str) -> bool:
        return path.startswith("state/snapshots/") and path.endswith(".json")


def published(root: Path, live: Path, clock: ManualClock, drive: Drive) -> Publisher:
    project = ProjectFolder(root, Settings(), live)
    project.live_dir.mkdir(exist_ok=True)
    return Publisher(project, None, note=lambda _text: None, clock=clock, drive=drive)


def test_snapshots_without_a_manifest_do_not_accumulate(root: Path, tmp_path: Path, clock: ManualClock) -> None:
    drive = NoRoomForManifests(root)
    publisher = published(root, tmp_path / "live", clock, drive)
    with Queue(tmp_path / "live" / "queue.db") as queue:
        queue.enqueue(tiny_spec(folds=(0,)), results_dir=RESULTS, now=clock.now())
        for _ in range(3):
            clock.advance(100.0)
            assert not publisher.round()
    assert names(root, "state/snapshots") == []
    drive.is_full = False
    assert publisher.round()
    assert len(names(root, "state/snapshots")) == 2


def test_a_partial_snapshot_of_a_dead_session_is_removed_with_snapshots_of_the_same_time(
    root: Path, tmp_path: Path, clock: ManualClock
) -> None:
    publisher = published(root, tmp_path / "live", clock, Drive(root))
    left: list[Path] = []
    with Queue(tmp_path / "live" / "queue.db") as queue:
        for priority in range(7):
            spec = {"name": f"fake{priority}", "folds": [0], "data": {"dataset": "sample"}, "train": {"epochs": 1}}
            folder = f"results/daily/2026-01-01/tiny{priority}"
            queue.enqueue(parse_spec(spec, source="test"), results_dir=folder, now=clock.now())
            clock.advance(100.0 if priority < 5 else SETTLED_SECONDS)
            assert publisher.round()
            if not left:
                whole = next((root / "state/snapshots").glob("*.db"))
                # A snapshot whose session died before it wrote the manifest.
                left.append(whole.with_name(whole.name[:18] + "000000000000.db"))
                # A duplicate file that the drive created.
                left.append(whole.with_name(whole.stem + " (1).db"))
                # A snapshot of a different database, which a session must not remove.
                other = whole.with_name("00000001-00000000-000000000000.db")
                for path in (*left, other):
                    path.write_bytes(whole.read_bytes()[:100])
    assert not any(path.exists() for path in left)
    assert other.exists()
    # The session keeps three snapshots that count as uploaded, and the newest one.
    assert len(list((root / "state/snapshots").glob("*.json"))) == 4


def test_a_session_on_a_full_drive_publishes_everything_once_there_is_room(
    root: Path, tmp_path: Path, clock: ManualClock
) -> None:
    enqueue_in(tmp_path / "live", clock, epochs=2)
    drive = FullDrive(root)
    session = SteppedSession(root, tmp_path / "live", clock, drive=drive)
    for _ in range(8):
        clock.advance(10.0)
        session.step()
        assert not session.publish()
    assert names(root, "state/checkpoints") == names(root, "state/snapshots") == []
    drive.is_full = False
    assert session.publish()
    assert not [name for name in names(root, "state") if "(" in name]
    session.end()


def test_a_commit_is_not_replaced_by_one_whose_upload_was_cut_off(
    root: Path, tmp_path: Path, clock: ManualClock
) -> None:
    enqueue_in(tmp_path / "live", clock, epochs=4)
    session = SteppedSession(root, tmp_path / "live", clock)
    for _ in range(9):
        clock.advance(10.0)
        session.step()
        assert session.publish()
    whole, *cut_off = PublishedFold(Drive(root), TINY).commits()
    assert len(cut_off) >= 2
    for commit in cut_off:
        checkpoint = root / PublishedFold(Drive(root), TINY).place.path(f"{commit.base}.pt")
        checkpoint.write_bytes(checkpoint.read_bytes()[:-1])
    fold = PublishedFold(Drive(root), TINY)
    for now in (0.0, 2 * SETTLED_SECONDS):
        fold.retire(cut_off[-1].manifest, now=now, steady_since=0.0)
    assert (root / fold.place.path(f"{whole.base}.pt")).exists()
    session.die()
