"""Kill `recover`, `restore` or `backup` of a project in mid-experiment at a numbered operation, and run it again."""

from __future__ import annotations

import shutil
import signal
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest
from tripwire import Fault
from warm import Warm

from .conftest import ON_A_DRIVE, SEED, SETTINGS, SHARE, SHARES, WORK, Lab, Straight, points_of, tell

ARCHIVE = "kept.tar"


def jobs(number: int) -> tuple[str, ...]:
    """The arguments of a session that runs this many jobs."""
    return (*WORK, "--max-jobs", str(number))


def lose_queue(lab: Lab) -> None:
    for path in lab.project().live_dir.glob("queue.db*"):
        path.unlink()


def damage_queue(lab: Lab) -> None:
    path = lab.project().queue_db
    for beside in path.parent.glob("queue.db-*"):
        beside.unlink()
    content = bytearray(path.read_bytes())
    content[4096:] = b"\xff" * (len(content) - 4096)
    path.write_bytes(content)


def leave(_lab: Lab) -> None:
    """Leave the project as it is."""


@dataclass(frozen=True)
class Keeping:
    """A command to kill, and what happens to the project before the command runs.

    Attributes:
        sample: number of kills in a short test run.
        happened: a function that damages the project before the command runs.
        names: if the next session cannot resume, its error must contain one of these words.
        is_enough: part of the command's output when it runs again with nothing left to do.
    """

    name: str
    command: tuple[str, ...]
    sample: int
    happened: Callable[[Lab], None] = leave
    on_a_drive: bool = False
    names: tuple[str, ...] = ()
    is_enough: str = ""

    @property
    def settings(self) -> str:
        return ON_A_DRIVE if self.on_a_drive else SETTINGS


RECOVER = ("recover",)
RESTORE = ("restore", ARCHIVE, "--force")
WHOLE = "is intact. To replace it"
AGAIN, RESTORE_AGAIN = ("mbqueue recover",), ("mbqueue restore",)
KEEPINGS = [
    Keeping("recover, the queue gone", RECOVER, 1, lose_queue, names=AGAIN, is_enough=WHOLE),
    Keeping("recover, the queue damaged", RECOVER, 1, damage_queue, names=AGAIN, is_enough=WHOLE),
    Keeping("recover, on a drive", RECOVER, 1, damage_queue, on_a_drive=True, names=AGAIN, is_enough=WHOLE),
    Keeping("restore", RESTORE, 2, names=RESTORE_AGAIN),
    # If `restore` dies before it moves a file, the next session only reports that the queue is missing.
    Keeping("restore, the queue gone", RESTORE, 1, lose_queue, names=(*RESTORE_AGAIN, *AGAIN)),
    Keeping("restore, on a drive", RESTORE, 1, on_a_drive=True, names=RESTORE_AGAIN),
    Keeping("backup", ("backup", ARCHIVE), 1, is_enough="exists"),
]


class Templates:
    """Half-trained projects for copying, each created once, with an archive that is one job older."""

    def __init__(self, warm: Warm, base: Path) -> None:
        self._warm, self._base = warm, base
        self.of = cache(self._of)

    def _of(self, on_a_drive: bool) -> Lab:
        lab = Lab(self._warm, self._base / str(on_a_drive), settings=ON_A_DRIVE if on_a_drive else SETTINGS)
        lab.make()
        archive = str(lab.folder / ARCHIVE)
        init, enqueue, _ = lab.commands
        code = self._warm.run(lab.root, init, enqueue, jobs(2), ("backup", archive), jobs(2), log=lab.log)
        assert code in {0, 75}, lab.said
        if code == 75:
            for command in (("backup", archive), jobs(2)):
                assert self._warm.run(lab.root, command, log=lab.log) in {0, 75}, lab.said
        return lab

    def copy(self, keeping: Keeping, folder: Path) -> Lab:
        """Copy the project, and put the copy into the state in which the command starts."""
        template = self.of(keeping.on_a_drive)
        shutil.copytree(template.folder, folder)
        lab = Lab(self._warm, folder, settings=keeping.settings)
        if keeping.command[0] == "backup":
            (folder / ARCHIVE).unlink()
        keeping.happened(lab)
        return lab


@pytest.fixture(scope="module")
def templates(warm: Warm, tmp_path_factory: pytest.TempPathFactory) -> Templates:
    return Templates(warm, tmp_path_factory.mktemp("templates"))


@pytest.mark.parametrize("keeping", KEEPINGS, ids=lambda keeping: keeping.name)
def test_a_command_that_dies_at_an_operation_is_run_again_and_the_experiment_equals_an_uninterrupted_one(
    tmp_path: Path, straight: Straight, templates: Templates, keeping: Keeping
) -> None:
    lab = templates.copy(keeping, tmp_path / "traced")
    trace = lab.folder / "trace"
    assert lab.work(command=absolute(lab, keeping.command), trace=trace) == 0, lab.said
    operations = [line for line in trace.read_text().splitlines() if not line.startswith("-")]
    wrong, deaths = [], 0
    points = points_of(keeping.name, len(operations), sample=keeping.sample)
    for point in points:
        lab = templates.copy(keeping, tmp_path / str(point))
        try:
            deaths += die_and_go_on(lab, straight, keeping, point)
        except AssertionError as error:
            wrong.append(f"{keeping.name} at {point} ({operations[point - 1]}): {error}\n{lab.said[-3000:]}")
        shutil.rmtree(lab.folder)
    assert not wrong, "\n".join([f"{len(wrong)} of {len(points)} wrong, MBQUEUE_TEST_SEED={SEED}", *wrong[:5]])
    assert deaths
    tell(
        f"{keeping.name}, share {SHARE}/{SHARES}: {len(operations)} operations, died at {deaths} of {len(points)} "
        f"points, all equal (MBQUEUE_TEST_SEED={SEED})"
    )


def absolute(lab: Lab, command: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(str(lab.folder / part) if part == ARCHIVE else part for part in command)


def die_and_go_on(lab: Lab, straight: Straight, keeping: Keeping, point: int) -> int:
    """Kill the command at an operation, resume, and compare the results; return the number of kills."""
    lab.log.unlink(missing_ok=True)
    command = absolute(lab, keeping.command)
    code = lab.work(Fault(at=point), command=command)
    assert code in {0, -signal.SIGKILL}, code
    lab.age_left_overs()
    # At every second operation, run a session after the kill and before repeating the command.
    if point % 2 and keeping.names and lab.work() == 0:
        check(lab, straight)
        return int(code != 0)
    if point % 2 and keeping.names:
        assert any(name in lab.said for name in keeping.names), "a session does not say what to do next"
    again = lab.work(command=command)
    assert again == 0 or (again == 2 and keeping.is_enough and keeping.is_enough in lab.said), again
    if keeping.command[0] == "backup":
        # If the archive exists, it is complete, even if the killed `backup` wrote it.
        assert lab.work(command=absolute(lab, RESTORE)) == 0
    assert lab.work() == 0
    check(lab, straight)
    assert not lab.left_over()
    return int(code != 0)


def check(lab: Lab, straight: Straight) -> None:
    """Check that the experiment is done, with the results of an uninterrupted run."""
    assert lab.results() == straight.results
    lab.check_database()
