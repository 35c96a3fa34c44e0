"""Run one session in this process, on real crystals with the real pretrained model."""

from __future__ import annotations

import csv
import io
import json
import threading
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from small_project import ManualClock, RememberedReport, enqueue, make_project, small_spec

from mbqueue import topology
from mbqueue.data import datasets
from mbqueue.errors import QueueError, UsageError
from mbqueue.mounts import Mount
from mbqueue.project import ProjectFolder
from mbqueue.provenance import TrialOf
from mbqueue.queue.jobs import State
from mbqueue.queue.store import Queue
from mbqueue.results.tables import read_history, read_predictions
from mbqueue.search.file import Search, Setting
from mbqueue.session import fold_results, record
from mbqueue.session.options import WorkOptions
from mbqueue.session.stop import StopRequest
from mbqueue.session.worker import Ending, SessionOutcome, work
from mbqueue.session.working_set import WorkingSet
from mbqueue.storage.own_commits import OwnCommits
from mbqueue.train.fold import FoldRun


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Any:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[ProjectFolder, Path, SessionOutcome, list[str]]:
    """A small full finetune of one fold that one session has finished."""
    project = make_project(tmp_path_factory.mktemp("finished"))
    folder = enqueue(project, small_spec(project))
    report = RememberedReport()
    outcome = work(project, WorkOptions(device="cpu"), report=report)
    return project, folder, outcome, report.lines


def test_a_session_does_all_jobs_and_reports_that_nothing_is_left(
    finished: tuple[ProjectFolder, Path, SessionOutcome, list[str]],
) -> None:
    project, _, outcome, lines = finished
    assert outcome.ending is Ending.DONE, lines
    assert outcome.jobs_done == 5  # prepare, two epochs, predict, record
    with Queue(project.queue_db, read_only=True) as queue:
        assert {job.state for job in queue.jobs()} == {State.COMMITTED}
        (session,) = queue.sessions()
        assert session.end_reason == Ending.DONE.value


def test_the_results_folder_has_every_file(finished: tuple[ProjectFolder, Path, SessionOutcome, list[str]]) -> None:
    folder = finished[1]
    assert {path.name for path in folder.iterdir()} == {
        "history_fold_0.csv",
        "preds_fold_0.csv",
        "model_fold_0.pth",
        "results.json",
        "RESULTS.md",
    }


def test_the_history_has_one_row_per_epoch_with_the_documented_columns(
    finished: tuple[ProjectFolder, Path, SessionOutcome, list[str]],
) -> None:
    path = finished[1] / "history_fold_0.csv"
    header = path.read_text().splitlines()[0]
    assert header == (
        "epoch,train_loss,train_mae,val_loss,val_mae,lr,grad_norm,seconds,structures_per_second,session,device"
    )
    assert [row["epoch"] for row in read_history(path)] == [1, 2]


# CHGNet's own code causes this warning from torch.
@pytest.mark.filterwarnings("ignore:Converting a tensor with requires_grad:UserWarning")
def test_the_model_loads_with_chgnet_and_predicts_what_the_file_of_predictions_says(
    finished: tuple[ProjectFolder, Path, SessionOutcome, list[str]],
) -> None:
    from chgnet.model import CHGNet

    folder = finished[1]
    with redirect_stdout(io.StringIO()):
        model = CHGNet.from_file(str(folder / "model_fold_0.pth"))
    table = read_predictions(folder / "preds_fold_0.csv")
    crystals = datasets.load("sample", limit=40).crystals
    rows = [crystals.ids.index(crystal_id) for crystal_id in table.ids]
    model.graph_converter.set_isolated_atom_response("ignore")
    predicted = model.predict_structure([crystals.structure(row) for row in rows], task="e")
    np.testing.assert_allclose([p["e"] for p in predicted], table.y_pred, atol=1e-5)
    np.testing.assert_array_equal(crystals.targets[rows], table.y_true)


def test_the_test_part_follows_the_rule_of_matbench(
    finished: tuple[ProjectFolder, Path, SessionOutcome, list[str]],
) -> None:
    from sklearn.model_selection import KFold

    crystals = datasets.load("sample", limit=40).crystals
    first_test = next(iter(KFold(5, shuffle=True, random_state=18012019).split(np.arange(40))))[1]
    with (finished[1] / "preds_fold_0.csv").open() as stream:
        assert [row["id"] for row in csv.DictReader(stream)] == [crystals.ids[row] for row in first_test]


def test_results_json_says_what_was_done(finished: tuple[ProjectFolder, Path, SessionOutcome, list[str]]) -> None:
    project, folder, outcome, _ = finished
    content = json.loads((folder / "results.json").read_text())
    assert content["spec_hash"] == small_spec(project).hash
    assert content["dataset"]["n"] == 40
    assert content["run"]["sessions"][0]["id"] == outcome.session
    assert content["folds"]["0"]["scores"]["mae"] == pytest.approx(
        read_predictions(folder / "preds_fold_0.csv").abs_error.mean()
    )


@pytest.mark.parametrize("experiment", ["head_finetune", "pretrained_infer"])
def test_the_other_experiments_finish_too(tmp_path: Path, report: RememberedReport, experiment: str) -> None:
    project = make_project(tmp_path)
    folder = enqueue(project, small_spec(project, experiment))
    outcome = work(project, WorkOptions(device="cpu"), report=report)
    assert outcome.ending is Ending.DONE, report.lines
    epochs = 2 if experiment == "head_finetune" else 0
    assert len(read_history(folder / "history_fold_0.csv")) == epochs
    assert (folder / "results.json").exists()


def test_early_stopping_skips_the_remaining_epochs_visibly(tmp_path: Path, report: RememberedReport) -> None:
    project = make_project(tmp_path)
    # With this tiny learning rate, no later epoch is better than the first.
    spec = small_spec(project, "head_finetune", train__epochs=6, train__patience=1, train__lr=1e-30)
    enqueue(project, spec)
    assert work(project, WorkOptions(device="cpu"), report=report).ending is Ending.DONE
    with Queue(project.queue_db, read_only=True) as queue:
        states = [job.state for job in queue.jobs(fold=0) if job.epoch]
    assert states == [State.COMMITTED] * 2 + [State.SKIPPED] * 4


def test_a_session_that_is_asked_to_stop_saves_its_step_and_the_next_resumes(
    tmp_path: Path, report: RememberedReport
) -> None:
    project = make_project(tmp_path, checkpoint_minutes=60.0)
    enqueue(project, small_spec(project))
    stop = StopRequest()

    def stop_in_step_two(_job: object, what: str, done: int, _total: int) -> None:
        if (what, done) == ("step", 2):
            stop.request("SIGTERM")

    report.on_advanced = stop_in_step_two
    outcome = work(project, WorkOptions(device="cpu"), report=report, stop=stop)
    assert (outcome.ending, outcome.reason) == (Ending.STOPPED, "SIGTERM")
    with Queue(project.queue_db, read_only=True) as queue:
        (job,) = [job for job in queue.jobs(state=State.READY) if job.epoch == 1]
        assert job.progress is not None
        assert {**job.progress, "seconds": 0} == {"what": "step", "done": 2, "total": 4, "seconds": 0}
        assert job.progress["seconds"] > 0
        assert (job.preemptions, job.failures) == (1, 0)

    steps: list[int] = []
    report.on_advanced = lambda _job, what, done, _total: what == "step" and steps.append(done)
    assert work(project, WorkOptions(device="cpu"), report=report).ending is Ending.DONE
    assert steps == [3, 4, 1, 2, 3, 4]


def test_a_session_ends_before_its_deadline_with_the_work_saved(
    tmp_path: Path, report: RememberedReport, clock: ManualClock
) -> None:
    project = make_project(tmp_path, checkpoint_minutes=60.0, lease_seconds=10_000.0)
    enqueue(project, small_spec(project))
    # Each step advances the clock by 100 s, so three steps fit into 360 s and leave time to save.
    report.on_advanced = lambda _job, what, _done, _total: what == "step" and clock.advance(100.0)
    outcome = work(project, WorkOptions(device="cpu", session_seconds=360.0), report=report, clock=clock)
    assert outcome.ending is Ending.STOPPED
    assert "time is up" in outcome.reason
    with Queue(project.queue_db, read_only=True) as queue:
        (job,) = [job for job in queue.jobs(state=State.READY) if job.epoch == 1]
        assert job.progress is not None
        assert job.progress["done"] == 3


def test_a_job_that_fails_keeps_its_traceback_and_the_session_continues_with_other_work(
    tmp_path: Path, report: RememberedReport
) -> None:
    project = make_project(tmp_path)
    (tmp_path / "broken.jsonl").write_text('{"id": "a"}\n')
    enqueue(project, small_spec(project, name="broken", results_name="broken", data__dataset="broken.jsonl"))
    enqueue(project, small_spec(project, "pretrained_infer"))
    outcome = work(project, WorkOptions(device="cpu"), report=report)
    assert outcome.ending is Ending.BLOCKED
    assert outcome.reason == "the remaining work needs your attention: jobs failed"
    with Queue(project.queue_db, read_only=True) as queue:
        (failed,) = queue.jobs(state=State.FAILED)
        assert failed.experiment == "broken"
        assert failed.error is not None
        assert "Traceback" in failed.error
        assert "broken.jsonl" in failed.error
        assert {job.state for job in queue.jobs(experiment="pretrained_infer")} == {State.COMMITTED}


def test_a_session_whose_remaining_work_waits_names_only_the_true_reasons(
    tmp_path: Path, report: RememberedReport
) -> None:
    project = make_project(tmp_path)
    spec = small_spec(project, "pretrained_infer")
    name = spec.name
    enqueue(project, spec)
    with Queue(project.queue_db) as queue:
        queue.pause(name, now=0.0)
        outcome = work(project, WorkOptions(device="cpu"), report=report)
        assert outcome.ending is Ending.BLOCKED
        assert outcome.reason == "the remaining work needs your attention: jobs are paused"
        queue.resume(name, now=0.0)
        for fold in {job.fold for job in queue.jobs() if job.fold is not None}:
            queue.cancel(name, fold=fold, now=0.0)
    outcome = work(project, WorkOptions(device="cpu"), report=report)
    assert outcome.ending is Ending.BLOCKED
    assert outcome.reason == "the remaining work needs your attention: jobs depend on cancelled jobs"


def test_damaged_checkpoints_are_set_aside_and_their_epochs_trained_again(
    tmp_path: Path, report: RememberedReport
) -> None:
    project = make_project(tmp_path, checkpoint_minutes=60.0)
    folder = enqueue(project, small_spec(project))
    work(project, WorkOptions(device="cpu", max_jobs=3), report=report)  # run `prepare` and both epochs
    checkpoints = project.checkpoints_dir("full_finetune", 0)
    written = list(checkpoints.glob("*.pt"))
    assert len(written) == 2
    for path in written:
        path.write_bytes(path.read_bytes()[:-1])
    report.lines.clear()
    assert work(project, WorkOptions(device="cpu"), report=report).ending is Ending.DONE, report.lines
    assert any("queued again" in line for line in report.lines)
    assert len(list(checkpoints.glob("*.damaged"))) == 4
    assert [row["epoch"] for row in read_history(folder / "history_fold_0.csv")] == [1, 2]


def test_data_that_changed_since_prepare_is_refused(tmp_path: Path, report: RememberedReport) -> None:
    import gzip
    import shutil

    project = make_project(tmp_path)
    lines = gzip.decompress(datasets.SAMPLE_FILE.read_bytes()).splitlines(keepends=True)
    (tmp_path / "mine.jsonl").write_bytes(b"".join(lines[:30]))
    enqueue(project, small_spec(project, data__dataset="mine.jsonl", data__limit=0))
    work(project, WorkOptions(device="cpu", max_jobs=1), report=report)
    (tmp_path / "mine.jsonl").write_bytes(b"".join(lines[:31]))
    shutil.rmtree(project.cache_dir)
    work(
        project, WorkOptions(device="cpu", max_jobs=1, session_seconds=60), report=report, stop=_stop_at_failure(report)
    )
    assert any("has changed since this experiment was prepared" in line for line in report.lines), report.lines


@pytest.mark.parametrize(("fstype", "is_noted"), [("nfs4", True), ("ext4", False)])
def test_a_queue_file_on_a_network_mount_is_noted_at_the_start(
    tmp_path: Path, report: RememberedReport, monkeypatch: pytest.MonkeyPatch, fstype: str, is_noted: bool
) -> None:
    monkeypatch.setattr(topology, "mount_of", lambda path: Mount(point=path, fstype=fstype, source="x"))
    monkeypatch.setenv(topology.LIVE_VARIABLE, "state")
    project = make_project(tmp_path)
    enqueue(project, small_spec(project))
    work(project, WorkOptions(device="cpu", max_jobs=0), report=report)
    noted = [line for line in report.lines if "not safe on a network mount" in line]
    assert noted == [f"note: {project.topology.why_not_safe}"] * is_noted


@pytest.mark.parametrize(("share", "is_noted"), [(0.3, True), (0.4, False)])
def test_a_validation_set_of_fewer_than_ten_crystals_is_noted(
    tmp_path: Path, report: RememberedReport, share: float, is_noted: bool
) -> None:
    project = make_project(tmp_path)
    enqueue(project, small_spec(project, data__limit=31, train__validation=share))
    work(project, WorkOptions(device="cpu", max_jobs=1), report=report)
    found = [line for line in report.lines if "validation set" in line]
    assert [line.split(": a ")[1] for line in found] == [
        "validation set has only 7 crystals, so the choice of the best epoch depends on chance. Use more crystals, or "
        "raise train.validation (now 0.3)."
    ] * is_noted


@pytest.mark.parametrize(("key", "is_noted"), [("train.validation", True), ("train.lr", False)])
def test_a_later_trial_notes_a_small_validation_set_only_if_the_search_varies_its_size(
    tmp_path: Path, report: RememberedReport, key: str, is_noted: bool
) -> None:
    project = make_project(tmp_path)
    base = small_spec(project, data__limit=31, train__validation=0.3)
    space = {key: Setting(choices=[0.2, 0.3])}
    search = Search(name="hunt", base="base", base_spec=base.to_json(), space=space, trials=2)
    trial = TrialOf(search=search.to_json(), number=1, settings={key: 0.3})
    enqueue(project, base.model_copy(update={"name": "hunt.001", "trial": trial}))
    work(project, WorkOptions(device="cpu", max_jobs=1), report=report)
    assert any("validation set has only 7 crystals" in line for line in report.lines) is is_noted


def test_too_few_crystals_for_the_folds_fail_in_prepare(tmp_path: Path, report: RememberedReport) -> None:
    import gzip

    project = make_project(tmp_path)
    lines = gzip.decompress(datasets.SAMPLE_FILE.read_bytes()).splitlines(keepends=True)
    (tmp_path / "mine.jsonl").write_bytes(b"".join(lines[:4]))
    enqueue(project, small_spec(project, data__dataset="mine.jsonl", data__limit=0))
    options = WorkOptions(device="cpu", max_jobs=1, session_seconds=60)
    work(project, options, report=report, stop=_stop_at_failure(report))
    assert any("prepare: failed: 4 crystals cannot be split into 5 folds" in line for line in report.lines), (
        report.lines
    )


def _stop_at_failure(report: RememberedReport) -> StopRequest:
    """Return a request that stops the session when a job fails, so that the test does not wait for a retry."""
    stop = StopRequest()
    failed = report.job_failed

    def job_failed(*arguments: Any) -> None:
        failed(*arguments)
        stop.request("a job failed")

    report.job_failed = job_failed  # type: ignore[method-assign]
    return stop


def test_a_session_without_enqueued_jobs_says_so(tmp_path: Path, report: RememberedReport) -> None:
    with pytest.raises(UsageError, match="mbqueue enqueue"):
        work(make_project(tmp_path), WorkOptions(device="cpu"), report=report)


def test_a_missing_device_is_refused(
    finished: tuple[ProjectFolder, Path, SessionOutcome, list[str]], report: RememberedReport
) -> None:
    for name in ("cuda:77", "abacus"):
        with pytest.raises(UsageError, match="mbqueue doctor"):
            work(finished[0], WorkOptions(device=name), report=report)


def test_a_deleted_results_folder_is_rebuilt_from_the_checkpoints(tmp_path: Path, report: RememberedReport) -> None:
    import shutil

    project = make_project(tmp_path, checkpoint_minutes=60.0)
    folder = enqueue(project, small_spec(project, "head_finetune"))
    work(project, WorkOptions(device="cpu", max_jobs=4), report=report)  # all jobs except `record`
    predictions = (folder / "preds_fold_0.csv").read_bytes()
    shutil.rmtree(folder)
    assert work(project, WorkOptions(device="cpu"), report=report).ending is Ending.DONE, report.lines
    assert (folder / "preds_fold_0.csv").read_bytes() == predictions
    assert (folder / "results.json").exists()


def test_a_session_that_lost_its_lease_does_not_rebuild_missing_files(
    tmp_path: Path, report: RememberedReport, monkeypatch: pytest.MonkeyPatch
) -> None:
    project, look, calls = make_project(tmp_path), record.broken_folds, iter([True])
    folder = enqueue(project, small_spec(project, "pretrained_infer"))
    work(project, WorkOptions(device="cpu", max_jobs=2), report=report)  # all jobs except `record`
    (folder / "preds_fold_0.csv").unlink()

    def slow_look(*arguments: Any, **options: Any) -> dict[int, str]:
        found = look(*arguments, **options)
        if next(calls, False):
            assert 0 in found
            with Queue(project.queue_db) as queue:
                (slow,) = (row.id for row in queue.sessions() if row.ended_at is None)
                queue.end_session(slow, reason="was silent", now=queue.sessions()[-1].heartbeat_at, lost=True)
            assert work(project, WorkOptions(device="cpu"), report=report).ending is Ending.DONE, report.lines
        return found

    monkeypatch.setattr(record, "broken_folds", slow_look)
    with pytest.raises(QueueError, match="has ended"):
        work(project, WorkOptions(device="cpu"), report=report)
    with Queue(project.queue_db, read_only=True) as queue:
        assert {job.state for job in queue.jobs()} == {State.COMMITTED}


@pytest.mark.parametrize(
    ("jobs", "slow", "staging"),
    [
        pytest.param(1, (WorkingSet, "data_for"), (OwnCommits, "stage"), id="train"),
        pytest.param(2, (FoldRun, "predict_test"), (fold_results, "write_history"), id="predict"),
    ],
)
def test_a_session_that_lost_its_lease_removes_no_file_of_its_successor(
    tmp_path: Path,
    report: RememberedReport,
    monkeypatch: pytest.MonkeyPatch,
    jobs: int,
    slow: tuple[Any, str],
    staging: tuple[Any, str],
) -> None:
    project, act, stage = make_project(tmp_path, checkpoint_minutes=60.0), getattr(*slow), getattr(*staging)
    folder = enqueue(project, small_spec(project, "head_finetune", train__epochs=1))
    work(project, WorkOptions(device="cpu", max_jobs=jobs), report=report)
    is_staged, may_go_on = threading.Event(), threading.Event()
    successor: list[Future[SessionOutcome]] = []
    staged: set[Path] = set()

    def written() -> set[Path]:
        places = (project.checkpoints_dir("head_finetune", 0), folder)
        return {path for place in places for path in place.rglob("*") if path.is_file()}

    def slowly(*arguments: Any, **options: Any) -> Any:
        done = act(*arguments, **options)
        if not successor:
            with Queue(project.queue_db) as queue:
                for row in queue.sessions():
                    queue.end_session(row.id, reason="was silent", now=row.heartbeat_at, lost=True)
            before = written()
            successor.append(pool.submit(work, project, WorkOptions(device="cpu"), report=RememberedReport()))
            assert is_staged.wait(60)
            staged.update(written() - before)
        return done

    def halfway(*arguments: Any, **options: Any) -> Any:
        done = stage(*arguments, **options)
        is_staged.set()
        assert may_go_on.wait(60)
        return done

    monkeypatch.setattr(*slow, slowly)
    monkeypatch.setattr(*staging, halfway)
    with ThreadPoolExecutor(1) as pool:
        try:
            with pytest.raises(QueueError, match="has ended"):
                work(project, WorkOptions(device="cpu"), report=report)
            assert staged
            assert staged <= written()
        finally:
            may_go_on.set()
        assert successor[0].result().ending is Ending.DONE
    assert any("no longer holds" in line for line in report.lines)


def test_recording_reports_a_damaged_commit_and_leaves_it_in_place(tmp_path: Path, report: RememberedReport) -> None:
    project = make_project(tmp_path, checkpoint_minutes=60.0)
    enqueue(project, small_spec(project, "head_finetune"))
    work(project, WorkOptions(device="cpu", max_jobs=4), report=report)  # all jobs except `record`
    newest = max(project.state_dir.glob("checkpoints/*/fold_0/*.json"))
    newest.write_text("{}")
    assert work(project, WorkOptions(device="cpu"), report=report).ending is Ending.DONE, report.lines
    assert newest.read_text() == "{}"
    assert any(newest.stem in line for line in report.lines), report.lines
    with Queue(project.queue_db, read_only=True) as queue:
        assert any(newest.stem in event.why for event in queue.events(limit=50))
