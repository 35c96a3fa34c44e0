"""A limit of the machine or the shell ends the session, names itself, and costs no attempt of the job."""

from __future__ import annotations

import errno
from pathlib import Path

import numpy as np
import pytest
from small_project import RememberedReport, enqueue, make_project, small_spec

from mbqueue.errors import LimitReached
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
    ("fail", "limit"), [(out_of_memory, r"no memory left.*ulimit -v"), (too_large_a_file, r"size of a file.*ulimit -f")]
)
def test_it_is_named_and_the_job_keeps_its_attempts(
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
