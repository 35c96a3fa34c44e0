"""In unusual environments, mbqueue works, or an error says clearly what is missing."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from small_project import make_project

import mbqueue
from mbqueue import Project
from mbqueue.errors import ProjectNotFound
from mbqueue.experiment import DataSpec, load_spec
from mbqueue.project import find_project
from mbqueue.queue.jobs import Job, Kind
from mbqueue.results.tables import HISTORY_COLUMNS
from mbqueue.session.tensorboard import TensorBoardReport


def run(
    folder: Path, *arguments: str, remove: Path | None = None, **environment: str
) -> subprocess.CompletedProcess[str]:
    """Run a command in a working directory, and remove the folder ``remove`` just before the command starts."""
    gone = f"rmdir {remove};" if remove else ""
    return subprocess.run(
        ["/bin/sh", "-c", f'cd {folder}; {gone} exec {sys.executable} -m mbqueue "$@"', "sh", *arguments],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, **environment},
    )


@pytest.mark.parametrize("command", [("status",), ("--project", "here", "status"), ("init", "new")])
def test_a_missing_working_folder_is_reported(tmp_path: Path, command: tuple[str, ...]) -> None:
    (tmp_path / "gone").mkdir()
    said = run(tmp_path / "gone", *command, remove=tmp_path / "gone")
    assert said.returncode == 2, said.stderr
    assert "This shell's working directory no longer exists" in said.stderr
    assert "Traceback" not in said.stderr


def test_a_project_named_by_its_full_path_needs_no_working_folder(tmp_path: Path) -> None:
    project = make_project(tmp_path / "project")
    (tmp_path / "gone").mkdir()
    said = run(tmp_path / "gone", "--project", str(project.root), "doctor", remove=tmp_path / "gone")
    assert said.returncode == 0, said.stderr
    assert "device" in said.stdout, "PyTorch cannot be loaded from such a folder"
    assert f"Relative paths now start from {project.root}." in " ".join(said.stderr.split())


IN_PYTHON: dict[str, Callable[[Project], object]] = {
    "the nearest project": lambda _project: Project(),
    "a relative project": lambda _project: Project("here"),
    "a new project here": lambda _project: Project.create(),
    "a new relative project": lambda _project: Project.create("here"),
    "status": lambda _project: mbqueue.status(),
    "prepare": lambda project: project.prepare(DataSpec(dataset="sample")),
    "work": lambda project: project.work(),
    "predict": lambda project: project.predict("sample", ["model.pth"]),
    "model": lambda project: project.model("full_finetune", 0),
    "compare": lambda project: project.compare(["full_finetune"], html="page.html"),
    "report": lambda project: project.report("full_finetune", output="page.html"),
    "back_up": lambda project: project.back_up("all.tar"),
    "restore": lambda project: project.restore("all.tar"),
}


@pytest.mark.parametrize("name", IN_PYTHON)
def test_python_raises_the_same_message_for_a_missing_working_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    project = Project(make_project(tmp_path / "project").root)
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    with pytest.raises(
        ProjectNotFound, match=r"This shell's working directory no longer exists: .* Change to a folder that exists"
    ):
        IN_PYTHON[name](project)


def test_the_python_api_works_without_a_working_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_project(tmp_path / "project")
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    project = Project(tmp_path / "project")
    project.enqueue("full_finetune", dataset="sample")
    assert "full_finetune" in str(project.status())
    assert project.back_up(tmp_path / "all.tar").files > 0
    assert Project.create(tmp_path / "new").folder.root == tmp_path / "new"


def test_files_that_begin_with_a_byte_order_mark_are_read(tmp_path: Path) -> None:
    project = make_project(tmp_path / "project")
    for path in (project.root / "mbqueue.toml", project.jobs_dir / "full_finetune.toml"):
        path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    assert find_project(project.root).settings == find_project(make_project(tmp_path / "other").root).settings
    assert load_spec(project.jobs_dir / "full_finetune.toml").name == "full_finetune"


def test_a_terminal_that_cannot_show_a_character_gets_another(tmp_path: Path) -> None:
    project = Project(make_project(tmp_path / "project").root)
    project.enqueue("full_finetune", dataset="sample")
    narrow = {"PYTHONIOENCODING": "ascii", "LC_ALL": "C", "PYTHONUTF8": "0"}
    said = run(tmp_path, "--project", str(project.folder.root), "events", **narrow)
    assert (said.returncode, said.stderr) == (0, "")
    assert "new ? waiting" in said.stdout


def test_repeated_steps_replace_those_of_a_killed_session(tmp_path: Path) -> None:
    for first, loss in ((1, 1.0), (3, 2.0)):
        with TensorBoardReport(tmp_path) as report:
            for step in range(first, first + 5):
                report.advanced(training_job(1), "step", step, 10, {"loss": loss})
    assert written(tmp_path / "full" / "fold_0", "step/loss") == [
        (1, 1.0), (2, 1.0), (3, 2.0), (4, 2.0), (5, 2.0), (6, 2.0), (7, 2.0)
    ]  # fmt: skip


@pytest.mark.parametrize("is_one_session", [True, False])
def test_a_rewind_leaves_each_step_and_each_epoch_once_in_tensorboard(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_one_session: bool
) -> None:
    """Train epochs 1 to 3 (4 steps each), then repeat epochs 2 and 3 in the same session or in a second session."""
    # TensorBoard reads event files in the order of their names, which begin with the creation time in seconds.
    seconds = itertools.count(1_800_000_000)
    monkeypatch.setattr("tensorboard.summary.writer.event_file_writer.time.time", lambda: next(seconds))
    epochs = [(1, 1.0), (2, 1.0), (3, 1.0), (2, 2.0), (3, 2.0)]
    for part in [epochs] if is_one_session else [epochs[:3], epochs[3:]]:
        with TensorBoardReport(tmp_path) as report:
            for epoch, value in part:
                for step in range(1, 5):
                    report.advanced(training_job(epoch), "step", step, 4, {"loss": value})
                row = {**dict.fromkeys(HISTORY_COLUMNS, value), "epoch": epoch}
                report.epoch_finished(training_job(epoch), row, is_best=True)
    fold = tmp_path / "full" / "fold_0"
    assert written(fold / "epochs", "epoch/val_mae") == [(1, 1.0), (2, 2.0), (3, 2.0)]
    assert written(fold, "step/loss") == [(step, 1.0 if step <= 4 else 2.0) for step in range(1, 13)]


def training_job(epoch: int) -> Job:
    values = dict.fromkeys(Job.__dataclass_fields__)
    return Job(**{**values, "experiment": "full", "kind": Kind.TRAIN, "fold": 0, "epoch": epoch})


def written(folder: Path, name: str) -> list[tuple[int, float]]:
    """(step, value) of a scalar in TensorBoard."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    return [(event.step, event.value) for event in EventAccumulator(str(folder)).Reload().Scalars(name)]
