"""Run one session in a cluster job, within the job's time limit, and requeue the job if work is left.

The machine that runs the job imports this module.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from mbqueue.clock import SystemClock
from mbqueue.errors import counted

if TYPE_CHECKING:
    from mbqueue.session.outcome import SessionOutcome

#: Environment variables that Slurm 22.05 and later set to the job's end and start times, as Unix timestamps.
END_VARIABLE, START_VARIABLE = "SLURM_JOB_END_TIME", "SLURM_JOB_START_TIME"
#: Signals that announce the end of a job that may be requeued.
_TO_BE_CONTINUED = {signal.SIGUSR1, signal.SIGUSR2}


class LaunchedSession:
    """A submitit job: submitit calls the object to run a session, and its `checkpoint` method to requeue the job.

    A job that finds nothing to claim for ``max_idle`` ends and releases its GPU. SIGUSR2 announces that the job is
    almost out of time or preempted, and stops the session gracefully. The job returns to Slurm's queue only after
    everything is saved.

    Args:
        project: the project's folder, the same on every machine.
        seconds: time limit of the job.
        margin_seconds: time reserved before the limit for the session's end.
        device: as for `mbqueue work`.
    """

    def __init__(
        self, project: str, *, seconds: float, margin_seconds: float, device: str, max_idle: str | None
    ) -> None:
        self.project = project
        self.seconds = seconds
        self.margin_seconds = margin_seconds
        self.device = device
        self.max_idle = max_idle

    def __call__(self) -> str:
        """Run one session; return why it ended."""
        from mbqueue.api import Project  # noqa: PLC0415 - the package imports this module
        from mbqueue.session.narration import Narration  # noqa: PLC0415

        preemption = self._preemption_handler()
        seconds = self.session_seconds(SystemClock().now())
        outcome = Project(self.project).work(
            session=f"{seconds:.0f}s",
            device=self.device,
            max_idle=self.max_idle,
            report=Narration(_say),
        )
        _say(f"session {outcome.session}: {counted(outcome.jobs_done, 'job')} done; {outcome.reason}")
        if self.is_to_be_continued(outcome):
            preemption()
        return outcome.reason

    def session_seconds(self, now: float) -> float:
        """Return the seconds from ``now`` to the end of the job, minus the time reserved for ending the session.

        The end of the job comes from Slurm's environment variables, or else from the job's time limit.
        """
        end = now + self.seconds
        if END_VARIABLE in os.environ:
            end = float(os.environ[END_VARIABLE])
        elif START_VARIABLE in os.environ:
            end = float(os.environ[START_VARIABLE]) + self.seconds
        return max(1.0, end - self.margin_seconds - now)

    def is_to_be_continued(self, outcome: SessionOutcome) -> bool:
        """Whether the session ran out of time, was preempted or lost its GPU, so that the job must run again.

        A new process may be able to use a GPU that this process has lost. If the GPU is broken, the new process fails
        on startup.
        """
        from mbqueue.session.outcome import Ending, StopKind  # noqa: PLC0415

        if outcome.ending is not Ending.STOPPED:
            return False
        if outcome.cause.signal == signal.SIGTERM:
            return _is_preempted()
        return outcome.cause.kind in {StopKind.TIME, StopKind.DEVICE_LOST} or outcome.cause.signal in _TO_BE_CONTINUED

    def checkpoint(self) -> Any:
        """Let submitit resubmit this job unchanged, because its progress is in the queue."""
        from submitit.core.utils import DelayedSubmission  # noqa: PLC0415

        return DelayedSubmission(self)

    @staticmethod
    def _preemption_handler() -> Any:
        """Return submitit's signal handler, which requeues the job when called after the session."""
        from submitit.core.job_environment import JobEnvironment  # noqa: PLC0415

        number = JobEnvironment._usr_sig()
        handler = signal.getsignal(number)
        assert callable(handler)
        return lambda: handler(number, None)


def _is_preempted() -> bool:
    """Whether Slurm sent SIGTERM because another job is preempting this one; False if the user cancelled this job."""
    job = os.environ.get("SLURM_JOB_ID")
    if job is None:
        return False
    command = ["squeue", "--noheader", "--jobs", job, "--format", "%T"]
    try:
        said = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        _say(f"note: squeue failed ({error}), so this job is not requeued")
        return False
    return said.stdout.strip() == "RUNNING"


def _say(text: str, _style: str | None = None) -> None:
    with suppress(OSError):
        sys.stderr.write(f"{time.strftime('%H:%M:%S')}  {text}\n")
        sys.stderr.flush()
