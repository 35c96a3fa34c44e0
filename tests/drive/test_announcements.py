"""Which sessions on a mount count as alive, regardless of differences between the machines' clocks."""

from __future__ import annotations

from pathlib import Path

import pytest
from small_project import ManualClock

from mbqueue.drive.announcements import ALIVE_SECONDS, Announcement, Announcements
from mbqueue.project import init_project
from mbqueue.queue.jobs import SessionRow
from mbqueue.storage.mounted import Drive

THEIRS, OURS = "20260101T000000Z-aaaaaa", "20260101T000000Z-bbbbbb"


class Two:
    """Two sessions: one sends announcements with a wrong clock, and the other reads the announcements."""

    def __init__(self, root: Path, ahead: float) -> None:
        self.clock, self._their_clock = ManualClock(), ManualClock()
        self._their_clock.wall += ahead
        drive = Drive(root)
        self._theirs = Announcements(drive, THEIRS, "11111111", clock=self._their_clock)
        self._ours = Announcements(drive, OURS, "22222222", clock=self.clock)

    def announce(self, ended: str | None = None) -> None:
        row = SessionRow(
            id=THEIRS, host="elsewhere", boot_id="x", pid=1, pid_started=1, device="fake", started_at=1.0,
            heartbeat_at=1.0, alive_until=1.0, deadline_at=None, ended_at=None, end_reason=None,
            structures_per_second=None,
        )  # fmt: skip
        self._theirs.announce(row, [("fake", 0)], ended=ended)

    def advance(self, seconds: float) -> None:
        self.clock.advance(seconds)
        self._their_clock.advance(seconds)

    def seen(self) -> list[Announcement]:
        return self._ours.others()


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return init_project(tmp_path / "drive")[0].root


@pytest.mark.parametrize("ahead", [3 * 3600.0, 400 * 86_400.0, 0.0])
def test_a_dead_session_counts_as_live_for_a_few_minutes_even_if_its_clock_was_ahead(root: Path, ahead: float) -> None:
    two = Two(root, ahead)
    two.announce()
    for _ in range(3):
        assert [one.session.id for one in two.seen()] == [THEIRS]
        two.advance(ALIVE_SECONDS / 3)
    assert two.seen() == []


@pytest.mark.parametrize("ahead", [3 * 3600.0, 0.0, -3 * 3600.0])
def test_a_session_that_keeps_announcing_itself_counts_as_live_for_minutes_at_most(root: Path, ahead: float) -> None:
    two = Two(root, ahead)
    two.announce()
    two.seen()
    for _ in range(20):
        two.advance(120.0)
        two.announce()
        (one,) = two.seen()
        assert one.session.heartbeat_at == two.clock.now()
        assert one.session.alive_until == two.clock.now() + ALIVE_SECONDS


def test_an_old_announcement_does_not_make_a_session_live_on_a_new_machine(root: Path) -> None:
    two = Two(root, 0.0)
    two.announce()
    two.advance(ALIVE_SECONDS + 1.0)
    assert two.seen() == []


def test_a_session_that_announces_its_end_counts_as_ended(root: Path) -> None:
    two = Two(root, 3 * 3600.0)
    two.announce()
    assert two.seen()
    two.announce(ended="done")
    assert two.seen() == []
