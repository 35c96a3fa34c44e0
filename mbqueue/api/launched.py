"""What a submitted job runs: one session that ends in time, and asks to be run again while work is left.

Imported by the job itself, on whichever machine it comes to.
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

if TYPE_CHECKING:
    from mbqueue.session.outcome import SessionOutcome

#: Seconds since the epoch; set by Slurm from version 22.05 on.
END_VARIABLE, START_VARIABLE = "SLURM_JOB_END_TIME", "SLURM_JOB_START_TIME"
#: Signals that announce the end of the job's time, and of no more than that.
_TO_BE_CONTINUED = {signal.SIGUSR1, signal.SIGUSR2}


class LaunchedSession:
    """The job, as submitit takes it: called, and asked for a `checkpoint` when it is to run again.

    A GPU that waits for others is given back after ``max_idle``. SIGUSR2, which announces the end of the time or a
    preemption, stops the session gracefully; only when everything is saved is the job put back into Slurm's queue.

    Args:
        project: its folder, the same on every machine.
        seconds: time limit of the job.
        margin_seconds: kept free before it for the session's end.
        device: as `mbqueue work` takes it.
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
        """Run one session; returns why it ended."""
        from mbqueue.api import Project  # noqa: PLC0415 - the package imports this module
        from mbqueue.session.spoken import SpokenReport  # noqa: PLC0415

        preemption = self._preemption_handler()
        seconds = self.session_seconds(SystemClock().now())
        outcome = Project(self.project).work(
            session=f"{seconds:.0f}s",
            device=self.device,
            max_idle=self.max_idle,
            report=SpokenReport(_say),
        )
        _say(f"session {outcome.session}: {outcome.jobs_done} jobs done; {outcome.reason}")
        if self.is_to_be_continued(outcome):
            preemption()
        return outcome.reason

    def session_seconds(self, now: float) -> float:
        """How long the session may last that begins now, when its job began now or as Slurm says."""
        end = now + self.seconds
        if END_VARIABLE in os.environ:
            end = float(os.environ[END_VARIABLE])
        elif START_VARIABLE in os.environ:
            end = float(os.environ[START_VARIABLE]) + self.seconds
        return max(1.0, end - self.margin_seconds - now)

    def is_to_be_continued(self, outcome: SessionOutcome) -> bool:
        """Whether the session ended because its machine is taken away, and not because a person wanted its end.

        A new process may use a GPU that this one has lost; one that is broken refuses it at its start.
        """
        from mbqueue.session.outcome import Ending, StopKind  # noqa: PLC0415

        if outcome.ending is not Ending.STOPPED:
            return False
        if outcome.cause.signal == signal.SIGTERM:
            return _is_preempted()
        return outcome.cause.kind in {StopKind.TIME, StopKind.DEVICE_LOST} or outcome.cause.signal in _TO_BE_CONTINUED

    def checkpoint(self) -> Any:
        """What the job does when it runs again: the same; where it is, the queue knows."""
        from submitit.core.utils import DelayedSubmission  # noqa: PLC0415

        return DelayedSubmission(self)

    @staticmethod
    def _preemption_handler() -> Any:
        """What submitit does on its signal, to be done later, between two sessions and not within one: requeue."""
        from submitit.core.job_environment import JobEnvironment  # noqa: PLC0415

        number = JobEnvironment._usr_sig()
        handler = signal.getsignal(number)
        assert callable(handler)
        return lambda: handler(number, None)


def _is_preempted() -> bool:
    """Whether Slurm, which sent SIGTERM, takes the machine away for another job; a cancelled job runs no more."""
    job = os.environ.get("SLURM_JOB_ID")
    if job is None:
        return False
    command = ["squeue", "--noheader", "--jobs", job, "--format", "%T"]
    try:
        said = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        _say(f"note: squeue does not answer ({error}), so the job is not put back into the queue")
        return False
    return said.stdout.strip() == "RUNNING"


def _say(text: str, _style: str | None = None) -> None:
    """Into the job's log: this is the job's main program. A log that cannot be written is no reason to end."""
    with suppress(OSError):
        sys.stderr.write(f"{time.strftime('%H:%M:%S')}  {text}\n")
        sys.stderr.flush()
