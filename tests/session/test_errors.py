"""A session retries after an error where that can help, and ends normally."""

from __future__ import annotations

import errno
import gzip
import json
import re
import sqlite3
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from small_project import RememberedReport, enqueue, make_project, small_spec

from mbqueue.api import Project
from mbqueue.cli import main
from mbqueue.data import datasets, source
from mbqueue.drive.notes import keep_note
from mbqueue.errors import (
    CacheError,
    CheckpointError,
    CheckpointMisfit,
    DataError,
    DiskFull,
    MbqueueError,
    QueueDiskFull,
    SourceAway,
    StoreError,
)
from mbqueue.experiment import hash_of_spec
from mbqueue.project import ProjectFolder, init_project
from mbqueue.queue.jobs import Job, Kind, State
from mbqueue.queue.store import Queue
from mbqueue.session import worker
from mbqueue.session.options import WorkOptions
from mbqueue.session.outcome import Ending
from mbqueue.session.stop import StopRequest
from mbqueue.session.worker import work


def the_prepare_job(project: ProjectFolder) -> Job:
    with Queue(project.queue_db, read_only=True) as queue:
        return next(job for job in queue.jobs() if job.kind is Kind.PREPARE)


@pytest.fixture
def ending_project(tmp_path: Path) -> ProjectFolder:
    """A project whose end command creates a file."""
    make_project(tmp_path)
    with (tmp_path / "mbqueue.toml").open("a") as settings:
        settings.write(f'end_command = "touch {tmp_path}/ended"\n')
    project = init_project(tmp_path)[0]
    enqueue(project, small_spec(project, "pretrained_infer"))
    return project


@pytest.mark.parametrize(
    ("error", "raised"),
    [
        (OSError(errno.ENOSPC, "full"), DiskFull),
        (QueueDiskFull("The disk of queue.db is full."), DiskFull),
        (KeyboardInterrupt(), KeyboardInterrupt),
    ],
)
def test_the_end_command_runs_also_when_an_error_ends_the_session(
    ending_project: ProjectFolder,
    report: RememberedReport,
    monkeypatch: pytest.MonkeyPatch,
    error: BaseException,
    raised: type[BaseException],
) -> None:
    def fail(*_arguments: Any) -> str:
        raise error

    monkeypatch.setitem(worker._HANDLERS, Kind.PREPARE, fail)
    with pytest.raises(raised):
        work(ending_project, WorkOptions(device="cpu"), report=report)
    assert (ending_project.root / "ended").exists()


def test_no_end_command_skips_the_end_command(
    ending_project: ProjectFolder, report: RememberedReport, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(worker._HANDLERS, Kind.PREPARE, lambda *_: "done")
    work(ending_project, WorkOptions(device="cpu", max_jobs=0, end_command=False), report=report)
    assert not (ending_project.root / "ended").exists()


def test_a_dataset_that_no_later_attempt_can_split_fails_at_once(tmp_path: Path, report: RememberedReport) -> None:
    project = make_project(tmp_path)
    lines = gzip.decompress(datasets.SAMPLE_FILE.read_bytes()).splitlines(keepends=True)
    (tmp_path / "three.jsonl").write_bytes(b"".join(lines[:3]))
    enqueue(project, small_spec(project, data__dataset="three.jsonl", data__limit=0))
    assert work(project, WorkOptions(device="cpu"), report=report).ending is Ending.BLOCKED
    with Queue(project.queue_db, read_only=True) as queue:
        (failed,) = queue.jobs(state=State.FAILED)
    assert failed.failures == 1
    assert "3 crystals cannot be split into 5 folds" in (failed.error or "")


@pytest.mark.parametrize("n_jobs", [1, 2])
def test_a_session_that_waits_for_a_retry_names_the_job_and_says_once_how_to_retry_at_once(
    tmp_path: Path, report: RememberedReport, monkeypatch: pytest.MonkeyPatch, n_jobs: int
) -> None:
    project = make_project(tmp_path)
    for name in ("first", "second")[:n_jobs]:
        enqueue(project, small_spec(project, name=name, results_name=name, data__dataset="mine.jsonl"))
    monkeypatch.setattr(worker, "POLL_SECONDS", 0.01)
    stop, waits = StopRequest(), []

    def waiting(why: str) -> None:
        waits.append(why)
        if len(waits) == 3:
            stop.request("three waits")

    report.waiting = waiting  # type: ignore[method-assign]
    work(project, WorkOptions(device="cpu"), report=report, stop=stop)
    hints = [line for line in report.lines if "retry" in line]
    assert hints == ["note: to retry at once, run mbqueue retry first in another terminal"]
    others = "; 1 other job will be retried later" if n_jobs == 2 else ""
    assert re.fullmatch(rf"the next attempt at first prepare is in \d+s{others}", waits[0])
    error = the_prepare_job(project).error or ""
    assert f"no file or folder {tmp_path / 'mine.jsonl'}. Put it there" in error


@pytest.mark.parametrize(
    ("error", "is_final"),
    [
        (DataError("d"), True),
        (CheckpointMisfit("m"), True),
        (CheckpointError("e"), False),
        (SourceAway("s"), False),
        (CacheError("c"), False),
        (StoreError("s"), False),
    ],
)
def test_errors_that_a_later_attempt_may_cure_are_retried(
    tmp_path: Path, report: RememberedReport, monkeypatch: pytest.MonkeyPatch, error: MbqueueError, is_final: bool
) -> None:
    project = make_project(tmp_path)
    enqueue(project, small_spec(project, "pretrained_infer"))

    def fail(*_arguments: Any) -> str:
        raise error

    monkeypatch.setitem(worker._HANDLERS, Kind.PREPARE, fail)
    stop = StopRequest()
    report.job_started = lambda _job: stop.request("one attempt")  # type: ignore[method-assign]
    work(project, WorkOptions(device="cpu"), report=report, stop=stop)
    assert (the_prepare_job(project).state is State.FAILED) is is_final


def test_an_unreadable_file_counts_as_unavailable_and_a_damaged_one_does_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    damaged = tmp_path / "damaged.json.bz2"
    damaged.write_bytes(b"no archive at all")
    with pytest.raises(DataError, match="damaged") as told, source.opened(damaged) as stream:
        stream.read()
    assert not isinstance(told.value, SourceAway)

    def fail(*_arguments: Any) -> Any:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(Path, "open", fail)
    with pytest.raises(SourceAway, match="cannot be read"), source.opened(damaged):
        pass


def test_a_stop_while_a_dataset_is_read_takes_effect_and_costs_no_attempt(
    tmp_path: Path, report: RememberedReport
) -> None:
    project = make_project(tmp_path)
    lines = gzip.decompress(datasets.SAMPLE_FILE.read_bytes()).splitlines(keepends=True)
    (tmp_path / "mine.jsonl").write_bytes(b"".join(lines * 3))
    enqueue(project, small_spec(project, data__dataset="mine.jsonl", data__limit=0))
    stop, told = StopRequest(), []

    def advanced(_job: Job, what: str, _done: int, _total: int) -> None:
        told.append(what)
        stop.request("enough")

    report.on_advanced = advanced
    assert work(project, WorkOptions(device="cpu"), report=report, stop=stop).reason == "enough"
    assert told == ["reading"]
    job = the_prepare_job(project)
    assert (job.state, job.failures, job.preemptions) == (State.READY, 0, 1)


def test_a_damaged_spec_fails_at_once_and_following_the_advice_repairs_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    said = _worked_with_another_spec(tmp_path, "'$.train.lr', 1.0", capsys)
    assert "FAILED, after fixing the cause: mbqueue retry pretrained_infer" in said
    assert "is damaged: it differs from the enqueued spec. Rebuild the queue" in said
    assert "mbqueue recover --force" in said
    project = Project(tmp_path)
    project.recover(force=True)
    outcome = project.work(device="cpu", max_jobs=1)
    assert (outcome.jobs_done, the_prepare_job(project.folder).state) == (1, State.COMMITTED)


def test_a_spec_of_another_version_fails_at_once_and_the_advice_names_no_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    said = _worked_with_another_spec(tmp_path, "'$.train.of_tomorrow', 1", capsys, is_damage=False)
    assert "train.of_tomorrow: there is no such key" in said
    assert "Another version of mbqueue enqueued this experiment" in said
    assert "Fix the file" not in said


def _worked_with_another_spec(
    root: Path, change: str, capsys: pytest.CaptureFixture[str], *, is_damage: bool = True
) -> str:
    """Change a spec in the queue, run `mbqueue work`, check that it tries the job only once, and return its output."""
    make_project(root)
    project = Project(root)
    project.enqueue("pretrained_infer", dataset="sample", settings={"data.limit": 40})
    with closing(sqlite3.connect(project.folder.queue_db)) as connection, connection:
        connection.execute(f"UPDATE experiments SET spec = json_set(spec, {change})")
        if not is_damage:
            (spec,) = connection.execute("SELECT spec FROM experiments").fetchone()
            connection.execute("UPDATE experiments SET spec_hash = ?", (hash_of_spec(json.loads(spec)),))
    if not is_damage:
        with Queue(project.folder.queue_db) as queue:
            keep_note(project.folder, queue, "pretrained_infer")
    with pytest.raises(SystemExit) as ended:
        main(["--project", str(root), "work", "--device", "cpu"])
    assert ended.value.code == 1
    prepare = the_prepare_job(project.folder)
    assert (prepare.state, prepare.failures) == (State.FAILED, 1)
    told = capsys.readouterr()
    assert "next attempt at" not in told.out + told.err
    return " ".join((told.out + told.err).split())
