"""Commits that two sessions write at the same time, and commits whose copies cannot be stored."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any

import pytest
from kept_commits import SMALL
from s3_server import new_store

from mbqueue.errors import CommitTaken
from mbqueue.files import create_bytes
from mbqueue.project import ProjectFolder
from mbqueue.session.shared_commits import send_fold
from mbqueue.storage.commits import Commits
from mbqueue.storage.own_commits import OwnCommits
from mbqueue.storage.places import in_folder, in_store


def fields(session: str) -> dict[str, Any]:
    """The fields of a manifest besides size and hash."""
    return {
        "experiment": "small",
        "spec_hash": "s",
        "dataset_hash": "d",
        "fold": 0,
        "epoch": 1,
        "step": 3,
        "steps_per_epoch": 3,
        "complete": True,
        "fence": 1,
        "parent": None,
        "session": session,
        "written_at": "2026-01-01T00:00:00Z",
        "best": {"epoch": 1, "val_mae": 0.5, "commit": "e0001-done-f0001"},
        "history": [{"epoch": 1, "val_mae": 0.5, "seconds": 1.0}],
        "fingerprint": {},
    }


def test_in_a_folder_a_second_writer_of_a_commit_leaves_the_checkpoint_of_the_first_alone(tmp_path: Path) -> None:
    first, second = (OwnCommits(in_folder(tmp_path), SMALL) for _ in range(2))
    staged = first.stage(b"one", fields("a"))
    with pytest.raises(CommitTaken):
        second.stage(b"two", fields("b"))
    staged.publish()
    (commit,) = second.commits()
    assert (commit.manifest.session, second.checkpoint(commit)) == ("a", b"one")


def test_the_newest_manifest_is_found_without_its_checkpoint(tmp_path: Path) -> None:
    commits = OwnCommits(in_folder(tmp_path), SMALL)
    assert commits.newest_manifest() is None
    for fence in (2, 1):
        commits.stage(b"state", fields("a") | {"fence": fence}).publish()
    (tmp_path / "e0001-done-f0002.pt").unlink()
    newest = commits.newest_manifest()
    assert newest is not None
    assert newest.fence == 2


def test_a_failing_disk_is_not_mistaken_for_one_without_links(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_names: object) -> None:
        raise OSError(errno.EIO, "the disk fails")

    monkeypatch.setattr(os, "link", fail)
    with pytest.raises(OSError, match="the disk fails"):
        create_bytes(tmp_path / "file", b"content")
    assert list(tmp_path.iterdir()) == []


def test_failed_copies_are_reported_once_and_cost_no_commit(tmp_path: Path) -> None:
    (tmp_path / "near").write_text("a file where the folder should be")
    notes: list[str] = []
    store = new_store("shared folder", None, tmp_path / "share")
    commits = OwnCommits(in_store(store, SMALL), SMALL, near=tmp_path / "near", note=notes.append)
    commits.stage(b"one", fields("a")).publish()
    (commit,) = commits.commits()
    assert commits.checkpoint(commit) == b"one"
    assert len(notes) == 1
    assert "cannot keep copies" in notes[0]


def test_commits_sent_to_a_store_replace_no_others(tmp_path: Path) -> None:
    store = new_store("shared folder", None, tmp_path / "share")
    theirs = OwnCommits(in_store(store, SMALL), SMALL)
    theirs.stage(b"theirs", fields("b")).publish()
    project = ProjectFolder(tmp_path / "project")
    ours = OwnCommits(in_folder(project.checkpoints_dir("small", 0)), SMALL)
    ours.stage(b"ours", fields("a")).publish()
    experiment: Any = type("Known", (), {"name": "small", "identity": lambda _self, _fold: SMALL})()
    notes: list[str] = []
    assert not send_fold(project, store, experiment, 0, 1, notes.append)
    assert "was left unchanged" in notes[0]
    (commit,) = Commits(in_store(store, SMALL), SMALL).commits()
    assert commit.manifest.session == "b"
