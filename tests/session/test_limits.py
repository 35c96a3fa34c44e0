"""A session that reaches a limit of the machine or the shell ends with an error that names the limit."""

from __future__ import annotations

import errno
import re
import resource
from pathlib import Path

import numpy as np
import pytest
from small_project import RememberedReport, enqueue, make_project, small_spec

from mbqueue.api import Project
from mbqueue.cli import main
from mbqueue.errors import LimitReached
from mbqueue.limits import why_limited
from mbqueue.queue.jobs import Kind, State
from mbqueue.queue.store import Queue
from mbqueue.session import worker
from mbqueue.session.options import WorkOptions
from mbqueue.session.worker import work


def out_of_memory() -> None:
    np.empty((1 << 20, 1 << 30), np.float64)


def too_large_a_file() -> None:
    raise OSError(errno.EFBIG, "File too large")


@pytest.mark.parametrize(
    ("fail", "limit"),
    [(out_of_memory, r"no memory left.*ulimit -v"), (too_large_a_file, r"file size limit.*ulimit -f")],
)
def test_the_limit_is_named_and_the_job_keeps_its_attempts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fail: object, limit: str
) -> None:
    project = make_project(tmp_path)
    enqueue(project, small_spec(project))
    monkeypatch.setitem(worker._HANDLERS, Kind.PREPARE, lambda *_: fail())  # type: ignore[operator]
    with pytest.raises(LimitReached, match=limit):
        work(project, WorkOptions(device="cpu"), report=RememberedReport())
    with Queue(project.queue_db, read_only=True) as queue:
        (prepare,) = queue.jobs(state=State.READY)
        assert (prepare.failures, prepare.lost_in_a_row) == (0, 0)


def test_a_session_whose_queue_cannot_grow_names_the_limit_on_the_size_of_files_and_costs_no_attempt(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    project = make_project(tmp_path)
    enqueue(project, small_spec(project, "head_finetune"))
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4000, before[1]))
    try:
        with pytest.raises(SystemExit) as ended:
            main(["--project", str(project.root), "work", "--device", "cpu"])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert ended.value.code == 1
    said = " ".join(capsys.readouterr().err.split())
    assert "ulimit -f" in said
    assert "allows files of at most 4 kB" in said
    with Queue(project.queue_db, read_only=True) as queue:
        assert not any(job.failures or job.lost_in_a_row for job in queue.jobs())


def test_a_command_without_memory_names_the_limit_instead_of_a_traceback(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    project = make_project(tmp_path)
    monkeypatch.setattr(Project, "status", lambda *_: out_of_memory())
    with pytest.raises(SystemExit) as ended:
        main(["--project", str(project.root), "status"])
    assert ended.value.code == 1
    assert re.search(r"no memory left.*ulimit -v", " ".join(capsys.readouterr().err.split()))


def test_a_library_not_found_under_a_memory_limit_is_reported_as_that_limit() -> None:
    error = OSError("Could not find/load shared object file 'libllvmlite.so'")
    assert why_limited(error) is None
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (1 << 46, before[1]))
    try:
        assert "ulimit -v" in str(why_limited(error))
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)
