"""``mbqueue work``: one session."""

from __future__ import annotations

from typing import Annotated

import typer

from mbqueue.cli.console import print_line
from mbqueue.cli.options import current_project
from mbqueue.clock import parse_duration
from mbqueue.errors import UsageError

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
) -> None:
    """Work on what is enqueued until nothing is left or the session's time is up.

    May be killed at any instant; the next session carries on. SIGTERM, SIGINT (Ctrl-C) and SIGHUP finish the step,
    write a checkpoint and end; a second Ctrl-C ends at once. Exit code 75: work is left, run it again.

    Example: mbqueue work --session 1h50m
    """
    if forever and session is not None:
        raise UsageError("--forever has no deadline; leave --session out.")
    project = current_project(context)
    if forever or session == "none":
        seconds = None
    else:
        seconds = project.settings.session_seconds if session is None else parse_duration(session)

    from mbqueue.cli.progress import TerminalReport
    from mbqueue.session.stop import StopRequest, graceful_signals

    stop = StopRequest()
    # Signals are caught before the slow imports: a session that is stopped while it starts ends just as gracefully.
    with graceful_signals(stop), TerminalReport(deadline_seconds=seconds) as report:
        from mbqueue.session.worker import Ending, WorkOptions
        from mbqueue.session.worker import work as run_session

        outcome = run_session(
            project,
            WorkOptions(session_seconds=seconds, max_jobs=max_jobs, forever=forever, device=device),
            report=report,
            stop=stop,
        )
    print_line(f"session {outcome.session}: {outcome.jobs_done} jobs done; {outcome.reason}")
    if outcome.ending is Ending.STOPPED:
        raise typer.Exit(WORK_LEFT)
    if outcome.ending is Ending.BLOCKED:
        raise typer.Exit(FAILURE)
