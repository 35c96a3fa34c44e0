"""The command ``mbqueue launch``, which runs sessions as cluster jobs."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from mbqueue.cli.console import print_line, say
from mbqueue.cli.options import open_project
from mbqueue.errors import UsageError

if TYPE_CHECKING:
    from mbqueue.api.launching import LaunchedJob

launch = typer.Typer(
    help="Run sessions as cluster jobs. Each job ends before its time limit, and requeues itself if work is left.",
    rich_markup_mode=None,
    add_completion=False,
    no_args_is_help=True,
)

GpusOption = Annotated[int | None, typer.Option(help="Number of sessions, each with one GPU.", min=1)]
WorkersOption = Annotated[int | None, typer.Option(help="Number of sessions that run without a GPU.", min=1)]
TimeOption = Annotated[str, typer.Option(help="Time limit of a job, for example 2h.")]
IdleOption = Annotated[
    str, typer.Option(help="End a job after this long without work, for example 10m; `none` means no limit.")
]


@launch.command()
def slurm(
    context: typer.Context,
    time: TimeOption,
    gpus: GpusOption = None,
    workers: WorkersOption = None,
    partition: Annotated[str | None, typer.Option(help="Slurm partition.")] = None,
    account: Annotated[str | None, typer.Option(help="Slurm account to charge.")] = None,
    constraint: Annotated[str | None, typer.Option(help="Required node features, for example a100.")] = None,
    cpus_per_task: Annotated[int | None, typer.Option(help="CPU cores per job.", min=1)] = None,
    mem: Annotated[str | None, typer.Option(help="Memory per job, for example 32G.")] = None,
    setup: Annotated[
        list[str] | None, typer.Option(help="Shell command to run before the session, for example 'module load cuda'.")
    ] = None,
    settings: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Any other sbatch option.")
    ] = None,
    max_idle: IdleOption = "10m",
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the job file without submitting it.")] = False,
) -> None:
    """Submit sessions to Slurm as independent jobs. Requires: pip install 'mbqueue[slurm]'

    A session saves its work and ends before its job's time limit, or when Slurm preempts the job. While work is left,
    the job returns to Slurm's queue.

    Example: mbqueue launch slurm --gpus 5 --time 2h --partition gpu
    """
    project = open_project(context)
    named = {
        "partition": partition,
        "account": account,
        "constraint": constraint,
        "cpus-per-task": None if cpus_per_task is None else str(cpus_per_task),
        "mem": mem,
    }
    options = {key: value for key, value in named.items() if value is not None} | _settings(settings or [])
    if dry_run:
        text = project.slurm_job_file(time=time, gpus=gpus, workers=workers, setup=setup or [], options=options)
        print_line(text.rstrip())
        return
    jobs = project.launch_slurm(
        time=time, gpus=gpus, workers=workers, max_idle=_idle(max_idle), setup=setup or [], options=options
    )
    _tell(jobs, "List the jobs with squeue --me or mbqueue status. End a job with: scancel JOB")


@launch.command()
def local(
    context: typer.Context,
    time: TimeOption,
    gpus: GpusOption = None,
    workers: WorkersOption = None,
    max_idle: IdleOption = "10m",
) -> None:
    """Run the jobs of `launch slurm` on this machine. A job that reaches its time limit runs again, at most five times.

    For a workstation, `mbqueue work --devices` is simpler.

    Example: mbqueue launch local --gpus 2 --time 2h
    """
    jobs = open_project(context).launch_local(time=time, gpus=gpus, workers=workers, max_idle=_idle(max_idle))
    _tell(jobs, "List the sessions with: mbqueue status. End the sessions with: mbqueue stop")


def _settings(texts: list[str]) -> dict[str, str]:
    found = {}
    for text in texts:
        key, equals, value = text.partition("=")
        if not equals:
            raise UsageError(f"--set {text!r} is not KEY=VALUE. Write, for example, --set qos=high")
        found[key] = value
    return found


def _idle(text: str) -> str | None:
    return None if text == "none" else text


def _tell(jobs: list[LaunchedJob], what_next: str) -> None:
    for job in jobs:
        print_line(f"job {job.job_id}, log {job.log}")
    say(what_next)
