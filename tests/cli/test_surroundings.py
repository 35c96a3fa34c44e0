"""Surroundings that are unlike those of a developer: each gets a clear sentence, or works."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from small_project import make_project

from mbqueue.experiment import load_spec
from mbqueue.project import find_project
from mbqueue.session.tensorboard import TensorBoardReport


def run(
    folder: Path, *arguments: str, remove: Path | None = None, **environment: str
) -> subprocess.CompletedProcess[str]:
    """A command in a working folder that is removed before it begins."""
    gone = f"rmdir {remove};" if remove else ""
    return subprocess.run(
        ["/bin/sh", "-c", f'cd {folder}; {gone} exec {sys.executable} -m mbqueue "$@"', "sh", *arguments],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, **environment},
    )


@pytest.mark.parametrize("options", [(), ("--project", "here")])
def test_a_working_folder_that_is_gone_is_said_to_be(tmp_path: Path, options: tuple[str, ...]) -> None:
    (tmp_path / "gone").mkdir()
    said = run(tmp_path / "gone", *options, "status", remove=tmp_path / "gone")
    assert said.returncode == 2, said.stderr
    assert "The working folder of this shell is gone" in said.stderr
    assert "Traceback" not in said.stderr


def test_a_project_named_by_its_full_path_needs_no_working_folder(tmp_path: Path) -> None:
    project = make_project(tmp_path / "project")
    (tmp_path / "gone").mkdir()
    said = run(tmp_path / "gone", "--project", str(project.root), "status", remove=tmp_path / "gone")
    assert "Nothing is enqueued" in said.stderr + said.stdout or "mbqueue enqueue" in said.stderr, said.stderr
    assert "Traceback" not in said.stderr


def test_files_that_begin_with_a_byte_order_mark_are_read(tmp_path: Path) -> None:
    project = make_project(tmp_path / "project")
    for path in (project.root / "mbqueue.toml", project.jobs_dir / "full_finetune.toml"):
        path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    assert find_project(project.root).settings == find_project(make_project(tmp_path / "other").root).settings
    assert load_spec(project.jobs_dir / "full_finetune.toml").name == "full_finetune"


def test_a_terminal_that_cannot_show_a_character_gets_another(tmp_path: Path) -> None:
    project = make_project(tmp_path / "project")
    narrow = {"PYTHONIOENCODING": "ascii", "LC_ALL": "C", "PYTHONUTF8": "0"}
    said = run(tmp_path, "--project", str(project.root), "doctor", **narrow)
    assert "Traceback" not in said.stderr
    assert "codec" not in said.stderr + said.stdout
    assert "?" in said.stdout + said.stderr


def test_steps_that_are_done_again_replace_those_that_a_killed_session_wrote(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    from mbqueue.queue.jobs import Job, Kind

    values = dict.fromkeys(Job.__dataclass_fields__)
    job = Job(**{**values, "experiment": "full", "kind": Kind.TRAIN, "fold": 0, "epoch": 1})
    for first, loss in ((1, 1.0), (3, 2.0)):
        with TensorBoardReport(tmp_path) as report:
            for step in range(first, first + 5):
                report.advanced(job, "step", step, 10, {"loss": loss})
    events = EventAccumulator(str(tmp_path / "full" / "fold_0")).Reload()
    assert [(event.step, event.value) for event in events.Scalars("step/loss")] == [
        (1, 1.0), (2, 1.0), (3, 2.0), (4, 2.0), (5, 2.0), (6, 2.0), (7, 2.0)
    ]  # fmt: skip
