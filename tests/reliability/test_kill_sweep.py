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

from .conftest import LONG, SEED, Lab, Straight

PARTS = 2
#: Kill points of one part in the short version.
SAMPLE = 6


def points_of(part: int, n_operations: int) -> list[int]:
    """This part's share of all operations, or a sample spread over the whole run."""
    if LONG:
        return list(range(1 + part, n_operations + 1, PARTS))
    chance = random.Random(SEED + part)
    width = n_operations / SAMPLE
    return [1 + int(width * (number + chance.random())) for number in range(SAMPLE)]


@pytest.mark.parametrize("part", range(PARTS))
@pytest.mark.parametrize("action", ["kill", "lose"])
def test_an_experiment_that_dies_at_an_operation_and_again_recovering_equals_an_uninterrupted_one(
    warm: Warm, tmp_path: Path, straight: Straight, action: str, part: int
) -> None:
    chance = random.Random(SEED + part)
    deaths = 0
    for point in points_of(part, len(straight.operations)):
        lab = Lab(warm, tmp_path / str(point))
        lab.make()
        where = f"MBQUEUE_TEST_SEED={SEED}, {action} at operation {point}: {straight.operations[point - 1]}"
        assert lab.live(Fault(at=point, action=action)) == -signal.SIGKILL, f"{where}\n{lab.said}"
        deaths += 1
        lab.age_left_overs()
        # What is left to do takes fewer operations; a point beyond its end lets recovery run through.
        again = chance.randrange(1, len(straight.operations) - point + 40)
        code = lab.live(Fault(at=again, action=action))
        assert code in {0, -signal.SIGKILL}, f"{where}, then at {again}\n{lab.said}"
        deaths += code != 0
        lab.age_left_overs()
        assert lab.live() == 0, f"{where}, then at {again}\n{lab.said}"
        assert lab.results() == straight.results, f"{where}, then at {again}"
        lab.check_queue(preemptions=2)
        assert not lab.left_over(), f"{where}, then at {again}"
        shutil.rmtree(lab.folder)
    print(f"{deaths} deaths")


def test_recovery_that_dies_at_each_of_its_first_operations_in_turn_gets_done(
    warm: Warm, tmp_path: Path, straight: Straight
) -> None:
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
