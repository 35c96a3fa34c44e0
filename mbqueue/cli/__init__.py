"""The command line. Only this package prints output, turns errors into messages and chooses exit codes.

Data goes to standard output, messages to standard error. The exit codes are 0 (done), 1 (failure), 2 (wrong usage), 75
(stopped with work left) and 130 (interrupted). Commands import heavy packages (torch, chgnet, pymatgen) inside their
functions, so that ``status`` and ``enqueue`` start fast.
"""

from __future__ import annotations

import sys
import traceback

from mbqueue.cli.app import app
from mbqueue.cli.console import FAILURE, USAGE, say, tolerate_narrow_streams
from mbqueue.errors import LimitReached, MbqueueError, UsageError, causes, remedy
from mbqueue.limits import why_limited


def main(arguments: list[str] | None = None) -> None:
    """Run one command, and exit with its exit code by raising SystemExit."""
    arguments = sys.argv[1:] if arguments is None else arguments
    debug = "--debug" in arguments
    tolerate_narrow_streams()
    try:
        app(args=[a for a in arguments if a != "--debug"], prog_name="mbqueue")
    except Exception as error:
        limited = None if isinstance(error, LimitReached) else why_limited(error)
        if limited is None and not isinstance(error, MbqueueError | OSError):
            raise
        if limited is not None:
            limited.__cause__ = error
        if debug:
            traceback.print_exception(error)
        _tell(limited or error, hint=not debug)
        sys.exit(USAGE if isinstance(error, UsageError) else FAILURE)


def _tell(error: BaseException, *, hint: bool) -> None:
    say(f"error: {error or type(error).__name__}", style="bold red")
    for cause in causes(error):
        said = str(cause).strip().splitlines()[:1]
        if said and said[0] in str(error):
            continue  # the message has already given this cause
        say(f"  because: {': '.join([type(cause).__name__, *said])}")
    if what_to_do := remedy(error):
        say(f"  {what_to_do}")
    if hint and not isinstance(error, UsageError):
        say("  (--debug shows the traceback)", style="dim")
