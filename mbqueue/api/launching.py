"""Submit sessions to Slurm, or start them on this machine, as independent submitit jobs with one session each."""

from __future__ import annotations

import importlib.util
import math
import re
import shutil
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mbqueue.api.base import OpenedProject, tell
from mbqueue.api.launched import LaunchedSession
from mbqueue.clock import parse_duration
from mbqueue.errors import SessionError, UsageError

#: The longest time to reserve at the end of a job. A short job reserves only a tenth of its time limit.
LONGEST_MARGIN_SECONDS = 180.0
MAX_IDLE = "10m"
#: How many times a job may be requeued at its time limit. With this many requeues, a one-hour job can continue for over
#: a month.
_MAX_TIMEOUTS = 1000
#: The sbatch options that mbqueue sets.
_OWN = {"time", "signal", "output", "error", "open_mode", "array", "requeue", "ntasks_per_node", "nodes"}
_KEY = re.compile(r"[A-Za-z][A-Za-z0-9_-]*")


@dataclass(frozen=True, kw_only=True)
class LaunchedJob:
    """A job that was submitted to Slurm or started on this machine.

    Attributes:
        job_id: the cluster's id of the job; the process id if the job was started here.
        log: the path of the job's log.
    """

    job_id: str
    log: Path


class Launching(OpenedProject):
    def launch_slurm(
        self,
        *,
        time: str,
        gpus: int | None = None,
        workers: int | None = None,
        max_idle: str | None = MAX_IDLE,
        setup: Sequence[str] = (),
        options: Mapping[str, str] | None = None,
    ) -> list[LaunchedJob]:
        """Submit sessions to Slurm; return at once.

        Each job runs one session that ends before the job's time limit. A job that runs out of time or is preempted
        saves its work, and returns to Slurm's queue if work is left.

        Args:
            time: limit of a job, such as ``2h``.
            gpus: number of jobs, each with one GPU. Give either ``gpus`` or ``workers``.
            workers: number of jobs without a GPU.
            max_idle: end a job that finds nothing to claim for this long while other jobs are running; None to keep
                waiting.
            setup: shell lines to run before the session (``module load …``).
            options: options of sbatch, such as ``{"partition": "gpu", "cpus-per-task": "8"}``.

        Raises:
            UsageError: if Slurm or submitit is missing, no job is left, several machines cannot share the queue, or an
                option is wrong.
            SessionError: if sbatch refuses a job; the message gives the reason and lists the jobs already submitted.
        """
        session, count = self._session(time, gpus, workers, max_idle)
        _require_submitit()
        missing = [program for program in ("sbatch", "srun") if shutil.which(program) is None]
        if missing:
            raise UsageError(
                f"There is no {' and no '.join(missing)} on this machine. Run this command on the cluster's login "
                "node; --dry-run shows the job file anyway, and `mbqueue launch local` starts the jobs here."
            )
        self._require_work()
        if (note := self.folder.topology.require_launchable(count)) is not None:
            tell(note)
        executor = self._slurm_executor(session, with_gpu=gpus is not None, setup=setup, options=options or {})
        return self._submit([executor] * count, session, "sbatch")

    def slurm_job_file(
        self,
        *,
        time: str,
        gpus: int | None = None,
        workers: int | None = None,
        setup: Sequence[str] = (),
        options: Mapping[str, str] | None = None,
    ) -> str:
        """Return the text of the job file that `launch_slurm` would pass to sbatch; this method works without Slurm."""
        session, _ = self._session(time, gpus, workers, None)
        _require_submitit()
        executor = self._slurm_executor(session, with_gpu=gpus is not None, setup=setup, options=options or {})
        text: str = executor._make_submission_file_text(executor._submitit_command_str, "")
        return text

    def launch_local(
        self, *, time: str, gpus: int | None = None, workers: int | None = None, max_idle: str | None = MAX_IDLE
    ) -> list[LaunchedJob]:
        """Start the jobs of `launch_slurm` as processes on this machine; return at once.

        Each job runs at most six times in a row.

        Raises:
            UsageError: for the same reasons as in `launch_slurm`.
        """
        session, count = self._session(time, gpus, workers, max_idle)
        _require_submitit()
        self._require_work()
        from submitit.local.local import LocalExecutor  # noqa: PLC0415 - needed only here

        executors = []
        for number in range(count):
            executor = LocalExecutor(self.folder.launched_dir, max_num_timeout=_MAX_TIMEOUTS)
            executor.update_parameters(
                timeout_min=session.seconds / 60,
                signal_delay_s=_signal_delay(session),
                gpus_per_node=0 if gpus is None else 1,
                visible_gpus=() if gpus is None else (number,),
                stderr_to_stdout=True,
                # Jobs must not inherit this command's output. A program that reads the output would otherwise wait
                # until the jobs end.
                setup=["exec < /dev/null > /dev/null 2>&1"],
            )
            executors.append(executor)
        return self._submit(executors, session, "submitit")

    def _session(
        self, time: str, gpus: int | None, workers: int | None, max_idle: str | None
    ) -> tuple[LaunchedSession, int]:
        if (gpus is None) == (workers is None):
            raise UsageError(
                "Give either a number of GPUs (--gpus 5) or a number of workers without a GPU (--workers 5)."
            )
        count = gpus or workers or 0
        if count < 1:
            raise UsageError("Give at least one GPU or worker.")
        seconds = parse_duration(time)
        if max_idle is not None:
            parse_duration(max_idle)
        session = LaunchedSession(
            str(self.folder.root),
            seconds=seconds,
            margin_seconds=min(LONGEST_MARGIN_SECONDS, 0.1 * seconds),
            device="cpu" if gpus is None else "cuda",
            max_idle=max_idle,
        )
        return session, count

    def _require_work(self) -> None:
        with self._reading_queue(None) as queue:
            if queue.outlook(now=self._clock.now()).is_exhausted:
                raise UsageError("No job can run: each job is done or needs your attention. See: mbqueue status")

    def _slurm_executor(
        self, session: LaunchedSession, *, with_gpu: bool, setup: Sequence[str], options: Mapping[str, str]
    ) -> Any:
        from submitit.slurm.slurm import SlurmExecutor  # noqa: PLC0415 - needed only here

        class AnywhereExecutor(SlurmExecutor):  # type: ignore[misc]
            """A Slurm executor that works without srun, so that any machine can show the job file."""

            @classmethod
            def affinity(cls) -> int:
                return 1

        further = {}
        for key, value in options.items():
            name = key.strip().lstrip("-").replace("-", "_")
            if not _KEY.fullmatch(name) or name in _OWN:
                raise UsageError(
                    f"{key!r} is not an sbatch option that you can set. Write, for example, --set qos=high. "
                    f"mbqueue itself sets these options: {', '.join(sorted(_OWN)).replace('_', '-')}."
                )
            further[name] = value
        for text in (*setup, *further.values()):
            if "\n" in text or "\0" in text:
                raise UsageError(f"{text!r} has more than one line. Give --setup once for each line.")
        executor = AnywhereExecutor(self.folder.launched_dir, max_num_timeout=_MAX_TIMEOUTS)
        cores = further.get("cpus_per_task")
        asks_for_gpus = any(name.startswith("gp") or name == "gres" for name in further)
        executor.update_parameters(
            job_name=f"mbqueue-{self.folder.root.name}",
            time=math.ceil(session.seconds / 60),
            signal_delay_s=_signal_delay(session),
            stderr_to_stdout=True,
            setup=list(setup) or None,
            gpus_per_node=1 if with_gpu and not asks_for_gpus else None,
            # From Slurm 22.05 on, srun does not inherit --cpus-per-task from sbatch, so the session would get one core.
            srun_args=None if cores is None else [f"--cpus-per-task={cores}"],
            # Without "requeue", a cluster may refuse to requeue a job.
            additional_parameters={"requeue": True, **further},
        )
        return executor

    def _submit(self, executors: Sequence[Any], session: LaunchedSession, by: str) -> list[LaunchedJob]:
        jobs: list[LaunchedJob] = []
        for executor in executors:
            try:
                job = executor.submit(session)
            except Exception as error:
                before = f" Submitted before: {', '.join(job.job_id for job in jobs)}." if jobs else ""
                raise SessionError(f"{by} refused job {len(jobs) + 1} of {len(executors)}: {error}.{before}") from error
            jobs.append(LaunchedJob(job_id=str(job.job_id), log=job.paths.stdout))
        return jobs


def _signal_delay(session: LaunchedSession) -> int:
    """How many seconds before the time limit Slurm sends a signal to a session that has not ended by itself."""
    return max(1, round(session.margin_seconds / 2))


def _require_submitit() -> None:
    if importlib.util.find_spec("submitit") is None:
        raise UsageError(
            f"The package submitit is not installed for {sys.executable}. Install it with: pip install 'mbqueue[slurm]'"
        )
