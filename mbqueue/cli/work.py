"""Commands for sessions: ``work`` (in the foreground or background), ``logs`` and ``stop``."""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Annotated

import typer

from mbqueue.cli.console import FAILURE, USAGE, WORK_LEFT, outliving_readers, print_line, say
from mbqueue.cli.options import DeviceOption, open_project
from mbqueue.errors import UsageError, counted

if TYPE_CHECKING:
    from mbqueue.api import Project
    from mbqueue.session.options import WorkArguments
    from mbqueue.session.outcome import Ending, SessionOutcome

STANDARD_OUTPUT = 1


def work(
    context: typer.Context,
    session: Annotated[
        str | None,
        typer.Option(
            help="Length of the session, for example 1h50m, or none for no limit; the default is in mbqueue.toml."
        ),
    ] = None,
    max_jobs: Annotated[int | None, typer.Option(help="End the session after this many jobs.", min=1)] = None,
    forever: Annotated[
        bool, typer.Option("--forever", help="Run without a deadline, and wait for new jobs when no jobs are left.")
    ] = False,
    max_idle: Annotated[
        str | None,
        typer.Option(
            help="End the session after it has waited this long for a job, for example 10m; no limit by default."
        ),
    ] = None,
    device: DeviceOption = None,
    devices: Annotated[
        str | None,
        typer.Option(help="Run one session per device, for example 0,1,2 or cuda:0,cuda:1 or cpu,cpu."),
    ] = None,
    background: Annotated[
        bool, typer.Option("--background", help="Keep the session running when this terminal or notebook cell closes.")
    ] = False,
    tensorboard: Annotated[
        bool, typer.Option("--tensorboard", help="Write TensorBoard event files to state/logs/tensorboard.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print each event as a line of JSON.")] = False,
    end_command: Annotated[
        bool, typer.Option("--end-command/--no-end-command", help="Whether to run the end_command in mbqueue.toml.")
    ] = True,
) -> None:
    """Run one session, which works on jobs in the queue until all are done or the session's time is up.

    The session waits while other sessions are running the last jobs, or while failed jobs are waiting for a retry.

    You can kill a session at any time; the next session resumes. On SIGTERM, SIGINT (Ctrl-C), SIGHUP, SIGUSR1 or
    SIGUSR2, the session finishes the step, writes a checkpoint and ends. A second Ctrl-C ends the session immediately.
    Exit code 75 means that work is left, so run the command again.

    Example: mbqueue work --session 1h50m
    """
    project = open_project(context)
    wanted = None if devices is None else devices.split(",")
    if wanted is not None and (device is not None or as_json or not end_command):
        raise UsageError("--devices cannot be combined with --device, --json or --no-end-command.")
    options: WorkArguments = {
        "session": session,
        "max_jobs": max_jobs,
        "forever": forever,
        "max_idle": max_idle,
        "tensorboard": tensorboard,
    }
    if background:
        if as_json or not end_command:
            raise UsageError("--background cannot be combined with --json or --no-end-command.")
        started = project.work_in_background(device=device, devices=wanted, **options)
        names = " and ".join(started.sessions) or "starting"
        print_line(f"session {names} in the background, as process {started.process.pid}")
        say(f"Log: {started.log}\nFollow the log with: mbqueue logs -f. Stop the session with: mbqueue stop")
        return

    with outliving_readers():
        if wanted is not None:
            _work_on_devices(project, wanted, options)
        else:
            working = partial(project.work, device=device, end_command=end_command, **options)
            _exit_with((_in_json(working) if as_json else _on_screen(working)).ending)


def _work_on_devices(project: Project, devices: list[str], options: WorkArguments) -> None:
    from mbqueue.cli.progress import Screen

    with Screen() as screen:
        together = project.work_on_devices(devices, report_for=screen.report, **options)
    for one in together.sessions:
        _tell_end(one)
    for failure in together.failures:
        say(f"error: the session on {failure.device} {failure.why}", style="bold red")
    if together.failures:
        raise typer.Exit(USAGE if all(f.code == USAGE for f in together.failures) else FAILURE)
    _exit_with(together.ending)


def _on_screen(work: Callable[..., SessionOutcome]) -> SessionOutcome:
    from mbqueue.cli.progress import Screen

    with Screen() as screen:
        outcome = work(report=screen.report())
    _tell_end(outcome)
    return outcome


def _in_json(work: Callable[..., SessionOutcome]) -> SessionOutcome:
    from mbqueue.session.messages import JsonLines
    from mbqueue.session.stop import StopRequest

    stop = StopRequest()
    with open(STANDARD_OUTPUT, "wb", buffering=0, closefd=False) as stream:
        report = JsonLines(stream, on_gone=lambda: stop.request("the program that read its output has ended"))
        return work(report=report, stop=stop)


def _tell_end(outcome: SessionOutcome) -> None:
    print_line(f"session {outcome.session}: {counted(outcome.jobs_done, 'job')} done; {outcome.reason}")


def _exit_with(ending: Ending) -> None:
    codes = {"STOPPED": WORK_LEFT, "BLOCKED": FAILURE}
    if ending.name in codes:
        raise typer.Exit(codes[ending.name])


def logs(
    context: typer.Context,
    follow: Annotated[
        bool,
        typer.Option("--follow", "-f", help="Print new lines of the log until the session ends or you press Ctrl-C."),
    ] = False,
    lines: Annotated[
        int, typer.Option("--lines", "-n", help="Number of lines to show from the end of the log.", min=0)
    ] = 50,
) -> None:
    """Show the log of the newest background session.

    Example: mbqueue logs -f
    """
    try:
        for line in open_project(context).log(lines=lines, follow=follow):
            print_line(line.rstrip("\n"))
            sys.stdout.flush()
    except KeyboardInterrupt:
        return


def stop(
    context: typer.Context,
    wait: Annotated[
        float, typer.Option(help="Maximum number of seconds to wait for sessions to save their work.", min=0)
    ] = 60.0,
) -> None:
    """Stop all sessions of this project on this machine. Each session finishes its step and writes a checkpoint.

    Example: mbqueue stop
    """
    stopped = open_project(context).stop(wait_seconds=wait)
    if not stopped:
        print_line("No session of this project is running on this machine.")
    for one in stopped:
        name = one.session or f"process {one.pid}"
        if one.is_refused:
            print_line(f"session {name}: process {one.pid} belongs to another user, so only that user can end it")
        elif one.reason is None:
            print_line(
                f"session {name}: still saving after {wait:g} s. Follow the log with: mbqueue logs -f. If the session "
                f"hangs, run kill -9 {one.pid}. You then lose only the work since the last checkpoint"
            )
        else:
            print_line(f"session {name}: ended ({one.reason})")
    if any(one.reason is None for one in stopped):
        raise typer.Exit(FAILURE)
