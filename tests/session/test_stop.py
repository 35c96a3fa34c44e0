from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap

import pytest
from small_project import ManualClock

from mbqueue.session.outcome import StopCause, StopKind
from mbqueue.session.stop import Deadline, StopRequest, graceful_signals


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_only_sets_a_flag_and_says_which(number: signal.Signals) -> None:
    stop = StopRequest()
    with graceful_signals(stop):
        os.kill(os.getpid(), number)
        assert stop.wait(5)
    assert stop.cause == StopCause(StopKind.SIGNAL, number.name, number)


def test_the_former_signal_handlers_are_restored() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with graceful_signals(StopRequest()):
        assert signal.getsignal(signal.SIGTERM) is not before
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_second_interrupt_ends_the_process_at_once_with_130() -> None:
    program = textwrap.dedent("""
        import os, signal, time
        from mbqueue.session.stop import StopRequest, graceful_signals
        with graceful_signals(StopRequest()):
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(60)
    """)
    assert subprocess.run([sys.executable, "-c", program], timeout=30, check=False).returncode == 130


@pytest.mark.parametrize("earlier", ["its time is up", "terminate"])
def test_the_first_interrupt_is_graceful_also_when_the_session_stops_already(earlier: str) -> None:
    program = textwrap.dedent("""
        import os, signal, sys
        from mbqueue.session.stop import StopRequest, graceful_signals
        stop = StopRequest()
        with graceful_signals(stop):
            if sys.argv[1] == "terminate":
                os.kill(os.getpid(), signal.SIGTERM)
            else:
                stop.request("the time is up")
            os.kill(os.getpid(), signal.SIGINT)
            print("saved", flush=True)
            os.kill(os.getpid(), signal.SIGINT)
    """)
    ended = subprocess.run([sys.executable, "-c", program, earlier], timeout=30, check=False, capture_output=True)
    assert (ended.stdout, ended.returncode) == (b"saved\n", 130)


def test_the_first_reason_is_kept() -> None:
    stop = StopRequest()
    stop.request("SIGTERM")
    stop.request("the session's time is up")
    assert stop.reason == "SIGTERM"


def test_nothing_begins_that_cannot_be_saved_before_the_deadline(clock: ManualClock) -> None:
    deadline = Deadline(clock, 1000.0)
    assert deadline.allows(900)
    clock.advance(500)
    assert not deadline.allows(490)
    assert deadline.allows(480)
    deadline.saw_save(100.0)
    assert not deadline.allows(400)
    assert deadline.allows(380)


def test_a_wall_clock_that_jumps_moves_no_deadline(clock: ManualClock) -> None:
    deadline = Deadline(clock, 1000.0)
    clock.wall += 1e6
    assert deadline.remaining() == 1000.0


def test_without_a_deadline_everything_is_allowed(clock: ManualClock) -> None:
    deadline = Deadline(clock, None)
    assert deadline.allows(1e12)
    assert deadline.at is None


def test_the_end_command_gets_a_reserve_of_at_most_a_share_of_a_short_session(clock: ManualClock) -> None:
    assert Deadline(clock, 1000.0, end_command_seconds=120.0).remaining() == 880.0
    assert Deadline(clock, 100.0, end_command_seconds=120.0).remaining() == 80.0
    assert Deadline(clock, None, end_command_seconds=120.0).at is None


def test_a_reason_named_like_a_signal_is_not_a_signal() -> None:
    stop = StopRequest()
    stop.request("SIGTERM")
    assert stop.cause == StopCause(StopKind.ASKED, "SIGTERM")
