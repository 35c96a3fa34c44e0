"""A damaged commit in the live folder is repaired from its published copy, byte for byte."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path

import pytest
from small_project import ManualClock
from stepped_session import RESULTS, TINY, SteppedSession, tiny_spec

from mbqueue.drive.published import PublishedFold
from mbqueue.project import ProjectFolder, Settings, init_project
from mbqueue.queue.store import Queue
from mbqueue.storage.mounted import Drive
from mbqueue.storage.own_commits import OwnCommits
from mbqueue.storage.places import in_folder


@pytest.fixture
def session(tmp_path: Path, clock: ManualClock) -> SteppedSession:
    """A session of a project on a mount; the session has published one commit."""
    project = ProjectFolder(init_project(tmp_path / "mount")[0].root, Settings(), tmp_path / "live")
    project.live_dir.mkdir()
    with Queue(project.queue_db) as queue:
        queue.enqueue(tiny_spec(folds=(0,)), results_dir=RESULTS, now=clock.now())
    made = SteppedSession(project.root, project.live_dir, clock)
    while made.commits < 1:
        clock.advance(1.0)
        assert made.step()
    assert made.publish()
    return made


def checkpoints_of(session: SteppedSession, notes: list[str], damaged: list[str]) -> OwnCommits:
    folder = session.project.checkpoints_dir("tiny", 0)
    mirror = PublishedFold(Drive(session.project.root), TINY)
    return OwnCommits(
        in_folder(folder), TINY, lambda stem, _why: damaged.append(stem), mirror=mirror, note=notes.append
    )


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-7])


@pytest.mark.parametrize("suffix", [".pt", ".json"])
@pytest.mark.parametrize("harm", [flip, cut])
def test_the_published_copy_of_a_damaged_commit_replaces_it(
    session: SteppedSession, suffix: str, harm: Callable[[Path], None]
) -> None:
    folder = session.project.checkpoints_dir("tiny", 0)
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
    assert any("replaced by its published copy" in note for note in notes)


def test_a_missing_checkpoint_is_fetched(session: SteppedSession) -> None:
    folder = session.project.checkpoints_dir("tiny", 0)
    path = max(folder.glob("e*.pt"))
    whole = path.read_bytes()
    path.unlink()
    commits = checkpoints_of(session, [], [])
    (commit,) = commits.commits()
    assert commits.checkpoint(commit) == whole == path.read_bytes()


def test_without_a_mount_the_damaged_commit_is_set_aside_as_elsewhere(session: SteppedSession) -> None:
    folder = session.project.checkpoints_dir("tiny", 0)
    flip(max(folder.glob("e*.pt")))
    session.project.root.rename(session.project.root.with_name("away"))
    damaged: list[str] = []
    assert checkpoints_of(session, [], damaged).newest() is None
    assert len(damaged) == 1


def test_a_published_copy_that_is_damaged_too_is_not_used(session: SteppedSession) -> None:
    folder = session.project.checkpoints_dir("tiny", 0)
    flip(max(folder.glob("e*.pt")))
    flip(max((session.project.root / "state" / "checkpoints" / "tiny" / "fold_0").glob("*.pt")))
    damaged: list[str] = []
    assert checkpoints_of(session, [], damaged).newest() is None
    assert len(damaged) == 1
