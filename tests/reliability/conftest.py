"""Run a small real experiment from `init` to its results, and check the invariants that must hold after any fault."""

from __future__ import annotations

import os
import random
import sqlite3
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import processes
import pytest
from long_runs import LONG
from processes import outcome
from tripwire import Fault
from warm import Warm

from mbqueue.files import TEMP_PREFIX
from mbqueue.project import ProjectFolder, find_project
from mbqueue.queue.jobs import State
from mbqueue.queue.store import Queue

#: The seed of the sample; every failure prints it.
SEED = int(os.environ.get("MBQUEUE_TEST_SEED", random.SystemRandom().randrange(10**6)))
#: MBQUEUE_SHARE=2/5 runs only the second fifth of a long run, so you can split the run across machines or days.
SHARE, SHARES = map(int, os.environ.get("MBQUEUE_SHARE", "1/1").split("/"))

EXPERIMENT = "head_finetune"
ENQUEUE = ("enqueue", EXPERIMENT, "--dataset", "sample", "--folds", "0", "--epochs", "2")
ENQUEUE += ("--set", "data.limit=24", "--set", "train.batch_size=8")
WORK = ("work", "--device", "cpu", "--session", "none")
#: Settings that write a checkpoint after every step.
SETTINGS = "checkpoint_minutes = 1e-6\nlease_seconds = 60.0\n"
#: Settings for a project folder that stands in for a mount, with the live folder next to the project folder.
ON_A_DRIVE = SETTINGS + 'live_dir = "../live"\n'


def tell(text: str) -> None:
    """Print counts for docs/explanation/reliability.md; pytest shows them with -s."""
    sys.stdout.write(f"\n{text}\n")
    sys.stdout.flush()


def share_of(points: Sequence[int]) -> list[int]:
    """The part of ``points`` that MBQUEUE_SHARE selects."""
    return list(points[SHARE - 1 :: SHARES])


def points_of(name: str, n_operations: int, *, sample: int) -> list[int]:
    """The operations at which to kill: all that MBQUEUE_SHARE selects, or a sample spread over the whole run."""
    if LONG:
        return share_of(range(1, n_operations + 1))
    chance = random.Random(f"{SEED} {name}")
    width = n_operations / sample
    return [1 + int(width * (number + chance.random())) for number in range(sample)]


@pytest.fixture(scope="session")
def warm() -> Warm:
    return processes.warm()


@dataclass(frozen=True)
class Lab:
    """A folder for one project and its logs; ``place`` is the project's folder if it is elsewhere."""

    warm: Warm
    folder: Path
    enqueue: tuple[str, ...] = ENQUEUE
    settings: str = SETTINGS
    place: Path | None = None

    @property
    def root(self) -> Path:
        return self.place or self.folder / "project"

    @property
    def live_folder(self) -> Path:
        """The live folder of a project with the settings `ON_A_DRIVE`; it is lost with the machine."""
        return self.folder / "live"

    @property
    def log(self) -> Path:
        return self.folder / "log"

    @property
    def said(self) -> str:
        return self.log.read_text()

    @property
    def commands(self) -> tuple[tuple[str, ...], ...]:
        """The commands that run an experiment, from `init` to `work`; each command can be repeated."""
        return ("init", str(self.root)), self.enqueue, WORK

    def make(self) -> None:
        """Create a folder that contains only the settings file."""
        self.root.mkdir(parents=True, exist_ok=True)
        (self.root / "mbqueue.toml").write_text(self.settings)

    def live(self, fault: Fault | None = None, **options: Any) -> int:
        """Run `init`, `enqueue` and `work`, in whatever state the project is."""
        return self.warm.run(self.root, *self.commands, log=self.log, fault=fault, watched=self.folder, **options)

    def work(self, fault: Fault | None = None, command: Sequence[str] = WORK, **options: Any) -> int:
        """Run one session."""
        return self.warm.run(self.root, command, log=self.log, fault=fault, watched=self.folder, **options)

    def project(self) -> ProjectFolder:
        return find_project(self.root)

    def results(self, fold: int = 0) -> tuple[bytes, bytes, list[dict[str, object]]]:
        """The parts of a fold's results that must be identical in identical runs."""
        with Queue(self.project().queue_db, read_only=True) as queue:
            (experiment,) = queue.experiments()
        return outcome(self.root / experiment.results_dir, fold)

    def check_database(self) -> None:
        """Check that SQLite finds no damage, and that every job is committed."""
        path = self.project().queue_db
        connection = sqlite3.connect(path)
        assert connection.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
        connection.close()
        with Queue(path, read_only=True) as queue:
            assert {job.state for job in queue.jobs()} == {State.COMMITTED}

    def check_queue(self, *, preemptions: int | None = None, may_fail: bool = False, may_rewind: bool = False) -> None:
        """Check that the database is intact, every job was committed once, and no attempt failed unless allowed."""
        self.check_database()
        with Queue(self.project().queue_db, read_only=True) as queue:
            jobs, events = queue.jobs(), queue.events(limit=10**6)
        commits = Counter(event.job_id for event in events if event.to_state is State.COMMITTED)
        if may_rewind:
            commits -= Counter(event.job_id for event in events if event.from_state is State.COMMITTED)
        assert commits == Counter(job.id for job in jobs), "a job was committed twice"
        assert may_fail or sum(job.failures for job in jobs) == 0
        if preemptions is not None:
            assert sum(job.preemptions for job in jobs) <= preemptions

    def age_left_overs(self) -> None:
        """Make leftover files an hour old, because newer files might belong to a live process."""
        for path in self.left_over():
            os.utime(path, (path.stat().st_atime, path.stat().st_mtime - 3600))

    def left_over(self) -> list[Path]:
        """The temporary files and folders that remain."""
        return sorted(self.folder.rglob(f"{TEMP_PREFIX}*"))


@pytest.fixture
def lab(warm: Warm, tmp_path: Path) -> Lab:
    """An empty project folder."""
    made = Lab(warm, tmp_path)
    made.make()
    return made


@dataclass(frozen=True)
class Straight:
    """The results of an uninterrupted run, and its operations ("kind path")."""

    folder: Path
    results: tuple[bytes, bytes, list[dict[str, object]]]
    operations: list[str]


@pytest.fixture(scope="session")
def straight(warm: Warm, tmp_path_factory: pytest.TempPathFactory) -> Straight:
    return go_straight(Lab(warm, tmp_path_factory.mktemp("straight")))


def go_straight(lab: Lab) -> Straight:
    """Run an experiment without any fault."""
    lab.make()
    trace = lab.folder / "trace"
    assert lab.live(trace=trace) == 0, lab.said
    lab.check_queue(preemptions=0)
    assert not lab.left_over()
    lines = trace.read_text().splitlines()
    operations = [line.split(" ", 1)[1] for line in lines if not line.startswith("-")]
    return Straight(lab.root, lab.results(), operations)
