"""If other processes fill a GPU's memory, the job keeps its attempts. A session prints each note on a device once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from small_project import RememberedReport, enqueue, make_project, small_spec

from mbqueue.errors import DeviceBusy
from mbqueue.queue.jobs import Kind, State
from mbqueue.queue.store import Queue
from mbqueue.session import worker
from mbqueue.session.options import WorkOptions
from mbqueue.session.worker import work


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (DeviceBusy("The crystal mp-1 does not fit what others leave of it."), "mp-1 does not fit what others"),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 MiB."), "Tried to allocate.*nvidia-smi"),
    ],
)
def test_a_full_gpu_ends_the_session_and_its_job_is_ready_again(
    tmp_path: Path, report: RememberedReport, monkeypatch: pytest.MonkeyPatch, error: Exception, told: str
) -> None:
    project = make_project(tmp_path)
    enqueue(project, small_spec(project, "pretrained_infer"))

    def fail(*_arguments: Any) -> str:
        raise error

    monkeypatch.setitem(worker._HANDLERS, Kind.PREPARE, fail)
    with pytest.raises(DeviceBusy, match=told):
        work(project, WorkOptions(device="cpu"), report=report)
    with Queue(project.queue_db, read_only=True) as queue:
        job = next(job for job in queue.jobs() if job.kind is Kind.PREPARE)
        (session,) = queue.sessions()
    assert (job.state, job.failures, job.preemptions) == (State.READY, 0, 1)
    assert session.end_reason is not None
    assert session.end_reason.startswith("DeviceBusy")


def test_a_note_about_the_device_appears_once_a_session(tmp_path: Path, report: RememberedReport) -> None:
    project = make_project(tmp_path)
    spec = small_spec(project, "pretrained_infer", folds=[0, 1], train__precision="bf16")
    enqueue(project, spec)
    work(project, WorkOptions(device="cpu"), report=report)
    assert len([text for text in report.lines if "bf16 is only for GPUs" in text]) == 1
