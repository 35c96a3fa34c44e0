"""A project whose drive is not mounted or hangs, on a machine that has its live folder."""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from small_project import ManualClock
from stepped_session import RESULTS, SteppedSession, tiny_spec

from mbqueue import Project
from mbqueue import project as project_module
from mbqueue.belonging import Belonging, answer_within, ids_in
from mbqueue.drive.publishing import Publisher
from mbqueue.drive.reentry import enter
from mbqueue.errors import ProjectNotFound
from mbqueue.project import ProjectFolder, Settings, find_project, init_project
from mbqueue.queue.store import Queue
from mbqueue.topology import LIVE_VARIABLE


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, clock: ManualClock) -> ProjectFolder:
    """A project on a drive, with a published experiment."""
    monkeypatch.setenv(LIVE_VARIABLE, str(tmp_path / "live"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "caches"))
    root = init_project(tmp_path / "mount" / "project")[0].root
    found = ProjectFolder(root, Settings(), tmp_path / "live")
    found.live_dir.mkdir()
    with Queue(found.queue_db) as queue:
        queue.enqueue(tiny_spec(folds=(0,)), results_dir=RESULTS, now=clock.now())
    enter(found, note=lambda _text: None)
    assert Publisher(found, None, note=lambda _text: None, clock=clock).round()
    return found


def _unmounted(root: Path) -> None:
    root.parent.rename(root.parent.with_name("away"))
    root.parent.mkdir()


def _made_anew(root: Path) -> None:
    _unmounted(root)
    init_project(root)


LOSSES = pytest.mark.parametrize("lose", [_unmounted, _made_anew], ids=["not mounted", "made anew in its place"])


@LOSSES
def test_status_answers_from_the_live_folder_degraded(folder: ProjectFolder, lose: object) -> None:
    assert callable(lose)
    lose(folder.root)
    told = Project(folder.root, while_away=True).status().overview
    assert [one["name"] for one in told["experiments"]] == ["tiny"]
    assert told["publishing"]["state"] == "degraded"
    assert str(folder.root) in told["publishing"]["why"]


def test_a_live_folder_named_only_in_the_project_is_found_while_the_drive_is_away(
    folder: ProjectFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(LIVE_VARIABLE)  # from here on, only the note in the user's cache folder names the live folder
    _unmounted(folder.root)
    assert find_project(folder.root, while_away=True).live == folder.live
    (note,) = Path(os.environ["XDG_CACHE_HOME"]).glob("mbqueue/live/project-*.json")
    note.write_text("{")
    with pytest.raises(ProjectNotFound, match="does not exist"):
        find_project(folder.root, while_away=True)


@LOSSES
def test_other_commands_say_that_the_drive_is_not_mounted_and_warn_against_init(
    folder: ProjectFolder, lose: object
) -> None:
    assert callable(lose)
    lose(folder.root)
    with pytest.raises(ProjectNotFound, match="Mount the drive") as said:
        Project(folder.root)
    assert "mbqueue init" not in str(said.value)


@LOSSES
def test_nothing_is_published_into_a_foreign_folder_at_the_mount_point(
    folder: ProjectFolder, lose: object, clock: ManualClock
) -> None:
    assert callable(lose)
    notes: list[str] = []
    session = SteppedSession(folder.root, folder.live_dir, clock)
    session.publisher = Publisher(session.project, session.id, clock=clock, note=notes.append)
    lose(folder.root)
    for _ in range(3):
        session.step()
        assert not session.publish()
    assert not any("The mount is back" in note for note in notes)
    assert not list((folder.root.parent).rglob("*.db"))
    session.die()


@pytest.mark.parametrize("error", [errno.ENOTCONN, errno.EIO, errno.ESTALE])
def test_a_failing_mount_is_reported_as_failing(
    folder: ProjectFolder, monkeypatch: pytest.MonkeyPatch, error: int
) -> None:
    def fails(_root: Path) -> bool:
        raise OSError(error, "injected")

    monkeypatch.setattr(project_module, "_is_project", fails)
    assert "injected" in Project(folder.root, while_away=True).status().overview["publishing"]["why"]
    with pytest.raises(ProjectNotFound, match="injected"):
        Project(folder.root)


@pytest.fixture
def hanging(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A mount that hangs until the test is over."""
    over = threading.Event()
    monkeypatch.setattr(project_module, "_is_project", lambda _root: over.wait(60.0))
    monkeypatch.setattr(project_module, "LOOK_SECONDS", 0.01)
    yield
    over.set()


def test_a_mount_that_hangs_is_not_waited_for(folder: ProjectFolder, hanging: None) -> None:
    told = Project(folder.root, while_away=True).status().overview
    assert "did not answer" in told["publishing"]["why"]


def test_a_folder_inside_a_project_that_is_away_is_recognised(
    folder: ProjectFolder,
) -> None:
    init_project(folder.root.parent.parent)  # a project above the mount, which `find_project` must not return
    _unmounted(folder.root)
    found = find_project(start=folder.root / "jobs", while_away=True)
    assert (found.root, found.away) == (folder.root, "the folder contains no project")


def test_a_project_without_an_id_gets_one_at_the_next_publishing(folder: ProjectFolder, clock: ManualClock) -> None:
    (known,) = ids_in(folder.state_dir)
    assert Belonging.of(folder.live_dir) == Belonging(root=str(folder.root), id=known)
    (folder.state_dir / f"project-{known}.json").unlink()
    (folder.live_dir / "project.json").unlink()
    assert Publisher(folder, None, note=lambda _text: None, clock=clock).round()
    (another,) = ids_in(folder.state_dir)
    assert Project(folder.root).folder.away is None
    assert another != known


def test_a_second_machine_uses_the_existing_id(folder: ProjectFolder, tmp_path: Path, clock: ManualClock) -> None:
    session = SteppedSession(folder.root, tmp_path / "live2", clock)
    (known,) = ids_in(folder.state_dir)
    assert Belonging.of(session.project.live_dir) == Belonging(root=str(folder.root), id=known)
    session.end()


def test_a_result_or_error_within_the_time_limit_is_passed_on() -> None:
    assert answer_within(60.0, lambda: 7) == 7
    with pytest.raises(ProjectNotFound, match="here"):
        answer_within(60.0, lambda: (_ for _ in ()).throw(ProjectNotFound("here")))
