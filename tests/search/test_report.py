"""The report of a search and its export for optuna-dashboard have the same trials as the queue."""

from __future__ import annotations

import re
from pathlib import Path

import optuna
import pytest
from recorded_search import do_jobs, enqueue, make_search

from mbqueue import Project
from mbqueue.errors import UsageError
from mbqueue.project import ProjectFolder
from mbqueue.queue.opening import open_queue
from mbqueue.search.export import importances
from mbqueue.search.figures import draw
from mbqueue.search.file import Search
from mbqueue.search.trials import Trial, TrialState, trials_of
from mbqueue.task import target_of

NOW = 1_800_000_000.0


@pytest.fixture
def searched(project: ProjectFolder):
    """A function that runs ``jobs`` jobs of a search in the project's queue, and returns the search's trials."""

    def searched(search: Search, jobs: int | None = None) -> list[Trial]:
        with open_queue(project) as queue:
            enqueue(queue, search)
            session = queue.start_session(device="recorded", now=NOW, alive_seconds=3600)
            do_jobs(queue, session, now=lambda: NOW, jobs=jobs)
            return trials_of(queue.overview(now=NOW), search.name)

    return searched


def plots(page: Path) -> list[str]:
    return re.findall(r'<div id="plot-([a-z-]+)"', page.read_text(encoding="utf-8"))


@pytest.mark.parametrize("jobs", [1, 30, None])
def test_the_report_shows_every_trial_of_a_finished_or_unfinished_search(project, searched, jobs):
    trials = searched(make_search(folds=[0, 1]), jobs)
    (page,) = Project(project.root).report("hunt")
    text = page.read_text(encoding="utf-8")
    assert page.parent.name == "hunt"
    assert f"{len(trials)} of 12 trials" in text
    table = text[text.index("<h2>Trials, best first") :]
    assert [int(n) for n in sorted(re.findall(r"<tr><td>(\d+)</td>", table), key=int)] == [t.number for t in trials]
    every = ["history", "parallel-coordinates", "importance", "learning-curves"]
    assert plots(page) == ([] if jobs == 1 else every)
    assert "enqueues these settings on all folds" in text or not any(trial.is_trained for trial in trials)
    assert not re.search(r"<(script|link|img)[^>]+(src|href)=", text), "it would load something"
    page.write_text("<html>mine</html>")
    with pytest.raises(UsageError, match="--force"):
        Project(project.root).report("hunt")


def test_the_figures_show_the_data_of_the_queue(searched):
    search = make_search()
    trials = searched(search)
    figures = draw(search, trials, {}, target_of(search.base_spec))
    curves = {trace.name: trace for trace in figures["learning-curves"].data}
    drawn = [value for trace in curves.values() for value in trace.y if value is not None]
    assert sorted(drawn) == sorted(value for trial in trials for value in trial.curves[0])
    pruned = [value for trial in trials if trial.state is TrialState.PRUNED for value in trial.curves[0]]
    assert [value for value in curves["pruned"].y if value is not None] == pruned
    assert curves["pruned"].line.width < curves["best"].line.width
    best = next(trace for trace in figures["history"].data if trace.name == "best so far")
    assert list(best.y) == sorted(best.y, reverse=True)
    assert best.y[-1] == min(trial.value for trial in trials if trial.is_trained)
    columns = {
        dimension.label: list(dimension["values"]) for dimension in figures["parallel-coordinates"].data[0].dimensions
    }
    assert columns["validation MAE (eV/atom)"] == [trial.value for trial in trials]
    sizes = [trial.settings["train.batch_size"] for trial in trials]
    assert columns["train.batch_size"] == [[16, 32, 64].index(size) for size in sizes]


def test_the_decisive_setting_is_the_most_important_one(searched):
    search = make_search(sampler="random", pruner="none", trials=20, epochs=1)
    shares = importances(search, searched(search))
    assert max(shares, key=shares.__getitem__) == "train.lr"
    assert sum(shares.values()) == pytest.approx(1)
    assert "train.ema_decay" not in shares, "only some trials vary it"


@pytest.mark.parametrize(("folds", "jobs"), [([0], None), ([0, 1], 40)])
def test_the_exported_study_has_the_trials_of_the_queue(project, searched, tmp_path, folds, jobs):
    trials = searched(make_search(folds=folds), jobs)
    path = Project(project.root).export_study("hunt", tmp_path)
    assert path == tmp_path / "study.db"
    study = optuna.load_study(study_name="hunt", storage=f"sqlite:///{path}")
    states = {TrialState.OPEN: "RUNNING", TrialState.DONE: "COMPLETE", TrialState.PRUNED: "PRUNED"}
    assert len(study.trials) == len(trials)
    for ours, theirs in zip(trials, study.trials, strict=True):
        assert (theirs.number, theirs.params, theirs.state.name) == (ours.number, ours.settings, states[ours.state])
        assert theirs.value == (None if ours.state is TrialState.OPEN else ours.value)
        assert list(theirs.intermediate_values) == list(range(1, len(ours.mean_curve) + 1))
        assert list(theirs.intermediate_values.values()) == ours.mean_curve
        assert theirs.user_attrs["experiment"] == ours.experiment
        for fold, curve in ours.curves.items():
            assert theirs.user_attrs.get(f"val_mae_fold_{fold}", []) == curve
    ended = [trial for trial in trials if trial.state is TrialState.DONE]
    assert study.best_trial.number == min(ended, key=lambda trial: trial.value).number


def test_an_export_replaces_files_only_with_force_and_only_accepts_searches(project, searched, tmp_path):
    searched(make_search(), 1)
    found = Project(project.root)
    path = found.export_study("hunt", tmp_path / "s.db")
    with pytest.raises(UsageError, match=r"s\.db already exists.*--force"):
        found.export_study("hunt", path)
    assert found.export_study("hunt", path, force=True) == path
    with pytest.raises(UsageError, match="this command reads it"):
        found.export_study("hunt", project.queue_db, force=True)
    with pytest.raises(UsageError, match=r"hunt\.000 is not a search"):
        found.export_study("hunt.000", tmp_path / "t.db")
    assert not (tmp_path / "t.db").exists()
