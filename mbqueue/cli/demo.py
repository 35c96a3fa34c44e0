"""The command ``mbqueue demo`` runs a small five-fold finetune on real crystals and kills a session mid-epoch."""

from __future__ import annotations

import contextlib
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import typer

from mbqueue.cli.console import WORK_LEFT, print_line
from mbqueue.clock import format_duration
from mbqueue.errors import MbqueueError
from mbqueue.project import ProjectFolder, init_project

EXPERIMENT = "full_finetune"
FOLDS, EPOCHS, CRYSTALS = 5, 2, 150
#: The fold, epoch and step after which the demo kills the session.
KILLED_FOLD, KILLED_EPOCH, KILLED_AFTER_STEP = 1, 2, 4
SETTINGS = 'session = "10m"\ncheckpoint_minutes = 1e-6\nlease_seconds = 20.0\n'


class DemoFailed(MbqueueError):
    """A step of the demo failed."""


def demo(
    folder: Annotated[
        Path | None,
        typer.Option("--dir", help="Folder for the project; the default is a temporary folder that the demo deletes."),
    ] = None,
    crystals: Annotated[int, typer.Option(help="Number of crystals to use from the sample.", min=100)] = CRYSTALS,
) -> None:
    """Run a five-fold CHGNet finetune on the sample, kill a session, and show that the results do not change.

    The demo takes a few minutes on two CPU cores. The demo trains the killed session's fold again, this time without
    interruption, and checks that both results are byte-for-byte identical. At the end, the demo prints the results
    folder and the scores per fold.

    Example: mbqueue demo --dir my-demo
    """
    began = time.monotonic()
    with _folder(folder) as root:
        _run(root, crystals)
        print_line()
        print_line(f"The demo took {format_duration(time.monotonic() - began)}.")
        if folder is not None:
            print_line(f"The project is in {root}. Explore it with: mbqueue --project {root} status")
        else:
            print_line("The demo has deleted its projects. To keep them, run: mbqueue demo --dir my-demo")


def _run(root: Path, crystals: int) -> None:
    project = _Commands(root / "project")
    options = ["--dataset", "sample", "--epochs", str(EPOCHS), "--set", f"data.limit={crystals}"]
    options += ["--set", "train.batch_size=16", "--set", "train.validation=0.1"]

    _title("1. Create a project, and enqueue a five-fold full finetune")
    init_project(project.root)
    (project.root / "mbqueue.toml").write_text(SETTINGS)
    project.run("enqueue", EXPERIMENT, *options)

    _title("2. First session: prepare the crystals, train two epochs and end")
    project.run("work", "--max-jobs", "3", expected=WORK_LEFT)
    project.run("status")

    _title(f"3. Second session: train until SIGKILL in epoch {KILLED_EPOCH} of fold {KILLED_FOLD}")
    project.run_until_killed("work")
    project.run("status")

    _title("4. Third session: resume from the last checkpoint and finish")
    project.run("work")
    project.run("status")

    _title(f"5. Train fold {KILLED_FOLD} in another project without interruption, and compare the results")
    straight = _Commands(root / "straight")
    init_project(straight.root)
    straight.run("enqueue", EXPERIMENT, *options, "--folds", str(KILLED_FOLD))
    straight.run("work")
    killed_folder, straight_folder = project.results(), straight.results()
    for what, same in _comparison(killed_folder, straight_folder):
        print_line(f"{'identical bytes' if same else 'DIFFERENT':<22}{what}")
        if not same:
            raise DemoFailed(f"{what} of fold {KILLED_FOLD} differs between the killed and the uninterrupted training.")

    _title("6. The results")
    print_line(str(killed_folder))
    for path in sorted(killed_folder.iterdir()):
        print_line(f"  {path.name:<26}{path.stat().st_size:>10,} bytes")
    print_line()
    print_line((killed_folder / "RESULTS.md").read_text(encoding="utf-8"))


class _Commands:
    def __init__(self, root: Path) -> None:
        self.root = root

    def run(self, *arguments: str, expected: int = 0) -> None:
        print_line(f"$ mbqueue {' '.join(arguments)}")
        code = subprocess.run(self._command(arguments), check=False).returncode
        if code != expected:
            raise DemoFailed(f"mbqueue {' '.join(arguments)} ended with exit code {code} instead of {expected}.")

    def run_until_killed(self, *arguments: str) -> None:
        """Start a session and kill it once it has published a mid-epoch commit."""
        print_line(f"$ mbqueue {' '.join(arguments)}")
        process = subprocess.Popen(self._command(arguments))
        try:
            while not self._is_far_enough():
                if process.poll() is not None:
                    raise DemoFailed("The session ended before the demo could kill it.")
                time.sleep(0.05)
        finally:
            process.kill()
            process.wait()
        assert process.returncode == -signal.SIGKILL
        print_line(f"… killed: kill -9 {process.pid}")

    def results(self) -> Path:
        (folder,) = (self.root / "results" / "daily").glob("*/*/")
        return folder

    def _is_far_enough(self) -> bool:
        """Whether the session has published a mid-epoch commit."""
        from mbqueue.storage.commits import Commits
        from mbqueue.storage.manifest import Identity
        from mbqueue.storage.places import in_folder

        folder = ProjectFolder(self.root).checkpoints_dir(EXPERIMENT, KILLED_FOLD)
        return any(
            manifest.epoch == KILLED_EPOCH and not manifest.complete and manifest.step >= KILLED_AFTER_STEP
            for manifest in Commits(in_folder(folder), Identity(experiment=EXPERIMENT, fold=KILLED_FOLD)).manifests()
        )

    def _command(self, arguments: tuple[str, ...]) -> list[str]:
        sys.stdout.flush()
        return [sys.executable, "-m", "mbqueue", "--project", str(self.root), *arguments]


def _comparison(killed: Path, straight: Path) -> Iterator[tuple[str, bool]]:
    from mbqueue.results.tables import TIMING_COLUMNS, history_file, model_file, predictions_file, read_history

    for name in (model_file, predictions_file):
        first, second = name(killed, KILLED_FOLD), name(straight, KILLED_FOLD)
        yield first.name, first.read_bytes() == second.read_bytes()
    rows = [
        [{key: value for key, value in row.items() if key not in TIMING_COLUMNS} for row in read_history(path)]
        for path in (history_file(killed, KILLED_FOLD), history_file(straight, KILLED_FOLD))
    ]
    yield f"{history_file(killed, KILLED_FOLD).name} (except {', '.join(TIMING_COLUMNS)})", rows[0] == rows[1]


@contextlib.contextmanager
def _folder(given: Path | None) -> Iterator[Path]:
    if given is not None:
        if given.exists() and any(given.iterdir()):
            raise DemoFailed(f"{given} is not empty. Give a new folder with --dir.")
        given.mkdir(parents=True, exist_ok=True)
        yield given.absolute()
        return
    root = Path(tempfile.mkdtemp(prefix="mbqueue-demo-"))
    try:
        yield root
    finally:
        shutil.rmtree(root, ignore_errors=True)


def _title(text: str) -> None:
    width = min(shutil.get_terminal_size().columns, 100)
    print_line()
    print_line(f"── {text} ".ljust(width, "─"))
    sys.stdout.flush()
