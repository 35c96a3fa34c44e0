"""No reader accepts the commits of a different fold or experiment."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from small_project import RememberedReport, enqueue, make_project, small_spec

from mbqueue.clock import SystemClock
from mbqueue.drive.archive import back_up, restore
from mbqueue.drive.notes import keep_note
from mbqueue.drive.recovery import recover
from mbqueue.errors import MbqueueError
from mbqueue.project import ProjectFolder, init_project
from mbqueue.queue.store import Queue
from mbqueue.results.tables import predictions_file
from mbqueue.session.options import WorkOptions
from mbqueue.session.worker import Ending, work

RESULTS = Path("results", "daily", "2026-01-01")
#: The checkpoint folders to swap: two folds of one experiment, or the same fold of two experiments.
PAIRS = {
    "two folds": (("head_finetune", 0), ("head_finetune", 1)),
    "two experiments": (("head_finetune", 0), ("other", 0)),
}


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Any:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two finished experiments that differ in their learning rate, one of them with two folds."""
    project = make_project(tmp_path_factory.mktemp("done"))
    other = project.jobs_dir / "other.toml"
    text = project.experiment_file("head_finetune").read_text()
    other.write_text(text.replace('name = "head_finetune"', 'name = "other"'))
    enqueue(project, small_spec(project, "head_finetune", folds=[0, 1], train__epochs=1))
    enqueue(project, small_spec(project, "other", folds=[0], train__epochs=1, train__lr=0.01, results_name="other"))
    assert work(project, WorkOptions(device="cpu"), report=RememberedReport()).ending is Ending.DONE
    with Queue(project.queue_db) as queue:
        for one in queue.experiments():
            keep_note(project, queue, one.name)
    return project.root


@pytest.fixture(params=PAIRS.values(), ids=PAIRS)
def exchanged(request: pytest.FixtureRequest, done: Path, tmp_path: Path) -> tuple[ProjectFolder, list[Path]]:
    """A copy of the project in which two folders of checkpoints are exchanged."""
    shutil.copytree(done, tmp_path / "project")
    project = init_project(tmp_path / "project")[0]
    first, second = (project.checkpoints_dir(*fold) for fold in request.param)
    first.rename(tmp_path / "aside")
    second.rename(first)
    (tmp_path / "aside").rename(second)
    return project, [first, second]


def predictions(root: Path) -> dict[str, bytes]:
    """The content of every fold's predictions file, by path."""
    return {
        str(path.relative_to(root / RESULTS)): path.read_bytes()
        for path in sorted((root / RESULTS).glob("*/preds_fold_*.csv"))
    }


def test_predict_never_uses_the_model_of_another_fold(exchanged: tuple[ProjectFolder, list[Path]], done: Path) -> None:
    project, folders = exchanged
    before = predictions(done)
    assert len(before) == 3
    with Queue(project.queue_db) as queue:
        for one in queue.experiments():
            folds = dict.fromkeys(one.spec["folds"], "its predictions are gone")
            queue.rewind(one.name, folds, to_epoch=1, now=1.0)
            for fold in folds:
                predictions_file(project.root / one.results_dir, fold).unlink()
    report = RememberedReport()
    assert work(project, WorkOptions(device="cpu"), report=report).ending is Ending.DONE, report.lines
    assert predictions(project.root) == before
    for folder in folders:
        assert list(folder.glob("*.json.damaged")), "what is another's is set aside"
    told = [line for line in report.lines if "was set aside" in line]
    assert len(told) >= 2, "one of each fold, and those of the middle of an epoch, where a slow machine left one"
    assert all("belongs to" in line for line in told)


def test_recover_ignores_commits_of_another_fold(exchanged: tuple[ProjectFolder, list[Path]]) -> None:
    project, folders = exchanged
    project.queue_db.unlink()
    notes: list[str] = []
    found = recover(project, force=False, note=notes.append, clock=SystemClock()).folds
    wrong = {(folder.parent.name, int(folder.name[-1])) for folder in folders}
    assert {(experiment, fold) for experiment, fold, epochs in found if epochs == 0} == wrong
    assert len(found) == 3
    assert sum("belongs to" in note for note in notes) >= 2, "of each fold, those of the middle of an epoch too"
    assert all(list(folder.glob("e*.json")) for folder in folders), "what is another's stays where it is"


def test_backup_refuses_commits_in_the_wrong_folder(exchanged: tuple[ProjectFolder, list[Path]]) -> None:
    project, _ = exchanged
    archive = project.root.parent / "kept.tar"
    with pytest.raises(MbqueueError, match="belongs to"):
        back_up(project, archive, clock=SystemClock())
    assert not archive.exists()


def test_restore_refuses_an_archive_with_commits_in_the_wrong_folder(
    exchanged: tuple[ProjectFolder, list[Path]], done: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Earlier versions created such archives, because they did not check which fold a commit belongs to."""
    project, _ = exchanged
    archive = project.root.parent / "kept.tar"
    monkeypatch.setattr("mbqueue.drive.archive._commits", _every_file)
    back_up(project, archive, clock=SystemClock())
    queue = project.queue_db.read_bytes()
    with pytest.raises(MbqueueError, match=r"belongs to .*Nothing was changed"):
        restore(project, archive, force=True, note=lambda _text: None, clock=SystemClock())
    assert project.queue_db.read_bytes() == queue


def _every_file(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.glob("e*"))}
