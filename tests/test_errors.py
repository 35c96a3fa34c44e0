"""The chain of an error's causes, which may be circular."""

from __future__ import annotations

import errno

import pytest

from mbqueue.cli import _tell
from mbqueue.errors import InvalidCrystals, MbqueueError, causes, counted, next_step
from mbqueue.session.worker import is_disk_full


def its_own_cause() -> MbqueueError:
    error = MbqueueError("first")
    error.__cause__ = error
    return error


def circle() -> MbqueueError:
    first, second, third = MbqueueError("first"), MbqueueError("second"), MbqueueError("third")
    first.__cause__, second.__cause__, third.__cause__ = second, third, second
    return first


def test_a_counted_noun_agrees_with_its_number() -> None:
    assert [counted(number, "job") for number in (0, 1, 1200)] == ["0 jobs", "1 job", "1,200 jobs"]
    assert [counted(number, "entry", "entries") for number in (1, 2)] == ["1 entry", "2 entries"]


def test_causes_are_told_once_each(capsys: pytest.CaptureFixture[str]) -> None:
    assert list(causes(its_own_cause())) == []
    assert [str(cause) for cause in causes(circle())] == ["second", "third"]
    _tell(its_own_cause(), hint=False)
    _tell(circle(), hint=False)
    assert capsys.readouterr().err.count("because") == 2


@pytest.mark.parametrize(
    ("message", "step"),
    [
        (
            "mbqueue.errors.NonFiniteLoss: Lower train.lr. Then enqueue the experiment under a new name (--name).",
            "enqueue the experiment again under a new name (--name)",
        ),
        ("There is no dataset --name", "after fixing the cause: mbqueue retry mine --fold 2"),
        (str(InvalidCrystals("mine.csv", [("a", "no atoms")])), "after fixing the cause: mbqueue retry mine --fold 2"),
    ],
)
def test_a_retry_is_advised_only_if_it_can_help(message: str, step: str) -> None:
    assert next_step(message, "mine", 2) == step


def test_a_full_disk_is_found_behind_any_cause() -> None:
    error = circle()
    assert not is_disk_full(error)
    error.__cause__.__cause__.__context__ = OSError(errno.ENOSPC, "full")  # type: ignore[union-attr]
    error.__cause__.__cause__.__cause__ = None  # type: ignore[union-attr]
    assert is_disk_full(error)
