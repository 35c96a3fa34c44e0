"""Simulate a month of training: the folds of a full finetune, in many sessions that all end badly."""

from __future__ import annotations

import errno
import random
import shutil
import signal
import time
from collections import Counter
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest
from lying_drive import AWAY, Client, LyingDrive
from tripwire import Fault
from warm import Warm

from .conftest import LONG, SEED, SETTINGS, WORK, Lab, tell

FAILURE, USAGE, WORK_LEFT = 1, 2, 75
FOLDS = range(5 if LONG else 2)
LEAST_SESSIONS = 40 if LONG else 6
CRYSTALS, EPOCHS = (60, 3) if LONG else (20, 2)
ENQUEUE = ("enqueue", "full_finetune", "--dataset", "sample", "--folds", f"0-{FOLDS[-1]}", "--epochs", str(EPOCHS))
ENQUEUE += ("--set", f"data.limit={CRYSTALS}", "--set", "train.batch_size=8")
#: How likely each ending is, relative to the others, once each has occurred. Deadlines are rare, because a session with
#: a deadline runs for several seconds and does much of the work.
ENDINGS = {"deadline": 1 if LONG else 0, "lost mount": 2, "SIGTERM": 4, "SIGKILL": 5}
#: Ending of a session → the exit codes that the test accepts. While a session is still reading its project from the
#: mount, SIGTERM kills the session, and losing the mount is an error. Once the session has read its project, it
#: continues without the mount and may finish its work.
CODES = {
    "deadline": {WORK_LEFT},
    "SIGTERM": {WORK_LEFT, -signal.SIGTERM},
    "SIGKILL": {-signal.SIGKILL},
    "lost mount": {FAILURE, WORK_LEFT, -signal.SIGTERM, 0},
}
#: The number of operations in the shortest and the longest session. With a project on a drive, a new
#: machine performs about 100 operations before training starts.
SHORTEST, LONGEST = 8, 60 if LONG else 200
SHORTEST_ON_A_DRIVE, LONGEST_ON_A_DRIVE = 50, 330 if LONG else 900
#: The maximum number of operations in the first `LEAST_SESSIONS` sessions. With longer sessions, the run might finish
#: before each way to end a session has occurred.
LONGEST_AT_FIRST, LONGEST_AT_FIRST_ON_A_DRIVE = (60, 330) if LONG else (45, 170)


@dataclass
class Timing:
    """Total times of several sessions.

    Attributes:
        seconds: total duration of the processes.
        starting: seconds of each session until its first step, or until its end if it took no step.
        publishing: seconds spent in completed rounds of publishing, during and after training.
    """

    steps: int = 0
    seconds: float = 0.0
    starting: list[float] = field(default_factory=list)
    publishing: float = 0.0

    def add(self, trace: Path, began: float, ended: float) -> None:
        """Add the times of one session, read from its trace file."""
        told = [line.split(" ") for line in trace.read_text().splitlines()] if trace.exists() else []
        steps = [float(words[2]) for words in told if words[:2] == ["-", "step"]]
        self.steps += len(steps)
        self.seconds += ended - began
        self.starting.append((steps[0] if steps else ended) - began)
        self.publishing += sum(float(words[2]) for words in told if words[:2] == ["-", "published"])

    def compared(self, straight: Timing) -> str:
        """Describe the cost of the interruptions compared with an uninterrupted run."""
        starting = sum(self.starting) - sum(straight.starting)
        return (
            f"{self.steps} steps for {straight.steps} ({self.steps / straight.steps - 1:.0%} done again); "
            f"{self.seconds:.1f} s for {straight.seconds:.1f} s ({self.seconds / straight.seconds - 1:.0%} extra), of "
            f"it start-up {starting:.1f} s ({starting / max(1, len(self.starting) - 1):.2f} s a session), publishing "
            f"{self.publishing:.1f} s"
        )


@pytest.fixture(scope="module")
def straight(warm: Warm, tmp_path_factory: pytest.TempPathFactory) -> tuple[Lab, Timing]:
    """Run all folds without interruption."""
    lab = Lab(warm, tmp_path_factory.mktemp("straight"), enqueue=ENQUEUE)
    lab.make()
    assert warm.run(lab.root, *lab.commands[:2], log=lab.log) == 0, lab.said
    timing, trace, began = Timing(), lab.folder / "trace", time.monotonic()
    assert lab.work(trace=trace, patience=550) == 0, lab.said
    timing.add(trace, began, time.monotonic())
    return lab, timing


def check(endings: list[str], month: Lab, straight: Lab) -> None:
    """Check that sessions ended in every possible way, and that results equal those of an uninterrupted run."""
    counted = Counter(endings)
    assert len(endings) >= LEAST_SESSIONS, counted
    assert set(counted) == set(ENDINGS), counted
    for fold in FOLDS:
        assert month.results(fold) == straight.results(fold), f"MBQUEUE_TEST_SEED={SEED}, fold {fold}: {endings}"


def report(where: str, endings: list[str], timing: Timing, straight: Timing) -> None:
    """Print the cost of the interruptions."""
    counted = ", ".join(f"{number} {ending}" for ending, number in sorted(Counter(endings).items()))
    tell(f"{where}: {len(endings)} sessions cut off ({counted}); {timing.compared(straight)}")


def next_ending(chance: random.Random, before: list[str]) -> str:
    """Choose how the next session ends: at first, use each way once, then choose at random."""
    if len(before) < len(ENDINGS):
        return list(ENDINGS)[len(before)]
    assert len(before) < 40 * LEAST_SESSIONS, f"MBQUEUE_TEST_SEED={SEED}: it does not come to its end"
    return chance.choices(list(ENDINGS), list(ENDINGS.values()))[0]


def command_for(ending: str, chance: random.Random) -> tuple[str, ...]:
    """The arguments of a session, which has a short time limit if ``ending`` is "deadline"."""
    # A session this short trains for about 1 s: it keeps a tenth of its time for saving and a tenth as a margin, and
    # it starts no job when less than 5 s are left.
    return (*WORK[:-1], f"{chance.uniform(7.0, 8.0):.1f}s") if ending == "deadline" else WORK


def test_a_month_of_sessions_that_all_end_badly_equals_one_uninterrupted_run(
    warm: Warm, lab: Lab, straight: tuple[Lab, Timing]
) -> None:
    month = replace(lab, enqueue=ENQUEUE)
    chance, endings, timing = random.Random(SEED), [], Timing()
    assert warm.run(month.root, *month.commands[:2], log=month.log) == 0, month.said
    while True:
        ending = next_ending(chance, endings)
        # Interrupt each session before it can finish, so that the run needs many sessions.
        at = chance.randrange(SHORTEST, LONGEST_AT_FIRST if len(endings) < LEAST_SESSIONS else LONGEST)
        fault = {
            "deadline": None,
            "SIGTERM": Fault(at=at, action="end"),
            "SIGKILL": Fault(at=at),
            # The project has no live folder, so a lost mount makes all the project's files unreadable.
            "lost mount": Fault(at=at, action="fail", number=errno.ENOTCONN, for_good=True),
        }[ending]
        trace, began = month.folder / f"trace{len(endings)}", time.monotonic()
        code = warm.run(month.root, command_for(ending, chance), log=month.log, fault=fault, trace=trace)
        timing.add(trace, began, time.monotonic())
        if code == 0:
            break
        assert code in CODES[ending], f"MBQUEUE_TEST_SEED={SEED}, {endings}, {ending}\n{month.said}"
        endings.append(ending)
    check(endings, month, straight[0])
    month.check_queue(may_fail=True)
    report("on a plain folder", endings, timing, straight[1])


class MonthOnADrive:
    """A project on a simulated drive, and its current machine."""

    def __init__(self, warm: Warm, folder: Path, chance: random.Random) -> None:
        self._warm, self._folder, self._chance = warm, folder, chance
        self.drive = LyingDrive(folder / "drive", chance)
        self.machines = 0
        self._new_machine()
        assert warm.run(self.lab.root, *self.lab.commands[:2], log=self.lab.log, watched=folder) == 0, self.lab.said
        self.drive.settle()  # wait until the drive has uploaded the enqueued experiment

    def _new_machine(self) -> None:
        """Replace the machine: the new machine sees part of the drive, and the previous machine's disk is lost."""
        self.client: Client = self.drive.connect()
        self.machines += 1
        settings = SETTINGS + 'live_dir = "../../live"\n'
        self.lab = Lab(self._warm, self._folder, enqueue=ENQUEUE, settings=settings, place=self.client.folder)
        shutil.rmtree(self.lab.live_folder, ignore_errors=True)
        self.lab.make()

    def is_mount_lost(self) -> bool:
        """Whether the session lost its mount."""
        self.client.is_mounted = not self.client.folder.with_name(self.client.folder.name + AWAY).exists()
        return not self.client.is_mounted

    def go_on(self, ending: str) -> None:
        """Let the drive upload some files; then replace the machine, or mount the drive again."""
        if ending in {"SIGTERM", "deadline"} and self._chance.random() < 0.7:
            self.drive.settle()  # a session's `end_command` may wait until the drive has uploaded everything
        for _ in range(self._chance.randrange(1, 4)):
            self.drive.move()
        if self._chance.random() < 0.5:
            self.drive.kill(self.client)
            self._new_machine()
        else:
            self.client.remount()
            self.drive.notice(self.client)


def test_a_month_on_a_drive_that_lies_equals_one_uninterrupted_run(
    warm: Warm, tmp_path: Path, straight: tuple[Lab, Timing]
) -> None:
    chance, endings, timing = random.Random(SEED), [], Timing()
    month = MonthOnADrive(warm, tmp_path, chance)
    while True:
        ending = next_ending(chance, endings)
        longest = LONGEST_AT_FIRST_ON_A_DRIVE if len(endings) < LEAST_SESSIONS else LONGEST_ON_A_DRIVE
        lab, at = month.lab, chance.randrange(SHORTEST_ON_A_DRIVE, longest)
        fault = {
            "deadline": None,
            "SIGTERM": Fault(at=at, action="end"),
            "SIGKILL": Fault(at=at),
            # Lose the mount, and send SIGTERM a few operations later.
            "lost mount": Fault(at=at, action="unmount", mount=str(lab.root), later=chance.randrange(20, 60)),
        }[ending]
        trace, began = tmp_path / f"trace{len(endings)}", time.monotonic()
        code = lab.work(fault, trace=trace, command=command_for(ending, chance))
        timing.add(trace, began, time.monotonic())
        where = f"MBQUEUE_TEST_SEED={SEED}, {endings}, {ending}\n{lab.said}"
        is_lost = month.is_mount_lost()
        if code == 0 and not is_lost:
            break
        if code == USAGE and "Nothing is enqueued" in lab.said.splitlines()[-1]:
            month.drive.deliver(month.client, share=1.0)  # the new machine saw an empty drive; let it see all files
            continue
        assert code in CODES[ending], where
        assert is_lost == (ending == "lost mount"), where
        endings.append(ending)
        month.go_on(ending)
    month.drive.settle()
    check(endings, month.lab, straight[0])
    assert "DEGRADED" in month.lab.said
    month.lab.check_queue(may_fail=True, may_rewind=True)
    report(f"on a drive that lies, {month.machines} machines", endings, timing, straight[1])
