"""Which files are removed from a mount, and when."""

from __future__ import annotations

from mbqueue.drive.retention import NEWEST, SETTLED_SECONDS, SPACED, positions_to_keep


def after(seen_at: list[float], now: float, *, steady_since: float = 0.0) -> list[float]:
    """Return when the files that are kept at ``now`` were first seen; ``seen_at`` lists these times for all files."""
    places = positions_to_keep(seen_at, now, kept=2, steady_since=steady_since)
    return [seen_at[place] for place in sorted(places)]


def test_nothing_is_removed_before_its_successor_is_settled() -> None:
    seen_at = [300.0 * number for number in range(1, 7)]
    assert after(seen_at, seen_at[-1]) == seen_at
    assert after(seen_at, seen_at[2] + SETTLED_SECONDS - 1.0) == seen_at
    assert after(seen_at, seen_at[2] + SETTLED_SECONDS) == seen_at[1:]


def test_the_newest_two_settled_files_stay() -> None:
    seen_at = [15.0 * number for number in range(50)]
    assert after(seen_at, seen_at[-1] + SETTLED_SECONDS) == seen_at[-2:]


def test_short_epochs_do_not_fill_the_drive_and_settled_files_stay() -> None:
    kept: list[float] = []
    for number in range(1000):
        kept = after([*kept, 15.0 * number], 15.0 * number)
        assert len(kept) <= 2 + NEWEST + SPACED
        if number > 2 * SETTLED_SECONDS / 15.0:
            assert sum(seen <= 15.0 * number - SETTLED_SECONDS for seen in kept) == 2


def test_a_mount_that_keeps_failing_does_not_fill_the_drive() -> None:
    kept: list[float] = []
    for number in range(480):
        now = 180.0 * number
        kept = after([*kept, now], now, steady_since=now - now % 1620.0)
        assert len(kept) <= 2 + NEWEST + SPACED
        assert kept[0] == 0.0, "nothing settles, so what was there first stays"
        assert kept[-1] == now


def test_while_the_mount_is_lost_no_file_settles() -> None:
    seen_at = [300.0 * number for number in range(1, 7)]
    now = seen_at[-1] + SETTLED_SECONDS
    assert after(seen_at, now, steady_since=now - SETTLED_SECONDS + 1.0) == seen_at
    assert after(seen_at, now, steady_since=now - SETTLED_SECONDS) == seen_at[-2:]
