"""An experiment whose process dies at a numbered operation, and again while it recovers, changes not one bit."""

from __future__ import annotations

import itertools
import random
import shutil
import signal
from pathlib import Path

import pytest
from tripwire import Fault
from warm import Warm

from .conftest import LONG, SEED, Lab, Straight, tell

#: Deaths of one action in the short version.
SAMPLE = 10
#: Operations at the end of a run that another run may not have.
CLOCKED = 30


def points_of(action: str, n_operations: int) -> list[int]:
    """All operations, or a sample spread over the whole run."""
    if LONG:
        return list(range(1, n_operations + 1))
    chance = random.Random(f"{SEED} {action}")
    width = n_operations / SAMPLE
    return [1 + int(width * (number + chance.random())) for number in range(SAMPLE)]


@pytest.mark.parametrize("action", ["kill", "lose"])
def test_an_experiment_that_dies_at_an_operation_and_again_recovering_equals_an_uninterrupted_one(
    warm: Warm, tmp_path: Path, straight: Straight, action: str
) -> None:
    chance = random.Random(f"{SEED} {action} again")
    deaths, wrong = 0, []
    for point in points_of(action, len(straight.operations)):
        lab = Lab(warm, tmp_path / str(point))
        # What is left to do takes fewer operations; a point beyond its end lets recovery run through.
        again = chance.randrange(1, len(straight.operations) - point + 40)
        try:
            deaths += die_twice(lab, straight, Fault(at=point, action=action), Fault(at=again, action=action))
        except AssertionError as error:
            wrong.append(
                f"{action} at {point} ({straight.operations[point - 1]}), then at {again}: {error}\n{lab.said}"
            )
        shutil.rmtree(lab.folder)
    assert not wrong, "\n".join([f"{len(wrong)} wrong, MBQUEUE_TEST_SEED={SEED}", *wrong[:5]])
    tell(f"{action}: {len(straight.operations)} operations, {deaths} deaths")


def die_twice(lab: Lab, straight: Straight, first: Fault, second: Fault) -> int:
    """Die, die again or get done, get done; returns how often it died."""
    lab.make()
    code = lab.live(first)
    if code == 0:
        # Heartbeats come by the clock, so one run has a few operations more than another: it was over before this one.
        assert first.at > len(straight.operations) - CLOCKED, lab.said
        return 0
    assert code == -signal.SIGKILL
    lab.age_left_overs()
    code = lab.live(second)
    assert code in {0, -signal.SIGKILL}
    lab.age_left_overs()
    assert lab.live() == 0
    assert lab.results() == straight.results
    lab.check_queue(preemptions=2)
    assert not lab.left_over()
    return 1 + (code != 0)


def test_recovery_that_dies_again_and_again_gets_done(warm: Warm, tmp_path: Path, straight: Straight) -> None:
    lab = Lab(warm, tmp_path)
    lab.make()
    steps = itertools.count(5, 5) if LONG else itertools.count(30, 30)
    codes = []
    for death in steps:
        codes.append(lab.live(Fault(at=death)))
        if codes[-1] != -signal.SIGKILL:
            break
    assert codes.count(-signal.SIGKILL) >= 2
    assert codes[-1] == 0, lab.said
    assert lab.results() == straight.results
    lab.check_queue(preemptions=len(codes))
    tell(f"{len(codes) - 1} deaths in a row")
