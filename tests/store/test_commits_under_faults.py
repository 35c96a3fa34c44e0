"""Commits in an object store whose requests fail and whose writers race or die."""

from __future__ import annotations

import contextlib
import hashlib
import json
import subprocess
import sys
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from kept_commits import SMALL, SMALL_FOLDER
from s3_server import FaultyBackend, S3Server, faulty, new_store

from mbqueue.errors import CommitTaken, StoreAway
from mbqueue.storage import objects
from mbqueue.storage.manifest import Damaged, manifest_of
from mbqueue.storage.objects import ObjectStore
from mbqueue.storage.own_commits import GARBAGE_SECONDS, OwnCommits
from mbqueue.storage.places import in_store

HISTORY = [{"epoch": 1, "val_mae": 0.5, "seconds": 1.0}]


@pytest.fixture(autouse=True)
def _no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(objects, "_PAUSE_SECONDS", 0.0)


@pytest.fixture(params=["s3", "shared folder"])
def store(request: pytest.FixtureRequest, s3: S3Server, tmp_path: Path) -> ObjectStore:
    """An empty store of either kind."""
    return new_store(request.param, s3, tmp_path / "share")


def fields(*, epoch: int = 1, fence: int = 1, session: str = "a", **other: Any) -> dict[str, Any]:
    """The fields of a manifest besides size and hash."""
    stem = f"e{epoch:04d}-done-f{fence:04d}"
    return {
        "experiment": "small",
        "spec_hash": "s",
        "dataset_hash": "d",
        "fold": 0,
        "epoch": epoch,
        "step": 3,
        "steps_per_epoch": 3,
        "complete": True,
        "fence": fence,
        "parent": None,
        "session": session,
        "written_at": "2026-01-01T00:00:00Z",
        "best": {"epoch": epoch, "val_mae": 0.5, "commit": stem},
        "history": [{**HISTORY[0], "epoch": number} for number in range(1, epoch + 1)],
        "fingerprint": {},
        **other,
    }


def machine(store: ObjectStore, folder: Path) -> OwnCommits:
    """The fold's commits on a new machine, which keeps its copies in ``folder``."""
    return OwnCommits(in_store(store, SMALL), SMALL, near=folder)


def whole(store: ObjectStore, folder: Path) -> list[str]:
    """The commits with a matching checkpoint, as a new machine sees them."""
    seen = machine(store, folder)
    found = []
    for commit in seen.commits():
        content = seen.checkpoint(commit)
        assert hashlib.sha256(content).hexdigest() == commit.manifest.sha256
        found.append(f"{commit.base} by {commit.manifest.session}")
    return found


def test_of_two_writers_of_one_commit_one_wins_and_the_other_is_told(store: ObjectStore, tmp_path: Path) -> None:
    for number in range(1, 11):
        both = threading.Barrier(2)
        ends: dict[str, str] = {}

        def write(session: str, number: int = number, both: Any = both, ends: dict[str, str] = ends) -> None:
            commits = machine(store, tmp_path / session)
            staged = commits.stage(session.encode() * 1000, fields(epoch=number, session=session))
            both.wait()
            try:
                staged.publish()
                ends[session] = "won"
            except CommitTaken as error:
                ends[session] = "lost" if "Another worker has already written" in str(error) else str(error)
            finally:
                staged.discard()

        threads = [threading.Thread(target=write, args=(session,)) for session in "ab"]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert sorted(ends.values()) == ["lost", "won"], f"epoch {number}"
        (winner,) = [session for session, end in ends.items() if end == "won"]
        stem = f"e{number:04d}-done-f0001"
        assert whole(store, tmp_path / f"fresh-{number}")[-1] == f"{stem} by {winner}"


def test_a_writer_with_the_same_bytes_is_the_same_writer(store: ObjectStore, tmp_path: Path) -> None:
    commits = machine(store, tmp_path)
    commits.stage(b"state", fields()).publish()
    commits.stage(b"state", fields()).publish()
    assert whole(store, tmp_path / "fresh") == ["e0001-done-f0001 by a"]


def commit_of(commits: OwnCommits, content: bytes, said: dict[str, Any]) -> None:
    """Retry a commit with the same bytes, as a worker does."""

    def once() -> None:
        staged = commits.stage(content, said)
        try:
            staged.publish()
        finally:
            staged.discard()

    _again(once)


@pytest.mark.parametrize("after", [False, True], ids=["request lost", "answer lost"])
@pytest.mark.parametrize("kind", ["s3", "shared folder"])
def test_a_request_or_an_answer_lost_at_any_operation_costs_no_commit(
    kind: str, after: bool, s3: S3Server, tmp_path: Path
) -> None:
    def epochs(store: ObjectStore, folder: Path) -> None:
        commits = machine(store, folder)
        for number in (1, 2, 3):
            commit_of(commits, f"state {number}".encode(), fields(epoch=number))
            _again(commits.prune)

    real = new_store(kind, s3, tmp_path / "counted")
    counting, counted = faulty(real.url)
    epochs(counting, tmp_path / "counting")
    assert len(counted.calls) > 12
    for at in range(1, len(counted.calls) + 1):
        store = new_store(kind, s3, tmp_path / f"share-{at}")
        failing, backend = faulty(store.url, at=at, after=after)
        epochs(failing, tmp_path / f"machine-{at}")
        found = whole(store, tmp_path / f"fresh-{at}")
        # Check only the last two commits, because a removed commit still exists if the request to remove it was lost.
        assert found[-2:] == ["e0002-done-f0001 by a", "e0003-done-f0001 by a"], f"{at}: {backend.calls[at - 1]}"


def _again(work: Callable[[], Any]) -> Any:
    while True:
        try:
            return work()
        except StoreAway:
            continue


@pytest.mark.parametrize("after", [False, True], ids=["request lost", "answer lost"])
def test_a_death_at_any_operation_leaves_the_commit_before_or_the_new_one_whole(
    after: bool, s3: S3Server, tmp_path: Path
) -> None:
    class Death(BaseException):
        pass

    def die(backend: FaultyBackend) -> None:
        real = backend.real

        class Dying:
            def __getattr__(self, name: str) -> Any:
                def call(*arguments: Any, **options: Any) -> Any:
                    backend.calls.append(f"{name} {arguments[0]}")
                    last = len(backend.calls) == backend.at
                    if last and not after:
                        raise Death
                    answer = getattr(real, name)(*arguments, **options)
                    if last:
                        raise Death
                    return answer

                return call

        backend.real = Dying()

    at, ended = 0, False
    while not ended:
        at += 1
        store = new_store("s3", s3, tmp_path / "unused")
        machine(store, tmp_path / f"first-{at}").stage(b"one", fields()).publish()
        dying, backend = faulty(store.url)
        counted = FaultyBackend(backend.real, at=at)
        die(counted)
        dying.bulk = dying.brisk = counted.real
        commits = machine(dying, tmp_path / f"machine-{at}")
        try:
            commits.stage(b"two", fields(epoch=2)).publish()
            commits.prune()
            ended = True
        except Death:
            pass
        after_death = machine(store, tmp_path / f"fresh-{at}")
        newest = after_death.commits()[-1]
        assert newest.manifest.epoch in (1, 2)
        assert after_death.checkpoint(newest) == {1: b"one", 2: b"two"}[newest.manifest.epoch]
        # A session that resumes with a higher fence can commit.
        after_death.stage(b"three", fields(epoch=2, fence=2)).publish()
        assert whole(store, tmp_path / f"later-{at}")[-1] == "e0002-done-f0002 by a"
    assert at > 4


def test_an_intact_local_copy_saves_the_download_and_a_damaged_one_is_ignored(
    store: ObjectStore, tmp_path: Path
) -> None:
    commits = machine(store, tmp_path)
    commits.stage(b"state", fields()).publish()
    (commit,) = commits.commits()
    gets = store.requests.get("get", 0)
    assert commits.checkpoint(commit) == b"state"
    assert store.requests["get"] == gets
    (tmp_path / "e0001-done-f0001.pt").write_bytes(b"STATE")
    assert commits.checkpoint(commit) == b"state"
    assert (tmp_path / "e0001-done-f0001.pt").read_bytes() == b"state", "the copy is mended"
    (tmp_path / "e0001-done-f0001.json").write_text("{}")
    assert machine(store, tmp_path).commits() == [commit]


def test_a_commit_that_its_holder_has_just_replaced_is_not_called_damaged(store: ObjectStore, tmp_path: Path) -> None:
    told: list[str] = []
    reader = OwnCommits(in_store(store, SMALL), SMALL, lambda _stem, why: told.append(why), near=tmp_path / "reader")
    holder = machine(store, tmp_path / "holder")
    holder.stage(b"one", fields()).publish()
    (commit,) = reader.commits()
    holder.remove(commit)
    with pytest.raises(Damaged, match="missing"):
        reader.checkpoint(commit)
    reader._wrong(commit.base, Damaged("missing"))
    assert told == []


def test_an_old_checkpoint_without_a_manifest_is_removed(
    store: ObjectStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commits = machine(store, tmp_path)
    commits.stage(b"lost the race", fields(session="b"))
    commits.stage(b"state", fields()).publish()
    commits.prune()
    prefix = SMALL_FOLDER
    assert sum(name.endswith(".pt") for name in store.names(prefix)) == 2, "its writer may be about to publish it"
    listed = {
        name: replace(one, modified=one.modified - (2 * GARBAGE_SECONDS if name.endswith(".pt") else 0))
        for name, one in store.listed(prefix).items()
    }
    monkeypatch.setattr(store, "listed", lambda _folder: listed)
    commits.prune()
    monkeypatch.undo()
    assert sum(name.endswith(".pt") for name in store.names(prefix)) == 1
    assert whole(store, tmp_path / "fresh") == ["e0001-done-f0001 by a"]


def test_a_manifest_of_another_commit_under_a_name_is_set_aside(store: ObjectStore, tmp_path: Path) -> None:
    machine(store, tmp_path / "a").stage(b"one", fields()).publish()
    prefix = SMALL_FOLDER
    listing = store.read(f"{prefix}/e0001-done-f0001.json", at_most=1 << 20)
    assert manifest_of(listing, source="").epoch == 1
    store.put(f"{prefix}/e0009-done-f0009.json", listing)
    store.put(f"{prefix}/e0008-done-f0008.json", json.dumps({"format": 1}).encode())
    told: list[str] = []
    seen = OwnCommits(in_store(store, SMALL), SMALL, lambda stem, _why: told.append(stem), near=tmp_path / "b")
    assert [manifest.stem for manifest in seen.manifests()] == ["e0001-done-f0001"]
    assert sorted(told) == ["e0008-done-f0008", "e0009-done-f0009"]
    assert f"{prefix}/e0009-done-f0009.json.damaged".removeprefix(f"{prefix}/") in store.names(prefix)


def test_an_unmounted_shared_folder_neither_reports_missing_objects_nor_accepts_any(
    s3: S3Server, tmp_path: Path
) -> None:
    """An unmounted folder is empty, so without this check every commit would seem lost."""
    store = new_store("shared folder", s3, tmp_path / "share")
    commits = machine(store, tmp_path / "copies")
    commits.stage(b"state", fields()).publish()
    (tmp_path / "share").rename(tmp_path / "unmounted")
    (tmp_path / "share").mkdir()
    with pytest.raises(StoreAway, match="still mounted"):
        commits.manifests()
    with pytest.raises(StoreAway, match="still mounted"):
        commits.stage(b"more", fields(epoch=2))
    assert list((tmp_path / "share").iterdir()) == []


_UPLOAD = """
import sys
from mbqueue.storage.objects import ObjectStore
store = ObjectStore.open(sys.argv[1])
content = b"x" * 40_000_000
print("now", flush=True)
store.put("checkpoints/small/fold_0/large.pt", content)
"""


@pytest.mark.parametrize("milliseconds", [1, 10, 30])
def test_a_process_killed_in_mid_upload_leaves_a_whole_object_or_none(store: ObjectStore, milliseconds: int) -> None:
    child = subprocess.Popen([sys.executable, "-c", _UPLOAD, store.url], stdout=subprocess.PIPE)
    assert child.stdout is not None
    assert child.stdout.readline() == b"now\n"
    with contextlib.suppress(subprocess.TimeoutExpired):
        child.wait(milliseconds / 1000)
    child.kill()
    child.wait()
    child.stdout.close()
    prefix = SMALL_FOLDER
    assert {name: listed.size for name, listed in store.listed(prefix).items()} in ({}, {"large.pt": 40_000_000})
