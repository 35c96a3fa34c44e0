"""Sessions that run as cluster jobs: their time limits, requeueing after preemption, and refused launches."""

from __future__ import annotations

import importlib.util
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from processes import outcome, run, until
from small_project import RememberedReport, enqueue, make_project, small_spec

from mbqueue.api import Project
from mbqueue.api.launched import LaunchedSession
from mbqueue.errors import QueueError, SessionError, UsageError
from mbqueue.project import ProjectFolder
from mbqueue.queue.jobs import State
from mbqueue.queue.store import Queue
from mbqueue.session.options import WorkOptions
from mbqueue.session.outcome import TIME_IS_UP, Ending, SessionOutcome, StopCause, StopKind
from mbqueue.session.worker import work

NOW = 1_800_000_000.0


def test_a_preempted_job_saves_its_work_and_runs_again_to_the_same_result_byte_for_byte(tmp_path: Path) -> None:
    smaller = {"data__limit": 20, "train__epochs": 1}
    alone = make_project(tmp_path / "alone", checkpoint_minutes=60.0)
    straight = enqueue(alone, small_spec(alone, **smaller))
    assert run(alone.root, "work", "--device", "cpu").returncode == 0

    project = make_project(tmp_path / "launched", checkpoint_minutes=60.0)
    folder = enqueue(project, small_spec(project, **smaller))
    launched = run(project.root, "launch", "local", "--workers", "1", "--time", "10m")
    assert launched.returncode == 0, launched.stderr
    job = launched.stdout.split()[1].rstrip(",")
    log = project.launched_dir / f"{job}_0_log.out"
    assert str(log) in launched.stdout
    with Queue(project.queue_db, read_only=True) as queue:
        until(lambda: any(job.epoch == 1 for job in queue.jobs(state=State.LEASED)))
        (first,) = queue.sessions()
        # Send the signal that the executor sends shortly before a job reaches its time limit.
        os.kill(first.pid, signal.SIGUSR2)
        until(lambda: {job.state for job in queue.jobs()} == {State.COMMITTED})
        until(lambda: all(session.ended_at for session in queue.sessions()))
        assert [session.end_reason for session in queue.sessions()] == ["SIGUSR2", Ending.DONE.value]
        assert not any(job.failures or job.lost_in_a_row for job in queue.jobs())
    assert outcome(folder, 0) == outcome(straight, 0)
    said = log.read_text()
    assert f"Requeued job {job}" in said
    assert said.count("Starting with JobEnvironment") == 2


@pytest.fixture
def session() -> LaunchedSession:
    return LaunchedSession("/p", seconds=7200.0, margin_seconds=180.0, device="cuda", max_idle="10m")


@pytest.mark.parametrize(
    ("variables", "seconds"),
    [
        ({}, 7020.0),
        ({"SLURM_JOB_START_TIME": f"{NOW - 60:.0f}"}, 6960.0),
        ({"SLURM_JOB_START_TIME": f"{NOW - 60:.0f}", "SLURM_JOB_END_TIME": f"{NOW + 3600:.0f}"}, 3420.0),
        ({"SLURM_JOB_END_TIME": f"{NOW + 60:.0f}"}, 1.0),
    ],
)
def test_the_session_ends_before_the_time_limit_of_its_job(
    session: LaunchedSession, monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], seconds: float
) -> None:
    for name in ("SLURM_JOB_START_TIME", "SLURM_JOB_END_TIME"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert session.session_seconds(NOW) == seconds


Programs = Callable[..., None]


@pytest.fixture
def programs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Programs:
    """Return a function that puts shell scripts named like Slurm's programs on an otherwise empty PATH."""
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", str(folder))

    def put(**scripts: str) -> None:
        for name, script in scripts.items():
            (folder / name).write_text(f"#!/bin/sh\n{script}\n")
            (folder / name).chmod(0o755)

    return put


@pytest.mark.parametrize(
    ("ending", "cause", "squeue", "goes_on"),
    [
        (Ending.STOPPED, StopCause.by_signal(signal.SIGUSR2), "", True),
        (Ending.STOPPED, TIME_IS_UP, "", True),
        (Ending.STOPPED, StopCause.by_lost_device("an illegal access"), "", True),
        # After SIGTERM, Slurm reports RUNNING for a preempted job, and COMPLETING for a job that a user cancelled.
        (Ending.STOPPED, StopCause.by_signal(signal.SIGTERM), "echo RUNNING", True),
        (Ending.STOPPED, StopCause.by_signal(signal.SIGTERM), "echo COMPLETING", False),
        (Ending.STOPPED, StopCause.by_signal(signal.SIGTERM), "exit 1", False),
        (Ending.STOPPED, StopCause.by_signal(signal.SIGINT), "echo RUNNING", False),
        (Ending.STOPPED, StopCause(StopKind.ASKED, "the session's time is up"), "", False),
        (Ending.STOPPED, StopCause(StopKind.IDLE, "nothing to claim for 10m00s"), "echo RUNNING", False),
        (Ending.DONE, StopCause(StopKind.EXHAUSTED, "nothing is left to do"), "echo RUNNING", False),
        (Ending.BLOCKED, StopCause(StopKind.EXHAUSTED, "the remaining work waits"), "echo RUNNING", False),
    ],
)
def test_a_job_requeues_after_preemption_but_not_after_scancel(
    session: LaunchedSession,
    programs: Programs,
    monkeypatch: pytest.MonkeyPatch,
    ending: Ending,
    cause: StopCause,
    squeue: str,
    goes_on: bool,
) -> None:
    programs(squeue=squeue)
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    ended = SessionOutcome(session="s", ending=ending, cause=cause, jobs_done=1)
    assert session.is_to_be_continued(ended) is goes_on


def test_outside_slurm_a_terminated_session_does_not_run_again(
    session: LaunchedSession, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    cause = StopCause.by_signal(signal.SIGTERM)
    ended = SessionOutcome(session="s", ending=Ending.STOPPED, cause=cause, jobs_done=1)
    assert not session.is_to_be_continued(ended)


def test_the_job_file_has_the_requested_options(project: ProjectFolder, programs: Programs) -> None:
    text = Project(project.root).slurm_job_file(
        time="2h",
        gpus=5,
        setup=["module load cuda"],
        options={"partition": "gpu", "cpus-per-task": "8", "mail-user": "a b"},
    )
    for line in (
        "#SBATCH --time=120",
        "#SBATCH --gpus-per-node=1",
        "#SBATCH --partition=gpu",
        "#SBATCH --cpus-per-task=8",
        "#SBATCH --mail-user='a b'",
        "#SBATCH --requeue",
        "#SBATCH --signal=USR2@90",
        "#SBATCH --open-mode=append",
        f"#SBATCH --output={project.root}/state/logs/launched/%j_0_log.out",
        "module load cuda",
    ):
        assert line in text.splitlines()
    other = Project(project.root).slurm_job_file(time="30s", gpus=1, options={"gres": "gpu:a100:1"})
    assert "#SBATCH --gres=gpu:a100:1" in other
    assert "gpus-per-node" not in other
    assert "#SBATCH --time=1\n" in other
    assert "gpu" not in Project(project.root).slurm_job_file(time="1h", workers=2).replace(str(project.root), "")


def test_the_session_gets_the_cores_that_its_job_asked_for(project: ProjectFolder, programs: Programs) -> None:
    here = Project(project.root)

    def srun(options: dict[str, str]) -> str:
        text = here.slurm_job_file(time="2h", workers=1, options=options)
        (line,) = (line for line in text.splitlines() if line.startswith("srun"))
        return line

    assert " --cpus-per-task=8 " in srun({"cpus-per-task": "8"})
    assert "cpus-per-task" not in srun({"partition": "cpu"})


def test_each_session_is_a_separate_job(project: ProjectFolder, programs: Programs) -> None:
    enqueue(project, small_spec(project))
    count = project.root / "count"
    programs(srun="", sbatch=f"echo x >> {count}; /usr/bin/wc -l < {count} | /bin/sed 's/^ */Submitted batch job 4/'")
    jobs = Project(project.root).launch_slurm(time="2h", gpus=3)
    assert [job.job_id for job in jobs] == ["41", "42", "43"]
    assert [job.log for job in jobs] == [project.launched_dir / f"{job.job_id}_0_log.out" for job in jobs]
    assert all((project.launched_dir / f"{job.job_id}_submitted.pkl").exists() for job in jobs)


def test_a_refusal_of_sbatch_is_reported_with_the_jobs_submitted_before(
    project: ProjectFolder, programs: Programs
) -> None:
    enqueue(project, small_spec(project))
    done = project.root / "done"
    programs(
        srun="",
        sbatch=f"[ -e {done} ] && {{ echo 'bad partition' >&2; exit 1; }}; echo > {done}; echo Submitted batch job 8",
    )
    with pytest.raises(SessionError, match=r"(?s)refused job 2 of 2.*bad partition.*Submitted before: 8"):
        Project(project.root).launch_slurm(time="2h", gpus=2)


def test_an_impossible_launch_is_refused_before_anything_is_submitted(
    project: ProjectFolder, programs: Programs, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    here = Project(project.root)
    with pytest.raises(UsageError, match="no sbatch and no srun"):
        here.launch_slurm(time="2h", gpus=1)
    programs(srun="", sbatch="echo must not be called; exit 1")
    with pytest.raises(QueueError, match="mbqueue enqueue"):
        here.launch_local(time="2h", workers=1)
    for mistake in (
        {"time": "2"},
        {"time": "2h", "gpus": None},
        {"time": "2h", "workers": 1},
        {"time": "2h", "options": {"time": "3"}},
        {"time": "2h", "options": {"a b": "3"}},
        {"time": "2h", "options": {"comment": "two\nlines"}},
    ):
        with pytest.raises(UsageError):
            here.slurm_job_file(**{"gpus": 1, **mistake})  # type: ignore[arg-type]
    enqueue(project, small_spec(project))
    elsewhere = Project(project.root)
    elsewhere.folder = ProjectFolder(project.root, project.settings, tmp_path / "live")
    enqueue(elsewhere.folder, small_spec(project))
    with pytest.raises(UsageError, match="postgresql://"):
        elsewhere.launch_slurm(time="2h", gpus=2)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UsageError, match=r"pip install 'mbqueue\[slurm\]'"):
        here.launch_slurm(time="2h", gpus=1)


def test_nothing_is_launched_if_no_work_is_left(project: ProjectFolder) -> None:
    enqueue(project, small_spec(project))
    with Queue(project.queue_db) as queue:
        queue.cancel("full_finetune", now=NOW)
    with pytest.raises(UsageError, match="mbqueue status"):
        Project(project.root).launch_local(time="2h", workers=1)


def test_a_session_that_waits_too_long_for_others_ends(tmp_path: Path) -> None:
    project = make_project(tmp_path)
    enqueue(project, small_spec(project))
    with Queue(project.queue_db) as queue:
        now = time.time()
        other = queue.start_session(device="d", now=now, alive_seconds=3600)
        assert queue.claim(other, now=now, lease_seconds=3600) is not None
    ended = work(project, WorkOptions(device="cpu", idle_seconds=0.01), report=RememberedReport())
    assert ended.ending is Ending.STOPPED
    assert "other sessions hold 1 job" in ended.reason
