"""On both databases, each trial is started and judged exactly once, despite crashes and users' commands."""

from __future__ import annotations

import io
import multiprocessing
import random
import signal
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import recorded_search
from recorded_search import do_jobs, enqueue, make_search
from rich.console import Console

from mbqueue.dashboard.status import Dashboard
from mbqueue.experiment import parse_spec
from mbqueue.queue import Queue, State
from mbqueue.queue.opening import open_on_server
from mbqueue.search import steps
from mbqueue.search.file import Search
from mbqueue.search.promotion import promoted
from mbqueue.search.summary import summaries
from mbqueue.search.trials import Trial, TrialState, trials_of

NOW = 1_800_000_000.0


def now() -> float:
    return NOW


@pytest.fixture(scope="module", params=["postgresql", "sqlite"])
def make_address(request: pytest.FixtureRequest) -> Callable[[Path], str]:
    """A function that returns the URL of a new queue, or the path of one in a folder."""
    if request.param == "sqlite":
        return lambda folder: str(folder / "queue.db")
    server = request.getfixturevalue("postgres_server")
    return lambda _folder: str(server.url())


@pytest.fixture
def address(make_address: Callable[[Path], str], tmp_path: Path) -> str:
    """The path or URL of a queue for one test."""
    return make_address(tmp_path)


def opened(address: str) -> Queue:
    return open_on_server(address) if address.startswith("postgresql:") else Queue(Path(address))


@pytest.fixture
def open_at() -> Iterator[Callable[[str], Queue]]:
    with ExitStack() as stack:
        yield lambda address: stack.enter_context(opened(address))


@pytest.fixture
def queue(address: str, open_at: Callable[[str], Queue]) -> Queue:
    return open_at(address)


def start_session(queue: Queue) -> str:
    return queue.start_session(device="recorded", now=NOW, alive_seconds=3600)


def trials(queue: Queue, search: str = "hunt") -> list[Trial]:
    return trials_of(queue.overview(now=NOW), search)


def searched(queue: Queue, search: Search) -> list[Trial]:
    """Run a search in one session; return its trials."""
    enqueue(queue, search)
    session = start_session(queue)
    do_jobs(queue, session, now=now)
    queue.end_session(session, reason="done", now=NOW)
    return trials(queue)


@pytest.fixture(scope="module")
def finished(make_address: Callable[[Path], str], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Queue]:
    """A queue whose search is finished; tests must not change it."""
    with opened(make_address(tmp_path_factory.mktemp("finished"))) as queue:
        searched(queue, make_search())
        yield queue


def shown(found: list[Trial]) -> list[Any]:
    return [(trial.number, dict(trial.settings), trial.state, trial.epochs_done) for trial in found]


def test_one_session_finishes_a_search_and_ends_most_trials_early(finished):
    found = trials(finished)
    assert [trial.number for trial in found] == list(range(12))
    states = {trial.state for trial in found}
    assert states == {TrialState.DONE, TrialState.PRUNED}
    assert sum(trial.epochs_done for trial in found) < 12 * 8 / 2
    best = min(found, key=lambda trial: recorded_search.val_mae(trial.settings, 0, 8))
    assert best.state is TrialState.DONE


def test_a_sampler_that_suggests_refused_settings_does_not_end_the_search(queue):
    # The search space includes unfreeze_epochs = 4, which an experiment with 4 epochs rejects.
    assert len(searched(queue, make_search(epochs=4, reduction=2, trials=8))) == 8


def test_the_rest_of_a_pruned_trial_is_skipped_with_the_reason(finished):
    pruned = next(trial for trial in trials(finished) if trial.state is TrialState.PRUNED)
    jobs = finished.jobs(experiment=pruned.experiment)
    assert {job.state for job in jobs} == {State.COMMITTED, State.SKIPPED}
    skipped = [job for job in jobs if job.state is State.SKIPPED]
    assert {job.kind.value for job in skipped} == {"train", "predict", "record"}
    for job in skipped:
        assert job.changed_why.startswith(f"pruned: halving ends it after epoch {pruned.epochs_done} of fold 0 with")
    (entry,) = (entry for entry in finished.overview(now=NOW)["experiments"] if entry["name"] == pruned.experiment)
    assert (entry["state"], entry["folds"][0]["state"]) == ("pruned", "pruned")


def test_a_pruned_trial_that_is_retried_resumes_where_it_was_and_is_not_pruned_again(queue):
    found = searched(queue, make_search(trials=6))
    pruned = next(trial for trial in found if trial.state is TrialState.PRUNED)
    committed = queue.jobs(experiment=pruned.experiment, state=State.COMMITTED)
    assert queue.retry(pruned.experiment, now=NOW)
    do_jobs(queue, start_session(queue), now=now)
    again = trials(queue)[pruned.number]
    assert (again.state, again.epochs_done) == (TrialState.DONE, 8)
    now_committed = queue.jobs(experiment=pruned.experiment, state=State.COMMITTED)
    assert all(job in now_committed for job in committed)


def test_a_trial_runs_as_the_experiment_with_its_settings_would(finished):
    (trial, *_) = trials(finished)
    spec = parse_spec(finished.experiment(trial.experiment).spec, source="test")
    alone = parse_spec({**make_search().spec_with(trial.settings, name="alone").to_json(), "folds": [0]}, source="test")
    assert spec.hash == alone.hash


def test_two_sessions_open_two_trials_and_a_single_one_opens_one(queue):
    enqueue(queue, make_search())
    one, two = start_session(queue), start_session(queue)
    begun = [steps.begin_trials(queue, results_dir=str, now=NOW, by=by) for by in (one, two, one)]
    assert begun == [["hunt.001"], [], []]
    queue.end_session(two, reason="test", now=NOW)
    assert do_jobs(queue, one, now=now, jobs=1) == 1
    assert len(trials(queue)) == 2


def test_if_two_sessions_draw_the_next_trial_at_once_only_one_begins_it(queue, address, open_at, monkeypatch):
    enqueue(queue, make_search())
    one, two = start_session(queue), start_session(queue)
    drawn = steps.next_settings

    def meanwhile(search, known):
        """After the first session has read the queue, let the second enqueue a trial with different settings."""
        monkeypatch.setattr(steps, "next_settings", lambda search, known: {"train.lr": 1e-3})
        assert steps.begin_trials(open_at(address), results_dir=str, now=NOW, by=two) == ["hunt.001"]
        return drawn(search, known)

    monkeypatch.setattr(steps, "next_settings", meanwhile)
    assert steps.begin_trials(queue, results_dir=str, now=NOW, by=one) == []
    assert [trial.settings for trial in trials(queue)][1] == {"train.lr": 1e-3}


def test_a_worker_that_lost_its_lease_prunes_nothing(queue):
    from mbqueue.errors import LeaseLost

    enqueue(queue, make_search())
    session = start_session(queue)
    do_jobs(queue, session, now=now, jobs=1)
    lease = queue.claim(session, now=NOW, lease_seconds=60)
    queue.end_session(session, reason="silent", now=NOW)
    before = queue.jobs()
    with pytest.raises(LeaseLost):
        queue.commit(lease, result={"val_mae": 0.1}, skip_rest="pruned: test", now=NOW, prunes=True)
    assert queue.jobs() == before


def test_a_trial_of_several_folds_is_pruned_as_a_whole(queue):
    found = searched(queue, make_search(folds=[0, 1], trials=6))
    pruned = [trial for trial in found if trial.state is TrialState.PRUNED]
    assert pruned
    for trial in pruned:
        assert {job.state for job in queue.jobs(experiment=trial.experiment)} == {State.COMMITTED, State.SKIPPED}


def test_the_wilcoxon_pruner_saves_folds(queue):
    found = searched(queue, make_search(folds=[0, 1, 2, 3, 4], epochs=1, trials=4, pruner="wilcoxon", space={
        "train.lr": {"low": 1e-4, "high": 1e-2, "log": True}
    }))  # fmt: skip
    pruned = [trial for trial in found if trial.state is TrialState.PRUNED]
    assert pruned
    assert all(2 <= trial.epochs_done < 5 for trial in pruned)


def test_paused_and_cancelled_searches_begin_no_trial(queue):
    enqueue(queue, make_search())
    session = start_session(queue)
    do_jobs(queue, session, now=now, jobs=20)
    newest = trials(queue)[-1].experiment
    for stop, start in ((queue.pause, queue.resume), (queue.cancel, queue.retry)):
        stop(newest, now=NOW)
        n_trials = len(trials(queue))
        do_jobs(queue, session, now=now)
        assert len(trials(queue)) == n_trials
        start(newest, now=NOW)
    do_jobs(queue, session, now=now)
    assert len(trials(queue)) == 12


def test_a_search_whose_last_three_trials_failed_waits_for_the_user(queue):
    enqueue(queue, make_search())
    session = start_session(queue)
    for number in range(3):
        steps.begin_trials(queue, results_dir=str, now=NOW, by=session)
        lease = queue.claim(session, now=NOW, lease_seconds=60)
        assert lease.job.label == f"hunt.{number:03d} prepare"
        queue.fail(lease, error="boom", now=NOW, final=True)
    assert steps.begin_trials(queue, results_dir=str, now=NOW, by=session) == []
    queue.retry("hunt.002", now=NOW)
    do_jobs(queue, session, now=now)
    assert len(trials(queue)) == 12


def test_a_budget_of_gpu_hours_begins_no_trial_once_it_is_spent(queue):
    found = searched(queue, make_search(trials=0, gpu_hours=20 / 3600, pruner="none"))
    assert [trial.epochs_done for trial in found] == [8, 8, 8]  # each job counts as one second


def test_a_summary_of_a_budget_says_what_is_left_of_it(queue):
    enqueue(queue, make_search(trials=0, gpu_hours=20 / 3600, pruner="none"))
    session = start_session(queue)
    seen = []
    for jobs in (11, 22):  # each trial has 11 jobs and takes 8 seconds
        do_jobs(queue, session, now=now, jobs=jobs)
        (summary,) = summaries(queue.overview(now=NOW))
        seen.append((summary["state"], summary["seconds"], summary["seconds_left"]))
    assert seen == [("waiting", 8, 12), ("done", 24, 0)]


def test_all_trials_have_the_priority_of_the_newest_trial(queue):
    enqueue(queue, make_search(trials=2))
    queue.set_priority("hunt.000", 7, now=NOW)
    do_jobs(queue, start_session(queue), now=now)
    assert [trial.priority for trial in trials(queue)] == [7, 7]


def test_a_summary_adds_up_the_time_used_and_saved(finished):
    found = trials(finished)
    (summary,) = summaries(finished.overview(now=NOW))
    done = sum(trial.epochs_done for trial in found)
    best = min((trial for trial in found if trial.state is TrialState.DONE), key=lambda trial: trial.value)
    assert (summary["name"], summary["state"], summary["trials_wanted"]) == ("hunt", "done", 12)
    assert summary["trials"] == {"open": 0, "done": 12 - summary["trials"]["pruned"], **{"pruned": sum(
        trial.state is TrialState.PRUNED for trial in found)}, "failed": 0, "cancelled": 0}  # fmt: skip
    assert summary["best"] == {
        "trial": best.number, "experiment": best.experiment, "val_mae": best.value, "settings": best.settings,
    }  # fmt: skip
    assert (summary["epochs_done"], summary["epochs_saved"]) == (done, 12 * 8 - done)
    assert (summary["seconds"], summary["seconds_saved"], summary["seconds_left"]) == (done, 96 - done, 0)


def test_a_search_estimates_its_time_left_from_its_first_epoch_until_it_is_cancelled(queue):
    def left() -> float | None:
        (summary,) = summaries(queue.overview(now=NOW))
        found: float | None = summary["seconds_left"]
        return found

    enqueue(queue, make_search(pruner="none"))
    session = start_session(queue)
    assert left() is None
    do_jobs(queue, session, now=now, jobs=2)
    assert left() == 12 * 8 - 1
    queue.cancel("hunt.000", now=NOW)
    assert left() == 0


def test_the_best_settings_become_an_experiment_on_all_folds_that_says_how_it_was_chosen(queue):
    found = searched(queue, make_search())
    best = min((trial for trial in found if trial.state is TrialState.DONE), key=lambda trial: trial.value)
    spec = promoted(queue, "hunt", name="tuned", now=NOW)
    assert (spec.name, spec.folds, spec.trial) == ("tuned", (0, 1, 2, 3, 4), None)
    assert spec.train.lr == best.settings["train.lr"]
    assert f"(trial {best.number}), chosen by validation on fold 0" in spec.description
    assert spec.to_json()["chosen"] == {"search": "hunt", "trial": best.number, "trials": 12, "folds": [0]}
    queue.enqueue(spec, results_dir="results/tuned", now=NOW)
    overview = {**queue.overview(now=NOW), "searches": []}
    assert overview["experiments"][-1]["chosen"]["folds"] == [0]
    console = Console(width=100, file=io.StringIO())
    shown = {**overview, "experiments": overview["experiments"][-1:]}
    with console.capture() as captured:
        console.print(Dashboard(overview=shown, session_seconds=60.0))
    assert [line[:4].strip() for line in captured.get().splitlines() if line[:1].isdigit()] == [
        "0 †",
        "1",
        "2",
        "3",
        "4",
    ]
    assert "† fold on which the search hunt chose these settings (best of 12 trials)" in captured.get()


def test_trials_of_a_rebuilt_queue_are_pruned_again(queue):
    found = searched(queue, make_search())
    pruned = [trial for trial in found if trial.state is TrialState.PRUNED]
    # Bring the queue into the state that `recover` leaves: epochs are committed, but none is skipped.
    for trial in pruned:
        queue.rewind(trial.experiment, {0: "test"}, to_epoch=trial.epochs_done, now=NOW)
    kept = pruned[0].experiment
    session = start_session(queue)
    lease = next(lease for lease in iter(lambda: queue.claim(session, now=NOW, lease_seconds=60), None)
                 if lease.job.experiment == kept)  # fmt: skip
    again = steps.judge_again(queue, now=NOW, by="recover")
    assert kept not in again, "a trial is pruned under the hands of who works on it"
    queue.end_session(session, reason="test", now=NOW)
    again += steps.judge_again(queue, now=NOW, by="recover")
    # The search now has more results than when it pruned the trials, so a few trials would no longer be pruned.
    assert set(again) <= {trial.experiment for trial in pruned}
    assert len(again) > len(pruned) / 2
    assert lease.job.epoch == pruned[0].epochs_done + 1
    for before, after in zip(found, trials(queue), strict=True):
        assert before.experiment not in again or (before.state, before.curves) == (after.state, after.curves)


# -- deaths --


def start(address: str) -> Any:
    """Fork a worker process, which shares the imports of this one."""
    worker = multiprocessing.get_context("fork").Process(target=recorded_search.main, args=(address,))
    worker.start()
    return worker


def committed_once(queue: Queue) -> None:
    """Check that every epoch was committed once and in order."""
    events = [event for event in queue.events(limit=100_000) if event.to_state == "committed" and event.epoch]
    seen = [(event.experiment, event.epoch) for event in events]
    assert len(seen) == len(set(seen))
    for experiment, epoch in seen:
        assert epoch == 1 or seen.index((experiment, epoch - 1)) < seen.index((experiment, epoch))


def test_a_search_killed_at_20_random_moments_ends_as_an_uninterrupted_one(queue, address, open_at, tmp_path):
    undisturbed = searched(open_at(str(tmp_path / "undisturbed.db")), make_search())
    enqueue(queue, make_search())
    chance = random.Random(5)
    deaths = 0
    # Also count the trials, because no job is open between the end of a trial and the next session.
    while not queue.outlook(now=NOW).is_exhausted or len(queue.trials()) < 12:
        worker = start(address)
        if deaths < 20:
            worker.join(chance.uniform(0.02, 0.15))
            worker.kill()
        worker.join(120)
        deaths += worker.exitcode == -signal.SIGKILL
    assert deaths == 20, "it was over too soon"
    assert shown(trials(queue)) == shown(undisturbed)
    committed_once(queue)


def test_two_concurrent_workers_lose_no_trial_and_begin_none_twice(queue, address):
    enqueue(queue, make_search(sampler="qmc", pruner="none"))
    workers = [start(address) for _ in range(2)]
    for worker in workers:
        worker.join(120)
    assert [worker.exitcode for worker in workers] == [0, 0]
    found = trials(queue)
    assert [trial.number for trial in found] == list(range(12))
    assert {trial.state for trial in found} == {TrialState.DONE}
    assert len({str(sorted(trial.settings.items())) for trial in found}) == 12
    committed_once(queue)


# -- checkpoints of pruned trials --


def pruned_trial(queue: Queue) -> Trial:
    return next(
        trial for trial in searched(queue, make_search(folds=[0, 1], trials=6)) if trial.state is TrialState.PRUNED
    )


def released(queue: Queue, *, seconds: float) -> list[str]:
    """Return the trials that lose their checkpoints ``seconds`` after the last pruning, after an hour's delay."""
    # If the queue is on a server, `changed_at` comes from the server's clock.
    last = max(job.changed_at for job in queue.jobs(state=State.SKIPPED))
    return steps.release_pruned(queue, after_seconds=3600.0, now=last + seconds, by="test")


def test_checkpoints_of_pruned_trials_are_removed_after_a_while(queue):
    found = searched(queue, make_search(trials=6))
    pruned = {trial.experiment for trial in found if trial.state is TrialState.PRUNED}
    assert pruned
    assert released(queue, seconds=0.0) == []
    before = shown(trials(queue))
    assert set(released(queue, seconds=3600.0)) == pruned
    assert released(queue, seconds=9999.0) == []
    assert {one.name for one in queue.trials() if one.is_released} == pruned
    assert shown(trials(queue)) == before, "its search still knows what it reached"


def test_a_trial_that_was_retried_keeps_its_checkpoints(queue):
    trial = pruned_trial(queue)
    queue.retry(trial.experiment, now=NOW)
    assert trial.experiment not in released(queue, seconds=3600.0)
    assert not queue.discard_checkpoints(trial.experiment, now=NOW)


def test_a_trial_whose_checkpoints_are_gone_is_retried_from_the_beginning(queue):
    trial = pruned_trial(queue)
    released(queue, seconds=3600.0)
    assert queue.retry(trial.experiment, now=NOW)
    again = trials(queue)[trial.number]
    assert (again.state, again.epochs_done, again.settings) == (TrialState.OPEN, 0, trial.settings)
    assert not queue.experiment(trial.experiment).is_released
    do_jobs(queue, start_session(queue), now=now)
    again = trials(queue)[trial.number]
    assert (again.state, again.epochs_done) == (TrialState.DONE, 16)
    assert released(queue, seconds=9999.0) == []
