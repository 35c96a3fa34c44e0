"""An experiment whose process dies at a numbered operation, and again while recovering, gives the same bytes."""

from __future__ import annotations

import gzip
import itertools
import json
import random
import shutil
import signal
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from tripwire import Fault
from warm import Warm

from mbqueue.data.datasets import SAMPLE_FILE
from mbqueue.queue.store import Queue
from mbqueue.results.folder import read_recorded
from mbqueue.results.tables import model_file, predictions_file

from .conftest import (
    ENQUEUE,
    EXPERIMENT,
    LONG,
    ON_A_DRIVE,
    SEED,
    SETTINGS,
    SHARE,
    SHARES,
    WORK,
    Lab,
    Straight,
    go_straight,
    points_of,
    tell,
)

#: Heartbeats depend on the clock, so the number of operations may differ between runs by this much. On a drive, it may
#: differ by more, because a thread publishes during training and its timing varies.
CLOCKED, CLOCKED_ON_A_DRIVE = 30, 150


@dataclass(frozen=True)
class Death:
    """A way to kill an experiment.

    Attributes:
        action: see `Fault`.
        sample: number of kills in a short test run.
        on_a_drive: whether the project is on a mount, with its live folder on the machine's own disk.
        with_machine: whether everything that is not on the mount is lost too.
    """

    name: str
    action: str
    sample: int
    on_a_drive: bool = False
    with_machine: bool = False

    @property
    def settings(self) -> str:
        return ON_A_DRIVE if self.on_a_drive else SETTINGS


DEATHS = [
    Death("killed", "kill", sample=3),
    Death("power lost", "lose", sample=3),
    Death("killed, on a drive", "kill", sample=2, on_a_drive=True),
    Death("machine lost, on a drive", "kill", sample=2, on_a_drive=True, with_machine=True),
]


@pytest.fixture(scope="module")
def straight_on_a_drive(warm: Warm, tmp_path_factory: pytest.TempPathFactory) -> Straight:
    return go_straight(Lab(warm, tmp_path_factory.mktemp("on_a_drive"), settings=ON_A_DRIVE))


@pytest.mark.parametrize("death", DEATHS, ids=lambda death: death.name)
def test_an_experiment_that_dies_at_an_operation_and_again_recovering_equals_an_uninterrupted_one(
    warm: Warm, tmp_path: Path, straight: Straight, straight_on_a_drive: Straight, death: Death
) -> None:
    operations = (straight_on_a_drive if death.on_a_drive else straight).operations
    assert straight_on_a_drive.results == straight.results
    sweep(straight, death, operations, lambda place: Lab(warm, tmp_path / place, settings=death.settings))


def sweep(straight: Straight, death: Death, operations: list[str], lab_at: Callable[[str], Lab]) -> None:
    """For each point, start an experiment in a new folder, kill it at that operation, and again while it recovers."""
    reached, deaths, wrong = 0, 0, []
    points = points_of(death.name, len(operations), sample=death.sample)
    for tried, point in enumerate(points, start=1):
        # The first kill determines the second, so that a repeated or split run kills at the same operations.
        chance = random.Random(f"{SEED} {death.name} {point}")
        lab = lab_at(str(point))
        # If the recovery has fewer than `again` operations, it finishes without a second kill.
        again = chance.randrange(1, len(operations) - point + 40)
        try:
            died = die_twice(lab, straight, death, point, again, len(operations))
            deaths, reached = deaths + died, reached + (died > 0)
        except AssertionError as error:
            wrong.append(f"{death.name} at {point} ({operations[point - 1]}), then at {again}: {error}\n{lab.said}")
        shutil.rmtree(lab.folder)
        if tried % 20 == 0:
            tell(f"{death.name}: {tried} of {len(points)} points tried, {deaths} deaths, {len(wrong)} wrong")
    assert not wrong, "\n".join([f"{len(wrong)} wrong, MBQUEUE_TEST_SEED={SEED}", *wrong[:5]])
    tell(
        f"{death.name}, share {SHARE}/{SHARES}: {len(operations)} operations, died first at {reached} of "
        f"{len(points)} points, {deaths} deaths, all equal (MBQUEUE_TEST_SEED={SEED})"
    )


SOUPS = {"soup": ("--set", "train.soup=2"), "best soup": ("--set", "train.soup=1", "--set", "train.soup_of=best")}


@pytest.mark.parametrize("kind", ["scalar", "class", *SOUPS])
def test_an_experiment_of_any_kind_that_dies_twice_equals_an_uninterrupted_one(
    warm: Warm, tmp_path: Path, kind: str
) -> None:
    enqueue = (*ENQUEUE, *SOUPS[kind]) if kind in SOUPS else of_target(kind, write_table(tmp_path / "table.jsonl", 60))
    straight = go_straight(Lab(warm, tmp_path / "straight", enqueue=enqueue))
    death = Death(f"dies, {kind}", "kill", sample=1)
    sweep(straight, death, straight.operations, lambda place: Lab(warm, tmp_path / place, enqueue=enqueue))


def write_table(path: Path, number: int) -> Path:
    """Write a table of the sample's first crystals, with a class."""
    with gzip.open(SAMPLE_FILE, "rt") as lines:
        rows = [json.loads(line) for line in itertools.islice(lines, number)]
    path.write_text("\n".join(json.dumps({**row, "class": row["e_form"] < -1.0}) for row in rows))
    return path


def of_target(kind: str, table: Path) -> tuple[str, ...]:
    """The command that enqueues an experiment on a scalar or a class."""
    target = {"name": "made up", "unit": "" if kind == "class" else "eV", "kind": kind}
    target["column"] = "class" if kind == "class" else "e_form"
    settings = [part for key, value in target.items() for part in ("--set", f"target.{key}={json.dumps(value)}")]
    return ("enqueue", f"{kind}_head", "--dataset", str(table), *ENQUEUE[4:], *settings)


@dataclass(frozen=True)
class MadeLab(Lab):
    """A copy of a project with recorded experiments, in which a command makes a new experiment from them."""

    members: Path = Path()

    @property
    def commands(self) -> tuple[tuple[str, ...], ...]:
        return self.enqueue, WORK

    def make(self) -> None:
        if not self.root.exists():
            shutil.copytree(self.members, self.root)

    def results(self, fold: int = 0) -> Any:
        """All results except times: the predictions, the scores, and the model and weights if there are any."""
        with Queue(self.project().queue_db, read_only=True) as queue:
            folder = self.root / queue.experiment("made").results_dir
        content = read_recorded(folder).content
        # Ignore entries that differ when a run is repeated, such as times and sessions.
        entry = {key: value for key, value in content["folds"][str(fold)].items() if key in {"scores", "blend"}}
        assert entry["scores"]
        kept = [file for file in (model_file(folder, fold), predictions_file(folder, fold)) if file.exists()]
        return {file.name: file.read_bytes() for file in kept}, entry


@pytest.fixture(scope="module")
def members(warm: Warm, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A project with two recorded experiments, which share the 32 crystals of their validation set."""
    folder = tmp_path_factory.mktemp("members")
    table = write_table(folder / "table.jsonl", 80)
    shared = ("--set", "train.validation=0.5", "--set", "train.validation_seed=0", "--set", "train.batch_size=16")
    enqueue = ("enqueue", EXPERIMENT, "--dataset", str(table), "--folds", "0", "--epochs", "1", "--seeds", "0-1")
    lab = Lab(warm, folder, enqueue=(*enqueue, *shared))
    lab.make()
    assert lab.live() == 0, lab.said
    return lab.root


SEEDS = tuple(f"{EXPERIMENT}.seed{number}" for number in range(2))
MADE = {
    "blend": ("blend", *SEEDS),
    "fitted blend": ("blend", *SEEDS, "--weights", "fitted"),
    "predictions anew": ("predict-again", SEEDS[0], "--test-strains", "1"),
}


@pytest.mark.parametrize("made", MADE)
def test_an_experiment_made_from_others_that_dies_twice_equals_an_uninterrupted_one(
    warm: Warm, tmp_path: Path, members: Path, made: str
) -> None:
    def lab_at(place: str) -> MadeLab:
        return MadeLab(warm, tmp_path / place, enqueue=(*MADE[made], "--name", "made"), members=members)

    straight = go_straight(lab_at("straight"))
    sweep(straight, Death(f"dies, {made}", "kill", sample=2), straight.operations, lab_at)


def die_twice(lab: Lab, straight: Straight, death: Death, point: int, again: int, n_operations: int) -> int:
    """Kill an experiment once or twice, then let it finish; return the number of kills."""
    lab.make()
    code = lab.live(Fault(at=point, action=death.action))
    if code == 0:
        # Runs differ by a few operations, so this run may finish before the operation at which it should die.
        assert point > n_operations - (CLOCKED_ON_A_DRIVE if death.on_a_drive else CLOCKED), lab.said
        return 0
    assert code == -signal.SIGKILL
    clean_up(lab, death)
    code = lab.live(Fault(at=again, action=death.action))
    assert code in {0, -signal.SIGKILL}
    clean_up(lab, death)
    assert lab.live() == 0
    assert lab.results() == straight.results
    # A new machine knows only the commits on the mount, so it cannot know how often jobs were preempted.
    lab.check_queue(preemptions=None if death.with_machine else 2, may_rewind=death.with_machine)
    assert not lab.left_over()
    return 1 + (code != 0)


def clean_up(lab: Lab, death: Death) -> None:
    """Prepare for the next session: remove the machine's disk if it is lost, and make leftover files look old."""
    if death.with_machine:
        shutil.rmtree(lab.live_folder, ignore_errors=True)
    lab.age_left_overs()


def test_recovery_that_dies_again_and_again_still_finishes(warm: Warm, tmp_path: Path, straight: Straight) -> None:
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
