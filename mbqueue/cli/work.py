"""Sessions: ``mbqueue work``, in the foreground or the background, ``logs`` and ``stop``."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from mbqueue.cli.console import print_line, say
from mbqueue.cli.options import open_project

#: EX_TEMPFAIL of sysexits.h: stopped with work left, run it again.
WORK_LEFT, FAILURE = 75, 1


def work(
    context: typer.Context,
    session: Annotated[
        str | None, typer.Option(help="Length of the session, like 1h50m, or none; by default that of mbqueue.toml.")
    ] = None,
    max_jobs: Annotated[int | None, typer.Option(help="Stop after so many jobs.", min=1)] = None,
    forever: Annotated[
        bool, typer.Option("--forever", help="Wait for new jobs when none is left; no deadline.")
    ] = False,
    device: Annotated[
        str | None, typer.Option(help="cpu, cuda or cuda:1; by default the first GPU, else the CPU.")
    ] = None,
    background: Annotated[
        bool, typer.Option("--background", help="Detach: the session goes on when this terminal or cell is closed.")
    ] = False,
    tensorboard: Annotated[
        bool, typer.Option("--tensorboard", help="Write TensorBoard's event files to state/logs/tensorboard.")
    ] = False,
) -> None:
    """Work on what is enqueued until nothing is left or the session's time is up.

    May be killed at any instant; the next session carries on. SIGTERM, SIGINT (Ctrl-C) and SIGHUP finish the step,
    write a checkpoint and end; a second Ctrl-C ends at once. Exit code 75: work is left, run it again.

    Example: mbqueue work --session 1h50m
    """
    project = open_project(context)
    if background:
        started = project.work_in_background(
            session=session, max_jobs=max_jobs, forever=forever, device=device, tensorboard=tensorboard
        )
        print_line(f"session {started.session or 'starting'} in the background, process {started.process.pid}")
        say(f"Its log: {started.log}\nFollow it with: mbqueue logs -f. End it with: mbqueue stop")
        return

    from mbqueue.cli.progress import TerminalReport

    with TerminalReport() as report:
        outcome = project.work(
            session=session, max_jobs=max_jobs, forever=forever, device=device, tensorboard=tensorboard, report=report
        )
    print_line(f"session {outcome.session}: {outcome.jobs_done} jobs done; {outcome.reason}")

    from mbqueue.session.worker import Ending

    if outcome.ending is Ending.STOPPED:
        raise typer.Exit(WORK_LEFT)
    if outcome.ending is Ending.BLOCKED:
        raise typer.Exit(FAILURE)


def logs(
    context: typer.Context,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Go on until the session ends, or Ctrl-C.")] = False,
    lines: Annotated[int, typer.Option("--lines", "-n", help="How many of the last lines.", min=0)] = 50,
) -> None:
    """Show what the newest session in the background says.

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
    wait: Annotated[float, typer.Option(help="Seconds to wait for the work to be saved.", min=0)] = 60.0,
) -> None:
    """End every session of this project on this machine gracefully: the step is finished and a checkpoint written.

    Example: mbqueue stop
    """
    stopped = open_project(context).stop(wait_seconds=wait)
    if not stopped:
        print_line("No session of this project runs on this machine.")
    for one in stopped:
        name = one.session or f"process {one.pid}"
        if one.reason is None:
            print_line(
                f"session {name}: still saving after {wait:g} s. Look again with: mbqueue logs -f. At worst, kill -9 "
                f"{one.pid} costs the work since the last checkpoint"
            )
        else:
            print_line(f"session {name}: ended ({one.reason})")
    if any(one.reason is None for one in stopped):
        raise typer.Exit(FAILURE)
