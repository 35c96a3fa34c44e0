"""A session copies crystals for other machines while it trains, and never waits for a slow drive."""

from __future__ import annotations

import hashlib
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from s3_server import S3Server
from small_project import RememberedReport, enqueue, make_split_project, small_spec

from mbqueue.drive.crystals import SharedCrystals, fetch_crystals, shared_crystals_of
from mbqueue.errors import StoreAway
from mbqueue.project import PUBLISHED_CRYSTALS, STORED_CRYSTALS, ProjectFolder
from mbqueue.session import crystal_copies as module
from mbqueue.session.crystal_copies import CrystalCopies
from mbqueue.session.options import WorkOptions
from mbqueue.session.outcome import Ending, StopCause, StopKind
from mbqueue.session.stop import StopRequest
from mbqueue.session.worker import work
from mbqueue.storage import mounted
from mbqueue.storage.mounted import Drive
from mbqueue.storage.objects import ObjectStore

PIECE = 2_000_000
CONTENT = b"crystals" * (5 * PIECE // 8)
HASH = "d" * 64
ASKED = StopCause(StopKind.ASKED, "a test asks for it")


class WatchedDrive(Drive):
    """A drive that reports each piece before it is written."""

    before: Callable[[int], None] = staticmethod(lambda _left: None)

    def write_new(self, path: str, content: bytes, **options: Any) -> None:
        go_on = options.pop("before_piece", lambda _left: None)

        def told(left: int) -> None:
            self.before(left)
            go_on(left)

        super().write_new(path, content, before_piece=told)


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mounted, "PIECE_BYTES", PIECE)
    monkeypatch.setattr(module, "STOP_SECONDS", 0.2)


@pytest.fixture
def split(tmp_path: Path) -> ProjectFolder:
    project = make_split_project(tmp_path)
    (project.live_dir / "crystals.bin").write_bytes(CONTENT)
    return project


def kept(project: ProjectFolder, notes: list[str], drive: Drive | None = None, **options: Any) -> CrystalCopies:
    """Start copying a session's crystals to the drive; return the running copy."""
    asked = {"should_stop": lambda: False, "spare": lambda: float("inf"), **options}
    copying = CrystalCopies(project, note=notes.append, **asked)
    shared = SharedCrystals(drive or Drive(project.root), PUBLISHED_CRYSTALS)
    copying.keep(shared, project.live_dir / "crystals.bin", HASH)
    return copying


def on_the_drive(project: ProjectFolder) -> list[Path]:
    folder = project.root / PUBLISHED_CRYSTALS
    return sorted(folder.iterdir()) if folder.exists() else []


def is_whole(project: ProjectFolder, target: Path, notes: list[str]) -> bool:
    return fetch_crystals(shared_crystals_of(project), HASH, target, notes.append) and target.read_bytes() == CONTENT


def test_a_stopping_session_abandons_the_copy_and_the_next_session_makes_it(
    split: ProjectFolder, tmp_path: Path
) -> None:
    notes: list[str] = []
    stop, pieces = StopRequest(), []
    drive = WatchedDrive(split.root)

    def ask(left: int) -> None:
        pieces.append(left)
        if len(pieces) == 2:
            stop.request(ASKED)

    drive.before = ask  # type: ignore[method-assign]
    with kept(split, notes, drive, should_stop=lambda: stop.cause is not None) as copying:
        assert not copying.settled(lambda: False)
    assert len(pieces) == 2
    assert on_the_drive(split) == []
    assert not is_whole(split, tmp_path / "fetched", [])
    (note,) = notes
    assert "the next session will try again" in note
    with kept(split, notes) as copying:
        assert copying.settled(lambda: False)
    assert is_whole(split, tmp_path / "fetched", notes)
    assert len(notes) == 1


def test_a_killed_sessions_partial_copy_does_not_count_and_the_next_session_makes_it(
    split: ProjectFolder, tmp_path: Path
) -> None:
    notes: list[str] = []
    path = split.root / PUBLISHED_CRYSTALS / f"{HASH[:16]}-{hashlib.sha256(CONTENT).hexdigest()}.bin"
    path.parent.mkdir(parents=True)
    path.write_bytes(CONTENT[:PIECE])
    assert not is_whole(split, tmp_path / "fetched", [])
    with kept(split, notes):
        pass  # leaving the block waits until the copy is complete
    assert is_whole(split, tmp_path / "fetched", [])
    assert notes == []


def test_a_copy_that_cannot_finish_in_time_is_abandoned(split: ProjectFolder) -> None:
    notes: list[str] = []
    drive = WatchedDrive(split.root)
    drive.before = lambda _left: time.sleep(0.02)  # type: ignore[method-assign]
    # The first of 5 pieces takes 0.02 s, so the remaining pieces would take longer than the 0.01 s that is left.
    with kept(split, notes, drive, spare=lambda: 0.01) as copying:
        assert not copying.settled(lambda: False)
    assert on_the_drive(split) == []
    assert "8.0 MB take" in notes[0]


def test_a_hanging_drive_is_abandoned(split: ProjectFolder) -> None:
    hangs, over = threading.Event(), threading.Event()
    drive, stop = WatchedDrive(split.root), StopRequest()

    def hang(_left: int) -> None:
        hangs.set()
        over.wait(60)

    drive.before = hang  # type: ignore[method-assign]
    try:
        began = time.monotonic()
        with kept(split, [], drive, should_stop=lambda: stop.cause is not None):
            assert hangs.wait(30)
            stop.request(ASKED)
        assert time.monotonic() - began < 30
        assert not over.is_set()
    finally:
        over.set()


def test_sessions_of_one_machine_make_one_copy(split: ProjectFolder) -> None:
    notes: list[str] = []
    with kept(split, notes), kept(split, notes), kept(split, notes):
        pass
    assert len(on_the_drive(split)) == 1
    assert notes == []


@pytest.mark.parametrize("is_away", [False, True])
def test_with_a_store_prepare_waits_until_the_crystals_are_stored_or_storing_failed(
    split: ProjectFolder, s3: S3Server, monkeypatch: pytest.MonkeyPatch, is_away: bool
) -> None:
    notes: list[str] = []
    store, may_end = ObjectStore.open(s3.new_store()), threading.Event()
    put = ObjectStore.put

    def slow(self: ObjectStore, path: str, content: bytes) -> None:
        may_end.wait(60)
        if is_away:
            raise StoreAway("it does not answer")
        put(self, path, content)

    monkeypatch.setattr(ObjectStore, "put", slow)
    copying = CrystalCopies(split, should_stop=lambda: False, spare=lambda: float("inf"), note=notes.append)
    with copying:
        copying.keep(SharedCrystals(store, STORED_CRYSTALS), split.live_dir / "crystals.bin", HASH)
        asked = iter([False, True])
        assert not copying.settled(lambda: next(asked)), "who is to stop does not wait"
        may_end.set()
        assert copying.settled(lambda: False)
    assert len(store.names(STORED_CRYSTALS)) == (0 if is_away else 1)
    assert bool(notes) == is_away
    assert store.put_seconds == 0.0, "it would be taken for the time of a commit"


def test_training_begins_while_copying_crystals_to_the_drive_hangs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.set_num_threads(1)
    project = make_split_project(tmp_path)
    enqueue(project, small_spec(project, train__epochs=1))
    hangs, over, write_new = threading.Event(), threading.Event(), Drive.write_new
    waited: list[str] = []

    def slow(self: Drive, path: str, content: bytes, **options: Any) -> None:
        if path.startswith(PUBLISHED_CRYSTALS):
            hangs.set()
            if not over.wait(300):
                waited.append(path)
        write_new(self, path, content, **options)

    monkeypatch.setattr(Drive, "write_new", slow)
    monkeypatch.setattr(module, "END_SECONDS", 0.2)
    report = RememberedReport()
    try:
        outcome = work(project, WorkOptions(device="cpu", max_jobs=2), report=report)
        assert waited == []
    finally:
        over.set()
    assert outcome.jobs_done == 2, report.lines
    assert hangs.is_set()
    monkeypatch.setattr(Drive, "write_new", write_new)
    monkeypatch.setattr(module, "END_SECONDS", 60.0)
    assert work(project, WorkOptions(device="cpu"), report=report).ending is Ending.DONE
    assert len(on_the_drive(project)) == 1, "the next session had the crystals from the cache"
