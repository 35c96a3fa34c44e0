"""The guarantees in `mbqueue.storage.blobs`, tested on every kind of store."""

from __future__ import annotations

import errno
import itertools
import os
import shutil
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule, run_state_machine_as_test
from s3_server import S3Server, new_store

from mbqueue.files import temp_beside
from mbqueue.project import init_project
from mbqueue.storage.blobs import Blobs, Folder
from mbqueue.storage.mounted import Drive

KINDS = ["folder", "folder without links", "mount", "s3", "shared folder"]
#: A function that returns a new, empty blob store.
Make = Callable[[], Blobs]


@pytest.fixture(params=KINDS)
def make(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Make:
    """For each kind of store, a function that creates a new, empty store."""
    numbers = itertools.count()
    s3: S3Server | None = request.getfixturevalue("s3") if request.param == "s3" else None
    if request.param == "folder without links":
        monkeypatch.setattr(os, "link", _no_links)

    def made() -> Blobs:
        folder = tmp_path / str(next(numbers))
        if request.param.startswith("folder"):
            return Folder(folder)
        if request.param == "mount":
            return Drive(init_project(folder)[0].root)
        return new_store(request.param, s3, folder)  # type: ignore[arg-type]

    return made


@pytest.fixture
def blobs(make: Make) -> Blobs:
    """An empty store of each kind."""
    return make()


def _no_links(*_names: object) -> None:
    raise PermissionError(errno.EPERM, "this file system has no links")


def names(blobs: Blobs, folder: str) -> list[str]:
    return list(blobs.listed(folder))


def test_put_blobs_are_read_and_listed_in_order(blobs: Blobs) -> None:
    blobs.put("state/b-2.pt", b"two")
    blobs.put("state/a-1.pt", b"")
    blobs.put("state/c-3.pt", bytes(range(256)) * 5000)
    assert names(blobs, "state") == ["a-1.pt", "b-2.pt", "c-3.pt"]
    assert blobs.read("state/a-1.pt", at_most=10) == b""
    assert blobs.read("state/b-2.pt", at_most=3) == b"two"
    assert blobs.read("state/c-3.pt", at_most=1 << 30) == bytes(range(256)) * 5000


def test_reading_is_limited_to_a_maximum_size(blobs: Blobs) -> None:
    blobs.put("state/a.pt", b"x" * 1000)
    assert blobs.read("state/a.pt", at_most=10) == b"x" * 11
    assert blobs.read("state/a.pt", at_most=0) == b"x"


def test_reading_a_missing_blob_reports_it_and_removing_it_is_no_error(blobs: Blobs) -> None:
    assert names(blobs, "state/nothing") == []
    with pytest.raises(FileNotFoundError):
        blobs.read("state/nothing.pt", at_most=10)
    blobs.remove("state/nothing.pt")
    assert not blobs.move("state/nothing.pt", "state/other.pt")
    blobs.put("state/a.pt", b"a")
    with pytest.raises(FileNotFoundError):
        blobs.read("state/nothing.pt", at_most=10)


def test_putting_the_same_twice_changes_nothing(blobs: Blobs) -> None:
    blobs.put("state/a.pt", b"same")
    blobs.put("state/a.pt", b"same")
    assert names(blobs, "state") == ["a.pt"]
    assert blobs.read("state/a.pt", at_most=10) == b"same"


def test_a_name_is_created_once_except_by_a_writer_with_the_same_bytes(blobs: Blobs) -> None:
    assert blobs.create("state/a.json", b"one")
    assert blobs.create("state/a.json", b"one"), "the same writer again, whose answer was lost"
    assert not blobs.create("state/a.json", b"two")
    assert not blobs.create("state/a.json", b"one and more")
    assert blobs.read("state/a.json", at_most=10) == b"one"
    assert names(blobs, "state") == ["a.json"]


def test_a_removed_blob_can_be_created_again(blobs: Blobs) -> None:
    assert blobs.create("state/a.json", b"one")
    blobs.remove("state/a.json")
    assert names(blobs, "state") == []
    assert blobs.create("state/a.json", b"two")


def test_a_moved_blob_has_only_the_new_name(blobs: Blobs) -> None:
    blobs.put("state/a.pt", b"content")
    assert blobs.move("state/a.pt", "state/a.pt.damaged")
    assert names(blobs, "state") == ["a.pt.damaged"]
    assert blobs.read("state/a.pt.damaged", at_most=10) == b"content"


def test_a_listing_shows_another_tag_for_another_content_or_none(blobs: Blobs) -> None:
    blobs.put("state/a.json", b"one")
    before = blobs.listed("state")["a.json"]
    blobs.remove("state/a.json")
    blobs.put("state/a.json", b"two!")
    after = blobs.listed("state")["a.json"]
    assert after.tag != before.tag or (after.tag, before.tag) == ("", "")
    assert after.size in (4, -1)


def test_of_concurrent_writers_of_one_name_one_wins(blobs: Blobs, request: pytest.FixtureRequest) -> None:
    if "without links" in request.node.name:
        blobs.create("state/0.json", b"no race here: without links the first is only heard as a rule")
        assert not blobs.create("state/0.json", b"second")
        return
    for number in range(5):
        both, won = threading.Barrier(4), []

        def write(content: bytes, number: int = number, both: threading.Barrier = both, won: list[bytes] = won) -> None:
            both.wait()
            if blobs.create(f"state/{number}.json", content):
                won.append(content)

        threads = [threading.Thread(target=write, args=(f"writer {one}".encode(),)) for one in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(won) == 1
        assert blobs.read(f"state/{number}.json", at_most=100) == won[0]


class AnyMix(RuleBasedStateMachine):
    """A state machine that compares a blob store with a dictionary."""

    make: Make

    def __init__(self) -> None:
        super().__init__()
        self.blobs = self.make()
        self.known: dict[str, bytes] = {}

    names = st.sampled_from([f"state/{name}.json" for name in "abc"])
    contents = st.sampled_from([b"", b"one", b"two", b"x" * 3000])

    @rule(name=names, content=contents)
    def create(self, name: str, content: bytes) -> None:
        assert self.blobs.create(name, content) == (self.known.get(name, content) == content)
        self.known.setdefault(name, content)

    @rule(name=names)
    def put_again(self, name: str) -> None:
        if name in self.known:
            self.blobs.put(name, self.known[name])

    @rule(name=names)
    def remove(self, name: str) -> None:
        self.blobs.remove(name)
        self.known.pop(name, None)

    @rule(name=names, to=names)
    def move(self, name: str, to: str) -> None:
        if to not in self.known and name != to:
            assert self.blobs.move(name, to) == (name in self.known)
            if name in self.known:
                self.known[to] = self.known.pop(name)

    @invariant()
    def everything_is_as_known(self) -> None:
        assert names(self.blobs, "state") == sorted(name.partition("/")[2] for name in self.known)
        for name, content in self.known.items():
            assert self.blobs.read(name, at_most=1 << 20) == content


def test_any_mix_of_operations_behaves_like_a_dictionary(make: Make) -> None:
    machine = type("AnyMixHere", (AnyMix,), {"make": staticmethod(make)})
    checks = [HealthCheck.too_slow, HealthCheck.function_scoped_fixture]
    run_state_machine_as_test(
        machine, settings=settings(max_examples=12, stateful_step_count=12, deadline=None, suppress_health_check=checks)
    )


@pytest.fixture
def died_while_writing(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Leave the files that exist when a process dies at its next rename or link."""

    class Death(BaseException):
        pass

    def die(*_names: object) -> None:
        raise Death

    with monkeypatch.context() as patched:
        patched.setattr(Path, "replace", die)
        patched.setattr(os, "link", die)
        yield Death


def test_a_death_in_a_folder_leaves_no_blob_of_that_name(tmp_path: Path, died_while_writing: Any) -> None:
    folder = Folder(tmp_path / "folder")
    for write in (folder.put, folder.create):
        with pytest.raises(died_while_writing):
            write("state/a.json", b"half")
        assert names(folder, "state") == []


def test_half_written_files_are_not_listed_and_are_removed(tmp_path: Path) -> None:
    folder = Folder(tmp_path)
    folder.put("state/a.json", b"whole")
    half = temp_beside(tmp_path / "state" / "b.json")
    half.write_bytes(b"ha")
    assert names(folder, "state") == ["a.json"]
    folder.sweep("state")
    assert [path.name for path in (tmp_path / "state").iterdir()] == ["a.json"]


def test_a_truncated_file_on_a_mount_blocks_no_writer(tmp_path: Path) -> None:
    """The truncated file is kept, because its upload may not have finished. Readers also try the file `NAME (1)`."""
    drive = Drive(init_project(tmp_path / "drive")[0].root)
    drive.put("state/a-0123456789ab.pt", b"content")
    (drive.root / "state/a-0123456789ab.pt").write_bytes(b"con")
    drive.put("state/a-0123456789ab.pt", b"content")
    found = names(drive, "state")
    assert found == ["a-0123456789ab (1).pt", "a-0123456789ab.pt"]
    assert drive.read(f"state/{found[0]}", at_most=100) == b"content"


def test_a_link_or_a_folder_under_a_blobs_name_is_unreadable_and_not_followed(tmp_path: Path) -> None:
    drive = Drive(init_project(tmp_path / "drive")[0].root)
    (tmp_path / "secret").write_bytes(b"secret")
    (drive.root / "state/a.pt").symlink_to(tmp_path / "secret")
    (drive.root / "state/b.pt").mkdir()
    for name in ("a", "b"):
        with pytest.raises(FileNotFoundError):
            drive.read(f"state/{name}.pt", at_most=100)


def test_a_lost_mount_reports_no_blob_as_missing_and_accepts_none(tmp_path: Path) -> None:
    drive = Drive(init_project(tmp_path / "drive")[0].root)
    drive.put("state/a.pt", b"content")
    drive.root.rename(tmp_path / "unmounted")
    drive.root.mkdir()
    for ask in (
        lambda: drive.listed("state"),
        lambda: drive.put("state/b.pt", b"more"),
        lambda: drive.create("state/b.pt", b"more"),
    ):
        with pytest.raises(OSError, match="still mounted"):
            ask()
    assert list(drive.root.iterdir()) == []
    shutil.rmtree(drive.root)
