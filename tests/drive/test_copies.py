"""A damaged commit of the live folder is mended from its published copy, byte for byte."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path

import pytest
from fake_training import FAKE, FakeSession
from small_project import ManualClock

from mbqueue.drive.published import PublishedFold
from mbqueue.experiment import parse_spec
from mbqueue.project import ProjectFolder, Settings, init_project
from mbqueue.queue.store import Queue
from mbqueue.storage.mounted import Drive
from mbqueue.storage.own_commits import OwnCommits
from mbqueue.storage.places import in_folder


@pytest.fixture
def session(tmp_path: Path, clock: ManualClock) -> FakeSession:
    """A session on a mount with a published commit."""
    project = ProjectFolder(init_project(tmp_path / "mount")[0].root, Settings(), tmp_path / "live")
    project.live_dir.mkdir()
    content = {"name": "fake", "folds": (0,), "data": {"dataset": "sample"}, "train": {"epochs": 2}}
    with Queue(project.queue_db) as queue:
        results = "results/daily/2026-01-01/fake"
        queue.enqueue(parse_spec(content, source="test"), results_dir=results, now=clock.now())
    made = FakeSession(project.root, project.live_dir, clock)
    while made.steps_trained < 1:
        clock.advance(1.0)
        assert made.step()
    assert made.publish()
    return made


def checkpoints_of(session: FakeSession, notes: list[str], damaged: list[str]) -> OwnCommits:
    folder = session.project.checkpoints_dir("fake", 0)
    mirror = PublishedFold(Drive(session.project.root), FAKE)
    return OwnCommits(
        in_folder(folder), FAKE, lambda stem, _why: damaged.append(stem), mirror=mirror, note=notes.append
    )


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-7])


@pytest.mark.parametrize("suffix", [".pt", ".json"])
@pytest.mark.parametrize("harm", [flip, cut])
def test_the_published_copy_of_that_very_commit_takes_the_place_of_the_damaged_one(
    session: FakeSession, suffix: str, harm: Callable[[Path], None]
) -> None:
    folder = session.project.checkpoints_dir("fake", 0)
    path = max(folder.glob("e*.json")).with_suffix(suffix)
    whole = path.read_bytes()
    harm(path)
    notes: list[str] = []
    damaged: list[str] = []
    checkpoints = checkpoints_of(session, notes, damaged)
    newest = checkpoints.commits()[-1]
    assert newest.base == path.stem
    assert hashlib.sha256(checkpoints.checkpoint(newest)).hexdigest() == newest.manifest.sha256
    assert path.read_bytes() == whole
    assert damaged == []
    assert any("published copy was fetched" in note for note in notes)


def test_a_missing_checkpoint_is_fetched(session: FakeSession) -> None:
    folder = session.project.checkpoints_dir("fake", 0)
    path = max(folder.glob("e*.pt"))
    whole = path.read_bytes()
    path.unlink()
    commits = checkpoints_of(session, [], [])
    (commit,) = commits.commits()
    assert commits.checkpoint(commit) == whole == path.read_bytes()


def test_without_a_mount_the_damaged_commit_is_set_aside_as_elsewhere(session: FakeSession) -> None:
    folder = session.project.checkpoints_dir("fake", 0)
    flip(max(folder.glob("e*.pt")))
    session.project.root.rename(session.project.root.with_name("away"))
    damaged: list[str] = []
    assert checkpoints_of(session, [], damaged).newest() is None
    assert len(damaged) == 1


def test_a_copy_that_is_damaged_too_does_not_help(session: FakeSession) -> None:
    folder = session.project.checkpoints_dir("fake", 0)
    flip(max(folder.glob("e*.pt")))
    flip(max((session.project.root / "state" / "checkpoints" / "fake" / "fold_0").glob("*.pt")))
    damaged: list[str] = []
    assert checkpoints_of(session, [], damaged).newest() is None
    assert len(damaged) == 1
