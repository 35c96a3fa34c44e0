"""Real sessions run a search with the real model on a few crystals, from the command to the promoted best trial."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from processes import run
from small_project import RememberedReport, make_project

from mbqueue import Project
from mbqueue.clock import SystemClock
from mbqueue.errors import SearchUnavailable
from mbqueue.project import ProjectFolder
from mbqueue.queue import Queue
from mbqueue.results.tables import TIMING_COLUMNS, history_file, model_file, predictions_file, read_history
from mbqueue.session.options import WorkOptions
from mbqueue.session.worker import Ending, work

BASE = """
[data]
dataset = "sample"
limit = 40
[model]
trainable = "head"
[train]
epochs = 3
batch_size = 8
"""
SEARCH = """
[search]
base = "small"
trials = 4
sampler = "grid"
reduction = 2
[search.space]
"train.lr" = { choices = [1e-2, 1e-3, 1e-7, 1e-8] }
"""


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Any:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def searched(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ProjectFolder]:
    """A project whose search ran in two sessions, and a separate experiment with the best trial's settings."""
    project = make_project(tmp_path_factory.mktemp("searched"))
    (project.jobs_dir / "small.toml").write_text(BASE, encoding="utf-8")
    (project.jobs_dir / "rates.toml").write_text(SEARCH, encoding="utf-8")
    told = run(project.root, "enqueue", "rates")
    assert told.stdout == (
        "rates: its first trial is rates.000; sessions start the other trials. See: mbqueue status rates\n"
    )
    for options in (WorkOptions(device="cpu", max_jobs=4), WorkOptions(device="cpu")):
        report = RememberedReport()
        outcome = work(project, options, report=report)
    assert outcome.ending is Ending.DONE, report.lines
    return project


def trials(project: ProjectFolder) -> list[dict[str, Any]]:
    return [entry for entry in Project(project.root).status("rates").overview["experiments"] if entry["trial"]]


def test_every_trial_is_done_or_pruned_exactly_once(searched):
    found = trials(searched)
    assert sorted(entry["trial"]["settings"]["train.lr"] for entry in found) == [1e-8, 1e-7, 1e-3, 1e-2]
    assert {entry["state"] for entry in found} == {"done", "pruned"}
    (summary,) = Project(searched.root).status().overview["searches"]
    assert summary["state"] == "done"
    assert summary["best"]["settings"]["train.lr"] in {1e-3, 1e-2}
    assert summary["epochs_saved"] == 12 - summary["epochs_done"] > 0


def test_a_pruned_trial_has_no_predictions_and_its_events_say_why(searched):
    pruned = next(entry for entry in trials(searched) if entry["state"] == "pruned")
    assert not predictions_file(searched.root / pruned["results_dir"], 0).exists()
    assert "pruned: halving ends it after epoch" in run(searched.root, "events", pruned["name"]).stdout


def test_a_finished_trial_is_byte_for_byte_a_separate_experiment(searched):
    done = next(entry for entry in trials(searched) if entry["state"] == "done")
    found = Project(searched.root)
    alone = found.enqueue("small", folds=[0], settings=done["trial"]["settings"], name="alone").experiment
    work(searched, WorkOptions(device="cpu"), report=RememberedReport())
    ours, theirs = searched.root / done["results_dir"], searched.root / alone.results_dir
    for file in (model_file, predictions_file):
        assert file(ours, 0).read_bytes() == file(theirs, 0).read_bytes()
    rows = [[{k: v for k, v in row.items() if k not in TIMING_COLUMNS} for row in read_history(history_file(one, 0))]
            for one in (ours, theirs)]  # fmt: skip
    assert rows[0] == rows[1]


def test_status_shows_a_search_as_one_row_that_opens(searched):
    closed, opened = run(searched.root, "status").stdout, run(searched.root, "status", "rates").stdout
    assert "rates  done  search: 4 of 4 trials" in closed
    assert "best validation MAE 0." in closed
    assert "train.lr=1e-08" not in closed
    for line in ("train.lr=1e-08", "train.lr=1e-07", "train.lr=0.01"):
        assert line in opened


def test_a_day_later_a_session_removes_only_the_checkpoints_of_pruned_trials(searched):
    class DayLater(SystemClock):
        def now(self) -> float:
            return super().now() + 24 * 3600 + 1

    found = trials(searched)
    pruned = {entry["name"] for entry in found if entry["state"] == "pruned"}
    there = {folder.parent.name for folder in searched.fold_dirs()}
    assert there > pruned > set()
    work(searched, WorkOptions(device="cpu"), report=RememberedReport(), clock=DayLater())
    assert {folder.parent.name for folder in searched.fold_dirs()} == there - pruned
    assert [entry["folds"] for entry in trials(searched)] == [entry["folds"] for entry in found]


def test_a_search_has_a_report_and_an_export(searched, tmp_path):
    told = run(searched.root, "report", "rates").stdout
    page = Path(told.strip())
    assert (page.name, page.parent.name, page.parent.parent.parent.name) == ("report.html", "rates", "daily")
    assert "plot-parallel-coordinates" in page.read_text(encoding="utf-8")
    told = run(searched.root, "export-study", "rates", "--output", str(tmp_path / "study.db")).stdout
    assert told == f"{tmp_path / 'study.db'}\n"
    again = run(searched.root, "export-study", "rates", "--output", str(tmp_path / "study.db"))
    assert (again.returncode, "already exists" in again.stderr) == (2, True)


def test_the_promoted_experiment_has_the_best_settings_and_says_so(searched):
    told = run(searched.root, "promote", "rates", "--name", "tuned")
    assert told.stdout.startswith("tuned: enqueued, 22 jobs. Results will be in ")
    assert told.stderr.startswith("Best of 4 trials of rates (trial ")
    assert "chosen by validation on fold 0" in " ".join(told.stderr.split())
    assert run(searched.root, "cancel", "tuned", "--yes").returncode == 0
    wrong = run(searched.root, "promote", "tuned")
    assert wrong.returncode == 2
    assert "tuned is not a search" in wrong.stderr


def test_a_pruned_trial_cannot_be_blended_and_the_error_says_what_to_do(searched):
    pruned = next(entry["name"] for entry in trials(searched) if entry["state"] == "pruned")
    done = next(entry["name"] for entry in trials(searched) if entry["state"] == "done")
    blend, again = ("blend", done, pruned, "--name=b"), ("predict-again", pruned, "--test-strains=1", "--name=s")
    for command in (blend, again):
        told = run(searched.root, *command)
        assert (told.returncode, f"{pruned} was pruned, so it has no results" in told.stderr) == (1, True)


def test_an_experiment_with_a_trials_name_is_reported_in_few_lines(searched):
    told = run(searched.root, "promote", "rates", "--name", "rates.000")
    assert (told.returncode, "already in the queue with a different spec" in told.stderr) == (2, True)
    assert len(told.stderr.splitlines()) <= 24
    assert max(map(len, told.stderr.splitlines())) < 250


def test_a_cancelled_search_shows_as_cancelled_and_resumes_after_retry(tmp_path):
    folder = make_project(tmp_path / "project")
    (folder.jobs_dir / "small.toml").write_text(BASE, encoding="utf-8")
    (folder.jobs_dir / "rates.toml").write_text(SEARCH, encoding="utf-8")
    project = Project(folder.root)
    project.enqueue("rates")

    def state() -> str:
        (summary,) = project.status().overview["searches"]
        return str(summary["state"])

    assert project.cancel("rates") == 6
    assert state() == "cancelled"
    assert project.retry("rates") == 6
    assert state() == "running"
    project.pause("rates")
    project.cancel("rates")
    project.retry("rates")
    assert state() == "paused"


def test_a_session_that_cannot_begin_the_next_trial_does_not_say_that_all_is_done(tmp_path, monkeypatch):
    folder = make_project(tmp_path / "project", checkpoint_minutes=5)
    (folder.jobs_dir / "small.toml").write_text(BASE.replace("epochs = 3", "epochs = 1"), encoding="utf-8")
    (folder.jobs_dir / "rates.toml").write_text(SEARCH, encoding="utf-8")
    Project(folder.root).enqueue("rates")

    def without_optuna(*_arguments: Any) -> Any:
        raise SearchUnavailable("Searches need Optuna")

    monkeypatch.setattr("mbqueue.search.steps.next_settings", without_optuna)
    report = RememberedReport()
    outcome = work(folder, WorkOptions(device="cpu"), report=report)
    assert outcome.ending is Ending.BLOCKED
    assert outcome.reason == "the remaining work needs your attention: a search cannot begin a trial"
    assert report.lines.count("note: mbqueue cannot start another trial: Searches need Optuna") == 1
    monkeypatch.undo()
    assert work(folder, WorkOptions(device="cpu", max_jobs=1), report=report).ending is Ending.STOPPED


def test_commands_that_control_experiments_accept_the_name_of_a_search(searched):
    with Queue(searched.queue_db, read_only=True) as queue:
        of_search = [one.name for one in queue.trials()]
        assert run(searched.root, "pause", "rates").returncode == 0
        assert all(queue.experiment(name).paused for name in of_search)
        assert run(searched.root, "priority", "rates", "5").returncode == 0
        assert {queue.experiment(name).priority for name in of_search} == {5}
        assert run(searched.root, "resume", "rates").returncode == 0
        assert not any(queue.experiment(name).paused for name in of_search)
    assert run(searched.root, "retry", "rates").stdout.startswith("rates: 0 jobs")


def test_recover_restores_the_search(searched, tmp_path):
    before = {entry["name"]: entry["trial"] for entry in trials(searched)}
    aside = Path(tmp_path / "queue.db")
    searched.queue_db.replace(aside)
    try:
        assert run(searched.root, "recover").returncode == 0
        assert {entry["name"]: entry["trial"] for entry in trials(searched)} == before
    finally:
        for left in searched.queue_db.parent.glob("queue.db*"):
            left.unlink()
        aside.replace(searched.queue_db)
