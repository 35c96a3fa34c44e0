"""The queue's file is lost but its work exists: every command reports it, none makes a new one, recover repairs it."""

from __future__ import annotations

import errno
from collections.abc import Callable
from pathlib import Path

import pytest
from small_project import RememberedReport, make_project
from typer.testing import CliRunner

from mbqueue.api import Project
from mbqueue.cli.app import app
from mbqueue.cli.doctor import _queue
from mbqueue.errors import QueueLost, UsageError
from mbqueue.experiment import load_spec
from mbqueue.queue.opening import open_queue, queue_exists
from mbqueue.queue.store import Queue
from mbqueue.session.options import WorkOptions
from mbqueue.session.worker import work


@pytest.fixture
def lost(tmp_path: Path) -> Project:
    project = Project(make_project(tmp_path / "project").root)
    project.enqueue("head_finetune", dataset="sample", folds=[0])
    project.folder.queue_db.unlink()
    return project


COMMANDS: dict[str, Callable[[Project], object]] = {
    "status": lambda project: project.status(),
    "events": lambda project: project.events(),
    "enqueue": lambda project: project.enqueue("full_finetune", dataset="sample"),
    "enqueue it again": lambda project: project.enqueue("head_finetune", dataset="sample"),
    "pause": lambda project: project.pause("head_finetune"),
    "resume": lambda project: project.resume("head_finetune"),
    "cancel": lambda project: project.cancel("head_finetune"),
    "retry": lambda project: project.retry("head_finetune"),
    "priority": lambda project: project.set_priority("head_finetune", 3),
    "work": lambda project: project.work(device="cpu"),
    "work in the background": lambda project: project.work_in_background(),
    "prune the cache": lambda project: project.prune_cache(),
    "migrate the queue": lambda project: project.migrate_queue("sqlite"),
    "move commits": lambda project: project.move_commits(),
    "back up": lambda project: project.back_up(project.folder.root / "backup.tar"),
}


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_says_that_it_is_lost_and_begins_no_other(lost: Project, command: str) -> None:
    with pytest.raises(QueueLost, match=r"it was lost.*mbqueue recover"):
        COMMANDS[command](lost)
    assert not lost.folder.queue_db.exists()


def test_cancel_says_so_instead_of_asking_for_confirmation(lost: Project) -> None:
    said = CliRunner().invoke(app, ["--project", str(lost.folder.root), "cancel", "head_finetune"])
    assert isinstance(said.exception, QueueLost)
    assert "Cancel the unfinished jobs" not in said.output


def test_doctor_says_so_too(lost: Project) -> None:
    assert "mbqueue recover" in _queue(lost.folder).remedy
    assert _queue(lost.folder).state == "problem"


def test_recover_brings_it_back(lost: Project) -> None:
    lost.recover()
    assert [one["name"] for one in lost.status().overview["experiments"]] == ["head_finetune"]


def test_recover_mends_it_even_after_another_was_begun(lost: Project) -> None:
    spec = load_spec(lost.folder.experiment_file("full_finetune"), overrides={"data.dataset": "sample"})
    with Queue(lost.folder.queue_db) as queue:
        queue.enqueue(spec, results_dir="results/full", now=0.0)
        lost._keep_wanted(queue, "full_finetune")
    lost.recover()
    names = {one["name"] for one in lost.status().overview["experiments"]}
    assert names == {"head_finetune", "full_finetune"}
    with pytest.raises(UsageError, match="it is whole"):
        lost.recover()


def test_recover_merges_a_second_queue_and_keeps_what_only_it_has(lost: Project) -> None:
    spec = load_spec(lost.folder.experiment_file("full_finetune"), overrides={"data.dataset": "sample"})
    with Queue(lost.folder.queue_db) as queue:
        queue.enqueue(spec, results_dir="results/full", now=0.0)
        queue.pause("full_finetune", now=0.0)
    report = RememberedReport()
    work(lost.folder, WorkOptions(device="cpu"), report=report)
    for told in (_queue(lost.folder).remedy, "\n".join(report.lines)):
        assert "The queue lacks head_finetune" in told
        assert "mbqueue recover" in told
    lost.recover()
    assert _queue(lost.folder).state == "ok"
    found = {one["name"]: one["paused"] for one in lost.status().overview["experiments"]}
    assert found == {"head_finetune": False, "full_finetune": True}


def test_recover_that_is_cut_off_loses_nothing_of_a_second_queue(
    lost: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = load_spec(lost.folder.experiment_file("full_finetune"), overrides={"data.dataset": "sample"})
    with Queue(lost.folder.queue_db) as queue:
        queue.enqueue(spec, results_dir="results/full", now=0.0)

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr("mbqueue.drive.recover.keep_wanted", full)
        with pytest.raises(OSError, match="No space"):
            lost.recover()
    lost.recover()
    names = {one["name"] for one in lost.status().overview["experiments"]}
    assert names == {"head_finetune", "full_finetune"}


def test_a_project_where_nothing_was_ever_enqueued_has_lost_nothing(tmp_path: Path) -> None:
    project = Project(make_project(tmp_path / "project").root)
    assert not queue_exists(project.folder)
    open_queue(project.folder).close()
