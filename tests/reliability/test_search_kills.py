"""Kill the sessions of a search at random moments, alone or two at once, on both databases."""

from __future__ import annotations

import random
import signal
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from postgres_server import PostgresServer
from processes import outcome
from warm import Warm

from mbqueue.project import find_project
from mbqueue.queue.jobs import State
from mbqueue.queue.opening import open_queue
from mbqueue.search.trials import Trial, TrialState, trials_of

from .conftest import LONG, SEED, SETTINGS, WORK, Lab, tell

TRIALS, EPOCHS, DEATHS = (12, 8, 20) if LONG else (4, 3, 3)
#: Cases to test: the database and the number of concurrent sessions.
WAYS = [("sqlite", 1), ("postgresql", 2)]
if LONG:
    WAYS += [("sqlite", 2), ("postgresql", 1)]
BASE = f"""
[data]
dataset = "sample"
limit = 24
[model]
trainable = "head"
[train]
epochs = {EPOCHS}
batch_size = 8
"""
SEARCH = f"""
[search]
base = "small"
trials = {TRIALS}
reduction = 2
SAMPLER
[search.space]
"train.lr" = {{ low = 1e-5, high = 1e-2, log = true }}
"train.batch_size" = {{ choices = [4, 8] }}
"train.ema_decay" = {{ choices = [0.0, 0.9], when = {{ "train.batch_size" = [8] }} }}
"""
#: `tpe` chooses settings based on earlier results. `random` uses only the seed and the trial's number, so two workers
#: try the same settings as one worker would.
TPE, RANDOM = 'sampler = "tpe"', 'sampler = "random"'


@dataclass(frozen=True)
class Searched:
    """A finished search.

    Attributes:
        kept: number of each fully trained trial → its files and history, which must be equal in every run.
    """

    trials: list[Trial]
    kept: dict[int, Any]

    @property
    def shown(self) -> list[Any]:
        """All trials' numbers, settings, states and learning curves, which must not depend on kills."""
        return [(one.number, dict(one.settings), one.state, dict(one.curves)) for one in self.trials]

    @property
    def settings(self) -> list[Any]:
        """The settings of each trial, in order."""
        return [(one.number, dict(one.settings)) for one in self.trials]


def make(warm: Warm, folder: Path, sampler: str, *, server: str = "") -> Lab:
    """A project whose search is enqueued."""
    lab = Lab(warm, folder, settings=SETTINGS + (f'queue = "{server}"\n' if server else ""))
    lab.make()
    assert warm.run(lab.root, ("init", str(lab.root)), log=lab.log) == 0, lab.said
    (lab.root / "jobs" / "small.toml").write_text(BASE)
    (lab.root / "jobs" / "hunt.toml").write_text(SEARCH.replace("SAMPLER", sampler))
    assert warm.run(lab.root, ("enqueue", "hunt"), log=lab.log) == 0, lab.said
    return lab


def searched(lab: Lab) -> Searched:
    """Check that every epoch was committed once, in order; return the trials."""
    project = find_project(lab.root)
    with open_queue(project, read_only=True) as queue:
        trials = trials_of(queue.overview(now=time.time()), "hunt")
        jobs, events = queue.jobs(), queue.events(limit=10**6)
    assert [trial.number for trial in trials] == list(range(TRIALS)), lab.said
    assert {trial.state for trial in trials} <= {TrialState.DONE, TrialState.PRUNED}, lab.said
    assert {job.state for job in jobs} <= {State.COMMITTED, State.SKIPPED}
    assert sum(job.failures for job in jobs) == 0, lab.said
    committed = Counter(event.job_id for event in events if event.to_state is State.COMMITTED)
    assert committed == Counter(job.id for job in jobs if job.state is State.COMMITTED)
    results = {trial.number: lab.root / _results(lab, trial) for trial in trials if trial.state is TrialState.DONE}
    return Searched(trials, {number: outcome(folder, 0) for number, folder in results.items()})


def _results(lab: Lab, trial: Trial) -> str:
    with open_queue(find_project(lab.root), read_only=True) as queue:
        return queue.experiment(trial.experiment).results_dir


def by_themselves(warm: Warm, folder: Path, found: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Name → results of experiments with these settings outside a search."""
    lab = Lab(warm, folder)
    lab.make()
    assert warm.run(lab.root, ("init", str(lab.root)), log=lab.log) == 0, lab.said
    (lab.root / "jobs" / "small.toml").write_text(BASE)
    commands = [
        ("enqueue", "small", "--folds", "0", "--name", name, *(f"--set={key}={value}" for key, value in one.items()))
        for name, one in found.items()
    ]
    assert warm.run(lab.root, *commands, WORK, log=lab.log, patience=550) == 0, lab.said
    with open_queue(lab.project(), read_only=True) as queue:
        return {name: outcome(lab.root / queue.experiment(name).results_dir, 0) for name in found}


def work_and_die(lab: Lab, chance: random.Random, seconds: float, *, workers: int, deaths: int) -> int:
    """Run sessions until no jobs are left; kill sessions at random moments until ``deaths`` have been killed."""
    died = 0
    while True:
        started = [lab.warm.start(lab.root, WORK, log=lab.log, patience=550) for _ in range(workers)]
        if died < deaths:
            for worker in started:
                time.sleep(chance.uniform(0.0, seconds / workers))
                worker.send_signal(signal.SIGKILL)
        codes = [worker.wait() for worker in started]
        died += codes.count(-signal.SIGKILL)
        assert set(codes) <= {0, -signal.SIGKILL}, lab.said
        if set(codes) == {0}:
            return died


@pytest.fixture(scope="module")
def undisturbed(warm: Warm, tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Searched, float]]:
    """For each sampler, a search by one uninterrupted worker, and the search's duration in seconds."""
    found = {}
    for sampler in (TPE, RANDOM):
        lab = make(warm, tmp_path_factory.mktemp("undisturbed"), sampler)
        began = time.monotonic()
        assert lab.work(patience=550) == 0, lab.said
        found[sampler] = searched(lab), time.monotonic() - began
    return found


@pytest.mark.parametrize(("database", "workers"), WAYS)
def test_a_search_with_killed_sessions_loses_and_repeats_no_trial_and_gives_the_same_bytes(
    warm: Warm,
    tmp_path: Path,
    request: pytest.FixtureRequest,
    undisturbed: dict[str, tuple[Searched, float]],
    database: str,
    workers: int,
) -> None:
    chance = random.Random(f"{SEED} {database} {workers}")
    sampler = TPE if workers == 1 else RANDOM
    straight, seconds = undisturbed[sampler]
    deaths, ways, tried = 0, 0, {}
    while deaths < DEATHS:  # a search may finish before it has been killed this many times
        server: PostgresServer | None = request.getfixturevalue("postgres_server") if database != "sqlite" else None
        lab = make(warm, tmp_path / str(ways), sampler, server="" if server is None else server.url())
        # In a short test run, kill sessions sooner, so that one search usually has enough deaths.
        longest = (2 if LONG else 1) * seconds / DEATHS
        deaths += work_and_die(lab, chance, longest, workers=workers, deaths=DEATHS - deaths)
        ways += 1
        found = searched(lab)
        where = f"MBQUEUE_TEST_SEED={SEED}\n{lab.said}"
        assert found.settings == straight.settings, where
        if workers == 1:
            assert (found.shown, found.kept) == (straight.shown, straight.kept), where
        for number, kept in found.kept.items():
            tried[f"way{ways}-{number}"] = dict(found.trials[number].settings), kept
    alone = by_themselves(warm, tmp_path / "alone", {name: settings for name, (settings, _) in tried.items()})
    assert alone == {name: kept for name, (_, kept) in tried.items()}, f"MBQUEUE_TEST_SEED={SEED}"
    tell(
        f"{database}, {workers} at once: {deaths} deaths in {ways} searches of {TRIALS} trials, {len(tried)} kept "
        f"trials byte-equal to experiments by themselves (MBQUEUE_TEST_SEED={SEED})"
    )
