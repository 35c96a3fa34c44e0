"""A rehearsal of the month: five folds of a full finetune, in many sessions that all end badly."""

from __future__ import annotations

import random
import signal
import time
from dataclasses import replace
from pathlib import Path

import pytest
from tripwire import Fault
from warm import Warm

from .conftest import LONG, SEED, WORK, Lab, tell

WORK_LEFT = 75
#: How the first sessions end; the others end by chance.
ENDINGS = ("deadline", "end", "kill")
#: Operations of the longest session.
LONGEST = 90 if LONG else 32
FOLDS = range(5)
LEAST_SESSIONS = 40 if LONG else 15
CRYSTALS, EPOCHS = (60, 3) if LONG else (20, 2)
ENQUEUE = ("enqueue", "full_finetune", "--dataset", "sample", "--folds", "0-4", "--epochs", str(EPOCHS))
ENQUEUE += ("--set", f"data.limit={CRYSTALS}", "--set", "train.batch_size=8")


def steps_in(trace: Path) -> int:
    return trace.read_text().splitlines().count("- step") if trace.exists() else 0


@pytest.fixture
def month(lab: Lab) -> Lab:
    return replace(lab, enqueue=ENQUEUE, settings="checkpoint_minutes = 1e-6\nlease_seconds = 60.0\n")


def test_a_month_of_sessions_that_are_killed_stopped_or_out_of_time_equals_one_uninterrupted_run(
    warm: Warm, tmp_path: Path, month: Lab
) -> None:
    straight = replace(month, folder=tmp_path / "straight")
    straight.make()
    began = time.monotonic()
    assert straight.live(trace=straight.folder / "trace", patience=550) == 0, straight.said
    straight_seconds = time.monotonic() - began

    chance = random.Random(SEED)
    trace = month.folder / "trace"
    assert warm.run(month.root, *month.commands[:2], log=month.log) == 0, month.said
    endings, seconds = [], 0.0
    while True:
        by_chance = chance.choices(ENDINGS, [1 if LONG else 0, 4, 5])[0]  # one deadline costs seconds, and gets far
        ending = by_chance if len(endings) >= len(ENDINGS) else ENDINGS[len(endings)]
        # A session goes on for some operations; few of them, so that there are many sessions.
        fault = None if ending == "deadline" else Fault(at=chance.randrange(5, LONGEST), action=ending)
        # Nothing is begun that has less than 5 s, and a tenth is kept free twice: this leaves a second or so.
        command = (*WORK[:-1], f"{chance.uniform(7.0, 8.0):.1f}s") if ending == "deadline" else WORK
        began = time.monotonic()
        code = warm.run(month.root, command, log=month.log, fault=fault, trace=trace)
        seconds += time.monotonic() - began
        if code == 0:
            break
        assert code == {"kill": -signal.SIGKILL, "end": WORK_LEFT, "deadline": WORK_LEFT}[ending], month.said
        endings.append(ending)
        assert len(endings) < 40 * LEAST_SESSIONS, "it does not come to its end"
    where = f"MBQUEUE_TEST_SEED={SEED}, {endings}"
    assert len(endings) >= LEAST_SESSIONS, where
    for fold in FOLDS:
        assert month.results(fold) == straight.results(fold), where
    month.check_queue()
    needed, done = steps_in(straight.folder / "trace"), steps_in(trace)
    tell(
        f"{len(endings)} sessions cut off ({', '.join(f'{endings.count(e)} {e}' for e in sorted(set(endings)))}): "
        f"{done} steps for {needed} ({(done - needed) / needed:.1%} done again), "
        f"{seconds:.1f} s for {straight_seconds:.1f} s ({(seconds - straight_seconds) / len(endings):.2f} s a session)"
    )
