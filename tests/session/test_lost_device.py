"""A GPU that stops working ends only its session."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from small_project import RememberedReport, enqueue, make_project, small_spec

from mbqueue.api.launched import LaunchedSession
from mbqueue.errors import DeviceLost, UsageError
from mbqueue.project import ProjectFolder, init_project
from mbqueue.queue.claiming import MAX_LOST_IN_A_ROW
from mbqueue.queue.jobs import Job, Kind, State
from mbqueue.queue.store import Queue
from mbqueue.session import device_check, worker
from mbqueue.session.options import WorkOptions
from mbqueue.session.outcome import Ending
from mbqueue.session.worker import work

CUDA = torch.device("cuda")
STICKY = "CUDA error: an illegal memory access was encountered\nCUDA kernel errors might be asynchronously reported"

Broken = Callable[[Kind], None]


@pytest.fixture
def broken(monkeypatch: pytest.MonkeyPatch) -> Broken:
    """A function that makes jobs of one kind fail as if the GPU's context were lost, after which every call fails."""
    lost: list[bool] = []

    def fail(*_arguments: Any) -> str:
        lost.append(True)
        raise RuntimeError(STICKY)

    monkeypatch.setattr(worker, "why_lost", lambda _device: STICKY.splitlines()[0] if lost else None)
    return lambda kind: monkeypatch.setitem(worker._HANDLERS, kind, fail)


def the_job(project: ProjectFolder, kind: Kind) -> Job:
    with Queue(project.queue_db, read_only=True) as queue:
        return next(job for job in queue.jobs() if job.kind is kind)


def test_the_session_ends_and_its_job_counts_as_preempted(
    tmp_path: Path, report: RememberedReport, broken: Broken
) -> None:
    make_project(tmp_path)
    with (tmp_path / "mbqueue.toml").open("a") as settings:
        settings.write(f'end_command = "touch {tmp_path}/ended"\n')
    project = init_project(tmp_path)[0]
    enqueue(project, small_spec(project, "pretrained_infer"))
    broken(Kind.PREPARE)
    with pytest.raises(DeviceLost, match=r"illegal memory access.*restart the kernel"):
        work(project, WorkOptions(device="cpu", forever=True), report=report)
    job = the_job(project, Kind.PREPARE)
    assert (job.state, job.failures, job.preemptions, job.lost_in_a_row) == (State.READY, 0, 1, 1)
    with Queue(project.queue_db, read_only=True) as queue:
        (session,) = queue.sessions()
        assert session.end_reason is not None
        assert session.end_reason.startswith("the GPU stopped working")
    assert (tmp_path / "ended").exists(), "the end command runs, for a machine may be paid by the hour"


def test_a_job_that_breaks_every_gpu_fails_in_the_end(tmp_path: Path, report: RememberedReport, broken: Broken) -> None:
    project = make_project(tmp_path)
    enqueue(project, small_spec(project, "pretrained_infer"))
    broken(Kind.PREPARE)
    for _ in range(MAX_LOST_IN_A_ROW):
        with pytest.raises(DeviceLost):
            work(project, WorkOptions(device="cpu"), report=report)
    assert the_job(project, Kind.PREPARE).state is State.FAILED
    assert work(project, WorkOptions(device="cpu"), report=report).ending is Ending.BLOCKED


def test_a_session_that_had_saved_work_says_that_another_can_resume(
    tmp_path: Path, report: RememberedReport, broken: Broken
) -> None:
    project = make_project(tmp_path)
    enqueue(project, small_spec(project, "pretrained_infer"))
    broken(Kind.PREDICT)
    outcome = work(project, WorkOptions(device="cpu"), report=report)
    assert (outcome.ending, outcome.jobs_done) == (Ending.STOPPED, 1)
    assert any("The GPU stopped working" in line for line in report.lines)
    # On a cluster, a job that made progress requeues itself, because it may get a working GPU next time.
    launched = LaunchedSession("/p", seconds=60.0, margin_seconds=6.0, device="cuda", max_idle=None)
    assert launched.is_to_be_continued(outcome)


def test_an_error_on_a_working_device_counts_as_an_error_of_the_job(
    tmp_path: Path, report: RememberedReport, broken: Broken, monkeypatch: pytest.MonkeyPatch
) -> None:
    project = make_project(tmp_path)
    enqueue(project, small_spec(project, "pretrained_infer"))
    broken(Kind.PREPARE)
    monkeypatch.setattr(worker, "why_lost", lambda _device: None)
    work(project, WorkOptions(device="cpu", idle_seconds=0.0), report=report)
    job = the_job(project, Kind.PREPARE)
    assert (job.failures, job.lost_in_a_row) == (1, 0)


@pytest.mark.parametrize(
    ("error", "is_lost"),
    [
        (RuntimeError(STICKY), True),
        (torch.AcceleratorError(STICKY), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_EXECUTION_FAILED when calling `cublasSgemm(...)`"), True),
        (torch.OutOfMemoryError("CUDA out of memory."), False),
        (RuntimeError("CUDA error: out of memory"), False),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), False),
    ],
)
def test_a_gpu_that_allocates_but_cannot_multiply_counts_as_lost(
    monkeypatch: pytest.MonkeyPatch, error: RuntimeError, is_lost: bool
) -> None:
    def multiply(_device: torch.device) -> None:
        raise error

    monkeypatch.setattr(device_check, "multiply", multiply)
    why = device_check.why_lost(CUDA)
    assert (why is not None) is is_lost
    assert why is None or "\n" not in why
    assert device_check.why_lost(torch.device("cpu")) is None


def test_a_gpu_that_multiplies_is_not_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device_check, "multiply", lambda _device: None)
    assert device_check.why_lost(CUDA) is None


def test_a_gpu_that_this_torch_cannot_use_is_refused_with_advice(monkeypatch: pytest.MonkeyPatch) -> None:
    def multiply(_device: torch.device) -> None:
        raise RuntimeError("CUDA error: no kernel image is available for execution on the device\nCompile with …")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(device_check, "multiply", multiply)
    with pytest.raises(UsageError, match=r"no kernel image.*--device cpu") as told:
        device_check.tested_device(None)
    assert "None" not in str(told.value)
    assert "Leave out --device" not in str(told.value), "that is what was done"


def test_cublas_is_told_to_be_deterministic_before_the_first_product(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    seen: list[str | None] = []
    monkeypatch.setattr(device_check, "multiply", lambda _: seen.append(os.environ.get("CUBLAS_WORKSPACE_CONFIG")))
    device_check.tested_device("cuda")
    assert seen == [":4096:8"]
