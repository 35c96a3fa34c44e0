"""Blends of recorded experiments: small head finetunes on some crystals of the sample."""

from __future__ import annotations

import gzip
import json
import shutil
from collections.abc import Iterator
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from processes import run
from small_project import RememberedReport, make_project, make_split_project

from mbqueue import Project
from mbqueue.data.datasets import load
from mbqueue.data.folds import test_rows as fold_rows
from mbqueue.errors import ExperimentExists, MbqueueError, ResultsError, SpecError, UsageError
from mbqueue.experiment import parse_spec
from mbqueue.project import ProjectFolder
from mbqueue.queue.opening import open_queue
from mbqueue.results.tables import history_file, model_file, predictions_file, read_predictions
from mbqueue.results.weights import fitted_weights
from mbqueue.session.worker import Ending, WorkOptions, work
from mbqueue.train.rows import common_validation

CRYSTALS = "crystals.jsonl"
SMALL = {
    "dataset": CRYSTALS,
    "folds": [0, 1],
    "epochs": 2,
    "settings": {"train.batch_size": 16, "train.lr": 0.01, "train.validation": 0.4},
}


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def write_crystals(project: ProjectFolder, number: int = 60, name: str = CRYSTALS) -> None:
    with gzip.open(str(files("mbqueue.data") / "sample" / "flla_sample.jsonl.gz"), "rt") as stream:
        (project.root / name).write_text("".join(next(stream) for _ in range(number)), encoding="utf-8")


def finish(project: ProjectFolder) -> list[str]:
    report = RememberedReport()
    outcome = work(project, WorkOptions(device="cpu"), report=report)
    assert outcome.ending is Ending.DONE, report.lines
    return report.lines


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> ProjectFolder:
    """A project with two recorded seeds of an experiment on the same crystals; tests use copies of it."""
    project = make_project(tmp_path_factory.mktemp("recorded") / "project", checkpoint_minutes=5)
    write_crystals(project)
    Project(project.root).enqueue_seeds("head_finetune", [0, 1], name="head", **SMALL)
    finish(project)
    return project


@pytest.fixture
def project(recorded: ProjectFolder, tmp_path: Path) -> Project:
    shutil.copytree(recorded.root, tmp_path / "project")
    return Project(tmp_path / "project")


def names(project: Project) -> list[str]:
    with open_queue(project.folder, read_only=True) as queue:
        return [one.name for one in queue.experiments()]


def test_a_blend_predicts_the_mean_of_its_members_on_every_fold(project):
    project.blend(["head.seed0", "head.seed1"], name="both")
    finish(project.folder)
    members = [project.results(name) for name in ("head.seed0", "head.seed1")]
    both = project.results("both")
    assert both.folds == (0, 1)
    for fold in both.folds:
        first, second = (one.predictions[fold] for one in members)
        found = both.predictions[fold]
        assert list(found.ids) == list(first.ids)
        np.testing.assert_array_equal(found.y_true, first.y_true)
        np.testing.assert_allclose(found.y_pred, (first.y_pred + second.y_pred) / 2, rtol=0, atol=1e-15)
        entry = both.content["folds"][str(fold)]
        assert entry["blend"]["weights"] == {"head.seed0": 0.5, "head.seed1": 0.5}
        sha256 = members[0].content["run"]["files"][f"preds_fold_{fold}.csv"]["sha256"]
        assert entry["blend"]["made_from"]["head.seed0"] == sha256
        assert entry["scores"]["mae"] == pytest.approx(np.abs(found.y_pred - found.y_true).mean())


def test_a_blend_is_shown_reported_and_compared_as_any_other_experiment(project, tmp_path):
    told = run(project.folder.root, "blend", "head.seed0", "head.seed1", "--name", "both", "--json")
    assert json.loads(told.stdout)["members"] == ["head.seed0", "head.seed1"]
    again = run(project.folder.root, "blend", "head.seed0", "head.seed1", "--name", "both")
    assert "nothing was changed" in again.stdout
    lines = finish(project.folder)
    assert not any("reading" in line or "converting" in line for line in lines)
    assert "both" in run(project.folder.root, "status").stdout
    page = (project.results("both").folder / "RESULTS.md").read_text()
    assert "the weighted mean of the predictions of head.seed0 and head.seed1" in page
    assert "| 0 | 0.5000 | 0.5000 |" in page
    assert "head.seed0 and head.seed1" in project.report("both", output=tmp_path / "report.html")[0].read_text()
    assert len(project.compare(["both", "head.seed0"]).pairs) == 1
    assert len(project.predictions("both")) == 24
    with pytest.raises(ResultsError, match="is a blend, which has no model"):
        project.model("both", fold=0)


def test_a_blend_is_rebuilt_with_the_same_bytes_after_the_queue_is_lost(project):
    project.blend(["head.seed0", "head.seed1"], name="both")
    finish(project.folder)
    folder = project.results("both").folder
    before = [predictions_file(folder, fold).read_bytes() for fold in (0, 1)]
    assert history_file(folder, 0).exists()
    assert not model_file(folder, 0).exists()
    shutil.rmtree(folder)
    for path in project.folder.live_dir.glob("queue.db*"):
        path.unlink()
    project.recover()
    finish(project.folder)
    assert [predictions_file(project.results("both").folder, fold).read_bytes() for fold in (0, 1)] == before


def test_a_blend_waits_for_its_members_without_using_an_attempt(project, monkeypatch):
    project.blend(["head.seed0", "head.seed1"], name="both", priority=5)
    with open_queue(project.folder) as queue:
        queue.rewind("head.seed0", {0: "test"}, to_epoch=1, now=0.0)
    monkeypatch.setattr("mbqueue.session.worker.MEMBERS_SECONDS", 0.5)
    lines = finish(project.folder)
    assert any("both is made from head.seed0, which has not been recorded yet" in line for line in lines)
    with open_queue(project.folder, read_only=True) as queue:
        jobs = queue.jobs(experiment="both")
    assert [(job.state.value, job.failures, job.preemptions) for job in jobs] == [("committed", 0, 0)] * len(jobs)


def test_a_blend_whose_member_failed_fails_with_advice(project):
    project.blend(["head.seed0", "head.seed1"], name="both", priority=5)
    with open_queue(project.folder) as queue:
        queue.rewind("head.seed0", {0: "test"}, to_epoch=1, now=0.0)
    project.pause("head.seed0")
    report = RememberedReport()
    assert work(project.folder, WorkOptions(device="cpu"), report=report).ending is Ending.BLOCKED
    assert any("needs your attention" in line and "mbqueue retry both" in line for line in report.lines)


def test_a_blend_survives_backup_and_restore(project, tmp_path):
    project.blend(["head.seed0", "head.seed1"], name="both")
    finish(project.folder)
    project.back_up(tmp_path / "kept.tar")
    elsewhere = Project.create(tmp_path / "elsewhere")
    elsewhere.restore(tmp_path / "kept.tar")
    assert elsewhere.results("both").content["folds"] == project.results("both").content["folds"]


def test_a_blend_reaches_the_next_machine_through_the_drive(recorded, tmp_path):
    here = make_split_project(tmp_path)
    write_crystals(here)
    own = Project(here.root)
    own.folder = here
    with open_queue(recorded, read_only=True) as queue:
        specs = [one.spec for one in queue.experiments()]
    assert [spec["seed"] for spec in specs] == [0, 1]
    own.enqueue_seeds("head_finetune", [0, 1], name="head", **SMALL)
    finish(here)
    own.blend(["head.seed0", "head.seed1"], name="both")
    finish(here)
    shutil.rmtree(here.live_dir)
    there = Project(here.root)
    there.folder = here
    from mbqueue.clock import SystemClock
    from mbqueue.drive.reentry import enter

    enter(here, note=lambda _text: None, clock=SystemClock())
    assert there.status("both").overview["experiments"][0]["state"] == "done"
    assert there.results("both").folds == (0, 1)


def refused(project: Project, why: str, *members: str, error: type[MbqueueError] = UsageError, **options: Any) -> None:
    before = names(project)
    with pytest.raises(error, match=why):
        project.blend(list(members), **{"name": "both", **options})
    assert names(project) == before


def test_an_impossible_blend_is_refused_and_changes_nothing(project):
    refused(project, "at least two experiments", "head.seed0")
    refused(project, "head.seed0 is given twice", "head.seed0", "head.seed1", "head.seed0")
    refused(project, "There is no experiment other in the queue", "head.seed0", "other")
    refused(
        project,
        "already in the queue with a different spec",
        "head.seed0",
        "head.seed1",
        error=ExperimentExists,
        name="head.seed1",
    )
    refused(project, "is not a valid experiment", "head.seed0", "head.seed1", name="a/b")


def test_experiments_of_other_crystals_folds_or_targets_are_refused(project):
    write_crystals(project.folder, 40, "fewer.jsonl")
    given = {**SMALL, "epochs": 1}
    project.enqueue("head_finetune", name="fewer", **{**given, "dataset": "fewer.jsonl"})
    project.enqueue("head_finetune", name="one_fold", **{**given, "folds": [0]})
    target = {"target": {"name": "gap", "unit": "eV", "kind": "scalar", "column": "e_form"}}
    project.enqueue("head_finetune", name="gap", **{**given, "settings": {**SMALL["settings"], **target}})
    refused(project, "fewer has not been recorded yet", "head.seed0", "fewer", error=ResultsError)
    finish(project.folder)
    refused(project, "have different crystals or targets", "head.seed0", "fewer")
    refused(project, "has the folds 0, 1, and one_fold has the folds 0", "head.seed0", "one_fold")
    refused(project, r"predicts the formation energy \(eV/atom\), and gap predicts the gap \(eV\)", "head.seed0", "gap")


def test_damaged_results_are_refused_and_so_is_a_blend_of_a_blend(project):
    project.blend(["head.seed0", "head.seed1"], name="both")
    finish(project.folder)
    refused(project, "both is a blend, which has no models", "both", "head.seed0", name="more")
    path = predictions_file(project.results("head.seed1").folder, 1)
    path.write_bytes(path.read_bytes().replace(b"0", b"1", 1))
    refused(project, "differs from the recorded file", "head.seed0", "head.seed1", error=ResultsError, name="more")


def test_a_blend_fails_with_advice_if_a_member_was_damaged_since(project):
    project.blend(["head.seed0", "head.seed1"], name="both")
    path = predictions_file(project.results("head.seed1").folder, 1)
    whole = path.read_bytes()
    path.write_bytes(whole[:-9])
    report = RememberedReport()
    assert work(project.folder, WorkOptions(device="cpu"), report=report).ending is Ending.BLOCKED
    (told,) = [line for line in report.lines if "mbqueue retry head.seed1, mbqueue work, mbqueue retry both" in line]
    assert told.count("from a copy") == 1
    with pytest.raises(ResultsError, match=r"rebuild it from the checkpoints: mbqueue retry head\.seed1") as caught:
        project.results("head.seed1")
    assert str(caught.value).count("Restore it from a copy") == 1
    assert caught.value.__cause__ is None, "the command line would print the same again"
    for name in ("head.seed1", "both"):
        project.retry(name)
    finish(project.folder)
    assert path.read_bytes() == whole
    assert len(read_predictions(predictions_file(project.results("both").folder, 1))) == 12


# -- fitted weights ----------------------------------------------------------------------------------------------------

SHARED = {
    "dataset": CRYSTALS,
    "folds": [0],
    "epochs": 2,
    "settings": {**SMALL["settings"], "train.validation": 0.5, "train.validation_seed": 9},
}
MEMBERS = ("head.seed0", "head.seed1", "slow")


def with_fitted_blend(root: Path, *, spoil_test_targets: bool = False) -> Project:
    """A recorded project with three members that share their validation sets, and a blend with fitted weights."""
    folder = make_project(root, checkpoint_minutes=5)
    write_crystals(folder, 80)
    if spoil_test_targets:
        path = folder.root / CRYSTALS
        lines = path.read_text(encoding="utf-8").splitlines()
        for row in fold_rows(len(lines), 0):
            entry = json.loads(lines[row])
            assert isinstance(entry["e_form"], float)
            lines[row] = json.dumps({**entry, "e_form": 5.0 - entry["e_form"]})
        path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    project = Project(folder.root)
    project.enqueue_seeds("head_finetune", [0, 1], name="head", **SHARED)
    slow = {**SHARED["settings"], "train.lr": 1e-4, "seed": 5}
    project.enqueue("head_finetune", name="slow", **{**SHARED, "settings": slow})
    finish(folder)
    project.blend(MEMBERS, name="fitted", weights="fitted")
    finish(folder)
    return project


@pytest.fixture(scope="module")
def fitted(tmp_path_factory: pytest.TempPathFactory) -> Project:
    return with_fitted_blend(tmp_path_factory.mktemp("fitted") / "project")


def weights_of(project: Project) -> dict[str, float]:
    found: dict[str, float] = project.results("fitted").content["folds"]["0"]["blend"]["weights"]
    return found


def test_fitted_weights_minimise_the_error_on_the_validation_part(fitted):
    specs = [parse_spec(fitted.spec(name), source=name) for name in MEMBERS]
    crystals = load(CRYSTALS, project_root=fitted.folder.root).crystals
    rows = common_validation(crystals.targets, specs, 0)
    assert fitted.results("fitted").content["folds"]["0"]["blend"]["n_validation"] == len(rows) == 32
    assert set(rows).isdisjoint(fold_rows(80, 0))
    paths = [model_file(fitted.results(name).folder, 0) for name in MEMBERS]
    each = fitted.predict(CRYSTALS, paths, device="cpu").predictions.each[:, rows]
    weights = weights_of(fitted)
    best = np.abs(np.array([weights[name] for name in MEMBERS]) @ each - crystals.targets[rows]).mean()
    for others in np.random.default_rng(0).dirichlet(np.ones(3), 300):
        assert best <= np.abs(others @ each - crystals.targets[rows]).mean() + 1e-6


def test_weights_are_fitted_without_the_test_part(fitted, tmp_path):
    """Different targets in the test set must not change any bit of the members or the weights."""
    spoiled = with_fitted_blend(tmp_path / "spoiled", spoil_test_targets=True)
    ours, theirs = (one.results("fitted").predictions[0] for one in (fitted, spoiled))
    assert not np.array_equal(ours.y_true, theirs.y_true)
    np.testing.assert_array_equal(ours.y_pred, theirs.y_pred)
    assert weights_of(fitted) == weights_of(spoiled)
    each = {name: fitted.results(name).predictions[0].y_pred for name in MEMBERS}
    assert fitted_weights(each, theirs.y_true, is_class=False) != pytest.approx(weights_of(fitted), abs=1e-3)


def test_a_blend_of_fitted_weights_is_made_again_with_the_same_bytes(fitted, tmp_path):
    shutil.copytree(fitted.folder.root, tmp_path / "copy")
    copy = Project(tmp_path / "copy")
    path = predictions_file(copy.results("fitted").folder, 0)
    before = path.read_bytes()
    path.unlink()
    copy.retry("fitted")
    finish(copy.folder)
    assert path.read_bytes() == before


def test_too_few_shared_validation_crystals_are_refused(project):
    why = "In fold 0, the members' validation sets share 8 crystals"
    refused(project, why, "head.seed0", "head.seed1", error=ResultsError, weights="fitted")


# -- predictions under strains -----------------------------------------------------------------------------------------


def test_recorded_models_predict_again_under_strains(project):
    told = run(
        project.folder.root, "predict-again", "head.seed0", "--test-strains", "2", "--name", "strained", "--json"
    )
    assert json.loads(told.stdout)["members"] == ["head.seed0"]
    finish(project.folder)
    before, after = project.results("head.seed0"), project.results("strained")
    assert after.histories == before.histories
    for fold in (0, 1):
        path = model_file(after.folder, fold)
        assert path.read_bytes() == model_file(before.folder, fold).read_bytes()
        assert list(after.predictions[fold].ids) == list(before.predictions[fold].ids)
        assert not np.array_equal(after.predictions[fold].y_pred, before.predictions[fold].y_pred)
        whole = project.predict(CRYSTALS, [path], strains=2, device="cpu").predictions.mean
        np.testing.assert_allclose(after.predictions[fold].y_pred, whole[fold_rows(60, fold)], rtol=0, atol=1e-5)
    page = (after.folder / "RESULTS.md").read_text()
    assert "the models of head.seed0; each prediction is a mean over the crystal and 2 pairs of opposite small" in page
    project.blend(["head.seed1", "strained"], name="mixed")
    finish(project.folder)
    assert project.results("mixed").folds == (0, 1)


def test_an_impossible_predict_again_is_refused_and_changes_nothing(project):
    before = names(project)
    for name, strains, error, why in (
        ("head.seed0", 0, UsageError, "Without strains"),
        ("head.seed0", 101, SpecError, "test_strains = 101"),
        ("other", 2, UsageError, "There is no experiment other"),
    ):
        with pytest.raises(error, match=why):
            project.predict_again(name, test_strains=strains, name="strained")
    with pytest.raises(ExperimentExists, match=r"head.seed1 is already in the queue with a different spec"):
        project.predict_again("head.seed0", test_strains=2, name="head.seed1")
    assert names(project) == before


def test_a_blend_of_promoted_settings_marks_the_folds_that_chose_them(project):
    choice = {"search": "rates", "trial": 3, "trials": 12, "folds": [1]}
    chosen = {**project.spec("head.seed0"), "name": "best", "results_name": "", "chosen": choice}
    with open_queue(project.folder) as queue:
        queue.enqueue(parse_spec(chosen, source="test"), results_dir="results/daily/2026-01-01/best", now=0.0)
    finish(project.folder)
    project.predict_again("best", test_strains=1, name="strained")
    project.blend(["head.seed1", "best"], name="mixed")
    assert project.spec("strained")["chosen"] == project.spec("mixed")["chosen"] == choice
