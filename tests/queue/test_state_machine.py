"""Run random commands on the queue and on a simple model of it, and compare the two.

The tests also check invariants. Each epoch of a fold is committed once, unless it is rewound. Epochs of a fold are
committed in order. A session with an outdated fence changes nothing. No acknowledged commit is lost. A job's attempts
are limited, and so are its rewinds between two commits.
"""

from __future__ import annotations

import tempfile
from collections import defaultdict
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from long_runs import LONG

from mbqueue.errors import LeaseLost, QueueError, RewoundBefore
from mbqueue.experiment import parse_spec
from mbqueue.queue import Job, Kind, Lease, Queue, State
from mbqueue.queue.adopting import Trained
from mbqueue.queue.claiming import MAX_LOST_IN_A_ROW
from mbqueue.queue.edges import PRUNED
from mbqueue.queue.jobs import SeenSession
from mbqueue.queue.leases import MAX_FAILURES, retry_delay_seconds
from mbqueue.queue.steering import MAX_REWINDS

LEASE = 60.0
EPOCHS = 3
FOLDS = st.sampled_from([0, 1])
NAMES = st.sampled_from(["a", "b"])

Key = tuple[str, Kind, int | None, int | None]


def result_of(epoch: int | None) -> dict[str, Any]:
    """The result of a job, which does not depend on the session that runs the job."""
    return {"dataset_hash": "d"} if epoch is None else {"dataset_hash": "d", "epoch": epoch, "val_mae": 1 / epoch}


def skipping(*, stops: bool, prunes: bool) -> dict[str, Any]:
    """The options of a commit that stops its fold early, prunes its trial, or does neither."""
    why = f"{PRUNED}machine" if prunes else "machine"
    return {"skip_rest": why if stops else None, "prunes": stops and prunes}


class QueueMachine(RuleBasedStateMachine):
    """Runs commands on one queue, and keeps all leases in `given`, including those that are no longer valid."""

    open_queue: Callable[[Path], Queue]
    make_model: Callable[[], Any]
    root: Path

    def __init__(self) -> None:
        super().__init__()
        self.folder = tempfile.TemporaryDirectory(dir=type(self).root)
        self.queue = type(self).open_queue(Path(self.folder.name))
        self.model = type(self).make_model()
        self.now = 1_000_000.0
        self.committed: dict[Key, int] = {}
        self.rows: dict[Key, dict[str, Any]] = {}
        self.given: list[Lease] = []
        self.sessions: list[str] = []
        self.released: dict[str, list[int]] = {}
        self.last_event = 0
        self.holder: dict[Key, str | None] = {}
        self.put_back: dict[Key, list[tuple[str, str]]] = defaultdict(list)

    def teardown(self) -> None:
        self.queue.close()
        self.folder.cleanup()

    # -- commands --

    @initialize(folds=st.sampled_from([(0,), (0, 1)]))
    def begin(self, folds):
        self.enqueue("a", folds, EPOCHS)
        self.start_session()
        self.start_session()

    @rule(name=NAMES, folds=st.sampled_from([(0, 1), (1,)]), epochs=st.sampled_from([EPOCHS, 0]))
    def enqueue_some(self, name, folds, epochs):
        self.enqueue(name, folds, epochs)

    def enqueue(self, name, folds, epochs):
        there = self.model.of(name)
        if there:
            epochs = max((job.key[3] or 0 for job in there), default=0)
        trial = {"search": {"name": "machine", "trials": 1}, "number": 0, "settings": {}}
        train = {
            "name": name,
            "folds": folds,
            "data": {"dataset": "sample"},
            "train": {"epochs": epochs},
            "trial": trial,
        }
        spec = parse_spec({**train, "model": {"trainable": "all" if epochs else "none"}}, source="machine")
        self.queue.enqueue(spec, results_dir=f"results/{name}", now=self.now)
        new = [fold for fold in folds if (name, Kind.PREDICT, fold, None) not in self.model.jobs]
        if not new:
            return
        experiment = self.queue.experiment(name)
        whole = {"priority": experiment.priority, "paused": experiment.paused}
        prepare = there[0] if there else self.model.add((name, Kind.PREPARE, None, None), [])
        predicts = []
        for fold in new:
            last = prepare
            for epoch in range(1, epochs + 1):
                last = self.model.add((name, Kind.TRAIN, fold, epoch), [last], **whole)
            predicts.append(self.model.add((name, Kind.PREDICT, fold, None), [last], **whole))
        record = self.model.jobs.get((name, Kind.RECORD, None, None))
        if record is None:
            self.model.add((name, Kind.RECORD, None, None), predicts)
        else:
            record.needs += predicts
            if record.state is not State.WAITING:
                record.drop_lease(State.WAITING)
                record.failures, record.not_before = 0, 0.0
                self.committed.pop(record.key, None)
        self.model.settle(name)

    @rule()
    def start_session(self):
        session = self.queue.start_session(device="cpu", now=self.now, alive_seconds=LEASE)
        self.model.alive_until[session] = self.now + LEASE
        self.sessions.append(session)

    @rule(data=st.data())
    def end_session(self, data):
        session = data.draw(st.sampled_from(self.sessions))
        self.queue.end_session(session, reason="machine", now=self.now)
        if self.model.alive_until.pop(session, None) is not None:
            for job in self.model.jobs.values():
                if job.session == session:
                    job.preemptions += 1
                    job.drop_lease(State.READY)

    @rule(data=st.data(), loaded=st.none() | st.tuples(NAMES, FOLDS))
    def claim_some(self, data, loaded):
        self.claim(data.draw(st.sampled_from(self.sessions)), loaded)

    @rule(data=st.data(), jobs=st.integers(1, 6))
    def work(self, data, jobs):
        """Let a session run some jobs without any failure."""
        lease = self.claim(data.draw(st.sampled_from(self.sessions)), None)
        for _ in range(jobs):
            if lease is None:
                break
            lease = self.commit_and_claim(lease, stops=False)

    def claim(self, session: str, loaded: tuple[str, int] | None) -> Lease | None:
        loaded = None if loaded is None or loaded[1] is None else loaded  # a session loads one fold of an experiment
        known = {experiment.name: experiment.id for experiment in self.queue.experiments()}
        place = (known[loaded[0]], loaded[1]) if loaded and loaded[0] in known else None
        if session not in self.model.alive_until:
            with pytest.raises(QueueError):
                self.queue.claim(session, now=self.now, lease_seconds=LEASE, loaded=place)
            return None
        return self.was_claimed(
            self.queue.claim(session, now=self.now, lease_seconds=LEASE, loaded=place), session, loaded
        )

    def was_claimed(self, lease: Lease | None, session: str, loaded: tuple[str, int] | None) -> Lease | None:
        self.model.alive_until[session] = max(self.model.alive_until[session], self.now + LEASE)
        self.model.reap(self.now)
        chosen = self.model.choose(session, self.now, loaded)
        assert (lease and key_of(lease.job)) == (chosen and chosen.key)
        return None if lease is None or chosen is None else self.was_given(lease, chosen, session)

    def was_given(self, lease: Lease, chosen: Any, session: str) -> Lease:
        assert key_of(lease.job) == chosen.key
        assert all(job.is_done for job in chosen.needs)
        chosen.state, chosen.session, chosen.expires = State.LEASED, session, self.now + LEASE
        chosen.fence, chosen.affinity, chosen.started, chosen.not_before = chosen.fence + 1, session, True, 0.0
        assert lease.fence == chosen.fence
        self.given.append(lease)
        return lease

    # Random commands seldom reach the difficult states, so the following commands lead to them directly.

    @rule(data=st.data(), fold=FOLDS)
    def finish_a_fold(self, data, fold):
        """Let a session finish a fold without any failure."""
        name = data.draw(st.sampled_from(sorted({key[0] for key in self.model.jobs})))
        session = self.living_session()
        for _ in range(EPOCHS + 3):
            lease = self.claim(session, (name, fold))
            if lease is None:
                break
            self.commit(lease, stops=False)

    @rule(data=st.data(), fold=FOLDS, stops_at=st.integers(1, EPOCHS), to_epoch=st.none() | st.integers(0, EPOCHS))
    def stop_early(self, data, fold, stops_at, to_epoch):
        """Stop a fold early, then perhaps rewind it as after a damaged checkpoint."""
        name = data.draw(st.sampled_from(sorted({key[0] for key in self.model.jobs})))
        session = self.living_session()
        for _ in range(EPOCHS + 2):
            lease = self.claim(session, (name, fold))
            if lease is None:
                break
            self.commit(lease, stops=lease.job.fold == fold and lease.job.epoch == stops_at)
            if (lease.job.fold, lease.job.epoch) == (fold, stops_at):
                break
        if to_epoch is not None and self.model.of(name, fold):
            self.rewind(name, fold, self.model.of(name, fold), to_epoch=to_epoch)

    @precondition(lambda self: any(self.held(lease) for lease in self.given))
    @rule(data=st.data())
    def take_over(self, data):
        """The holder freezes, another session claims the job, then the old holder wakes up and tries every write."""
        old = data.draw(st.sampled_from([lease for lease in self.given if self.held(lease)]))
        self.now = self.held(old).expires
        job, place = self.model.jobs[key_of(old.job)], (old.job.experiment, old.job.fold)
        for _ in range(4):
            if self.claim(self.living_session(), place) is None or job.state is State.LEASED:
                break
        result = {"dataset_hash": "d"}
        folds = [key[2] for key in self.model.jobs if key[0] == job.key[0] and key[2] is not None]
        fold = folds[0] if job.key[2] is None else job.key[2]
        for write in (  # every write must raise LeaseLost
            lambda: self.queue.renew(old, now=self.now, lease_seconds=2 * LEASE),
            lambda: self.queue.save_progress(old, progress={"step": 1}),
            lambda: self.queue.release(old, reason="machine", now=self.now),
            lambda: self.queue.fail(old, error="boom", now=self.now),
            lambda: self.queue.rewind(job.key[0], {fold: "machine"}, to_epoch=0, now=self.now, lease=old),
            lambda: self.queue.commit(old, result=result, now=self.now, publish=lambda: pytest.fail("published")),
        ):
            assert self.attempt(old, write) is None
            self.the_queue_is_as_the_model_says()

    @rule(data=st.data(), retried=st.booleans())
    def fail_for_good(self, data, retried):
        """Let a job fail until no attempts are left, and then perhaps retry it."""
        session = self.living_session()
        lease = self.claim(session, None)
        if lease is None:
            return
        for _ in range(MAX_FAILURES - 1):
            self.failed(lease, final=False)
            self.now = max(self.now, self.model.jobs[key_of(lease.job)].not_before)
            again = self.claim(self.living_session(), (lease.job.experiment, lease.job.fold))
            if again is None or key_of(again.job) != key_of(lease.job):
                return
            lease = again
        self.failed(lease, final=False)
        if retried:
            self.retry(lease.job.experiment, lease.job.fold, self.model.of(lease.job.experiment, lease.job.fold))

    @rule(times=st.sampled_from([2, MAX_LOST_IN_A_ROW - 1, MAX_LOST_IN_A_ROW]))
    def lose_in_a_row(self, times):
        """Claim a job several times in a row, each time without finishing it before the lease expires."""
        for _ in range(times):
            lease = self.claim(self.living_session(), None)
            if lease is None:
                return
            self.now += LEASE

    def living_session(self) -> str:
        """Return a session that has not ended; start one if there is none."""
        living = [session for session in self.sessions if session in self.model.alive_until]
        if not living:
            self.start_session()
            return self.sessions[-1]
        return living[0]

    @rule(seconds=st.sampled_from([1.0, 20.0, 30.0, 60.0, 3600.0]))
    def pass_time(self, seconds):
        self.now += seconds

    @precondition(lambda self: self.given)
    @rule(data=st.data())
    def renew(self, data):
        lease = self.some_lease(data)
        job = self.attempt(lease, lambda: self.queue.renew(lease, now=self.now, lease_seconds=LEASE))
        if job:
            job.expires = self.now + LEASE

    @precondition(lambda self: self.given)
    @rule(data=st.data())
    def save_progress(self, data):
        lease = self.some_lease(data)
        job = self.attempt(lease, lambda: self.queue.save_progress(lease, progress={"step": 1}))
        if job:
            job.lost = 0

    @precondition(lambda self: self.given)
    @rule(data=st.data(), stops=st.booleans(), prunes=st.booleans())
    def commit_some(self, data, stops, prunes):
        self.commit(self.some_lease(data), stops=stops, prunes=prunes)

    def commit(self, lease: Lease, *, stops: bool, prunes: bool = False) -> None:
        published = []
        stops = stops and lease.job.kind is Kind.TRAIN
        options = {"result": result_of(lease.job.epoch), **skipping(stops=stops, prunes=prunes)}
        job = self.attempt(
            lease,
            lambda: self.queue.commit(lease, now=self.now, publish=lambda: published.append(1), **options),
        )
        assert bool(published) == bool(job)
        if job:
            self.was_committed(job, stops=stops, prunes=prunes)

    @precondition(lambda self: self.given)
    @rule(data=st.data(), stops=st.booleans(), prunes=st.booleans())
    def commit_and_claim_some(self, data, stops, prunes):
        self.commit_and_claim(self.some_lease(data), stops=stops, prunes=prunes)

    def commit_and_claim(self, lease: Lease, *, stops: bool, prunes: bool = False) -> Lease | None:
        published, claimed = [], []
        stops = stops and lease.job.kind is Kind.TRAIN
        options = {"result": result_of(lease.job.epoch), **skipping(stops=stops, prunes=prunes)}
        job = self.attempt(
            lease,
            lambda: claimed.append(
                self.queue.commit_and_claim(
                    lease, now=self.now, lease_seconds=LEASE, publish=lambda: published.append(1), **options
                )
            ),
        )
        assert bool(published) == bool(job)
        if not job:
            return None
        self.was_committed(job, stops=stops, prunes=prunes)
        fold = lease.job.fold
        is_epoch = lease.job.kind is Kind.TRAIN and not stops
        if is_epoch and self.model.alive_until[lease.session] > self.now + LEASE / 2:
            following = next((later for later in self.model.jobs.values() if job in later.needs), None)
            if following is not None and following.state is State.READY and not following.paused:
                assert claimed[0] is not None
                return self.was_given(claimed[0], following, lease.session)
        return self.was_claimed(claimed[0], lease.session, None if fold is None else (lease.job.experiment, fold))

    def was_committed(self, job: Any, *, stops: bool, prunes: bool) -> None:
        name, kind, fold, epoch = job.key
        assert job.key not in self.committed
        self.committed[job.key], self.rows[job.key] = job.fence, result_of(epoch)
        session, job.lost = job.session, 0
        job.rewound.clear()
        job.drop_lease(State.COMMITTED)
        for left in self.model.of(name):
            if stops and prunes and left.state in {State.WAITING, State.READY}:
                left.state, left.is_pruned = State.SKIPPED, True
        for later in self.model.of(name):
            if stops and later.key[1:3] == (kind, fold) and later.key[3] > epoch and later.state is State.WAITING:
                later.state, later.is_pruned = State.SKIPPED, False
        for later in self.model.of(name):
            if later.is_free:
                later.state = State.READY
                later.started = later.started or kind is not Kind.PREPARE
                later.affinity = session if later.key[2] is not None and later.key[2] == fold else None

    @precondition(lambda self: self.given)
    @rule(data=st.data())
    def commit_when_the_disk_is_full(self, data):
        lease = self.some_lease(data)

        def publish():
            raise OSError("disk full")

        with pytest.raises(OSError if self.held(lease) else LeaseLost):
            self.queue.commit(lease, result={"dataset_hash": "d"}, now=self.now, publish=publish)

    @precondition(lambda self: self.given)
    @rule(data=st.data(), preempted=st.booleans(), for_others=st.booleans())
    def release(self, data, preempted, for_others):
        lease = self.some_lease(data)
        how = {"preempted": preempted, "for_others": for_others}
        job = self.attempt(lease, lambda: self.queue.release(lease, reason="machine", now=self.now, **how))
        if job:
            job.preemptions += preempted
            job.affinity = None if for_others else job.affinity
            job.drop_lease(State.READY)

    @precondition(lambda self: self.given)
    @rule(data=st.data(), final=st.sampled_from([False, False, True]))
    def fail(self, data, final):
        self.failed(self.some_lease(data), final=final)

    def failed(self, lease: Lease, *, final: bool) -> None:
        job = self.attempt(lease, lambda: self.queue.fail(lease, error="boom", now=self.now, final=final))
        if job:
            job.failures, job.affinity = job.failures + 1, None
            ends = final or job.failures >= MAX_FAILURES
            job.drop_lease(State.FAILED if ends else State.READY)
            job.not_before = 0.0 if ends else self.now + retry_delay_seconds(job.failures)

    @rule(data=st.data(), action=st.sampled_from(["pause", "resume", "set_priority", "cancel", "retry", "rewind"]))
    def steer(self, data, action):
        """Apply a user's command, such as pause or retry, to an experiment or a fold."""
        name, fold = data.draw(st.sampled_from(sorted({key[0::2][:2] for key in self.model.jobs}, key=str)))
        jobs = self.model.of(name, fold)
        actions = {
            "pause": self.pause,
            "resume": partial(self.pause, paused=False),
            "set_priority": self.set_priority,
            "cancel": self.cancel,
            "retry": self.retry,
            "rewind": partial(self.rewind, to_epoch=data.draw(st.integers(0, EPOCHS))),
        }
        actions[action](name, fold, jobs)

    @rule(data=st.data(), gives_up=st.booleans(), retried=st.booleans())
    def prune(self, data, gives_up, retried):
        """Prune a trial, unless a session holds one of its jobs; then maybe discard its checkpoints or retry it."""
        name = data.draw(st.sampled_from(sorted({key[0] for key in self.model.jobs})))
        jobs = self.model.of(name)
        is_held = any(job.state is State.LEASED for job in jobs)
        left = [] if is_held else [job for job in jobs if job.state in {State.WAITING, State.READY}]
        assert self.queue.prune(name, why=f"{PRUNED}machine", now=self.now) == len(left)
        for job in left:
            job.state, job.is_pruned = State.SKIPPED, True
        if gives_up:
            self.discard_checkpoints(name)
        if retried:
            self.retry(name, None, jobs)

    def discard_checkpoints(self, name):
        jobs = self.model.of(name)
        record = self.model.jobs[(name, Kind.RECORD, None, None)]
        is_over = record.state is State.SKIPPED and record.is_pruned and name not in self.released
        gives_up = is_over and not any(job.state is State.LEASED for job in jobs)
        assert self.queue.discard_checkpoints(name, now=self.now) == gives_up
        if gives_up:
            self.released[name] = sorted({job.key[2] for job in jobs} - {None})
            histories = self.queue.experiment(name).spec["trial"]["released"]["histories"]
            assert {(int(fold), row["epoch"]) for fold, rows in histories.items() for row in rows} == {
                (job.key[2], job.key[3]) for job in jobs if job.key[1] is Kind.TRAIN and job.state is State.COMMITTED
            }

    @rule()
    def mend(self):
        """Resume and retry all experiments, so that long test runs do not end with every job paused or failed."""
        for name in sorted({key[0] for key in self.model.jobs}):
            jobs = self.model.of(name)
            self.pause(name, None, jobs, paused=False)
            self.retry(name, None, jobs)

    def pause(self, name, fold, jobs, *, paused=True):
        (self.queue.pause if paused else self.queue.resume)(name, fold=fold, now=self.now)
        for job in jobs:
            job.paused = paused

    def set_priority(self, name, fold, jobs):
        priority = jobs[0].priority + 1
        self.queue.set_priority(name, priority, fold=fold, now=self.now)
        for job in jobs:
            job.priority = priority

    def cancel(self, name, fold, jobs):
        self.queue.cancel(name, fold=fold, now=self.now)
        for job in jobs:
            if job.state in {State.WAITING, State.READY, State.LEASED, State.FAILED}:
                job.drop_lease(State.CANCELLED)

    def retry(self, name, fold, jobs):
        self.queue.retry(name, fold=fold, now=self.now)
        for job in self.model.of(name):
            retried = job in jobs or job.key[1] is Kind.RECORD
            if retried and job.state in {State.FAILED, State.CANCELLED}:
                job.state, job.failures, job.lost, job.not_before = State.WAITING, 0, 0, 0.0
                job.rewound.clear()
        for job in jobs:
            if job.state is State.READY:
                job.not_before = 0.0
        pruned = [job for job in self.model.of(name) if job.state is State.SKIPPED and job.is_pruned]
        for job in pruned:
            job.state = State.WAITING
        if pruned:
            for released in self.released.pop(name, ()):
                self.rewound(name, released, 0)
        self.model.settle(name)

    def rewind(self, name, fold, jobs, *, to_epoch):
        if fold is not None:
            self.queue.rewind(name, {fold: "machine"}, to_epoch=to_epoch, now=self.now)
            self.rewound(name, fold, to_epoch)

    @precondition(lambda self: self.given)
    @rule(data=st.data(), to_epoch=st.integers(0, EPOCHS))
    def rewind_by_the_holder(self, data, to_epoch):
        lease = self.some_lease(data)
        name, fold, epoch = lease.job.experiment, lease.job.fold, lease.job.epoch
        if epoch is not None and to_epoch < epoch:
            self.rewind_held(lease, [fold], to_epoch)
        elif lease.job.kind == "record":
            self.rewind_held(lease, sorted({key[2] for key in self.model.jobs if key[0] == name} - {None}), EPOCHS)

    def rewind_held(self, lease, folds, to_epoch, why="machine"):
        name, put_back = lease.job.experiment, dict.fromkeys(folds, why)
        rewind = partial(self.queue.rewind, name, put_back, to_epoch=to_epoch, now=self.now, lease=lease)
        job = self.held(lease)
        if job and ((lease.session, why) in job.rewound or len(job.rewound) >= MAX_REWINDS):
            with pytest.raises(RewoundBefore, match=why):
                rewind()
            return
        if self.attempt(lease, rewind):
            job.rewound.append((lease.session, why))
            for fold in folds:
                self.rewound(name, fold, to_epoch)

    @rule(data=st.data(), fold=FOLDS, whys=st.sampled_from(["same", "another"]), commits=st.booleans())
    def find_damage_again_and_again(self, data, fold, whys, commits):
        """Several times: train a fold up to its prediction, then let the session find damage and rewind the fold."""
        name = data.draw(st.sampled_from(sorted({key[0] for key in self.model.jobs})))
        for time in range(MAX_REWINDS + 2):
            session = self.living_session()
            lease = self.claim(session, (name, fold))
            while lease is not None and lease.job.kind is not Kind.PREDICT:
                self.commit(lease, stops=False)
                lease = self.claim(session, (name, fold))
            if lease is None:
                return
            if commits and time == MAX_REWINDS:
                self.commit(lease, stops=False)
                return
            self.rewind_held(lease, [lease.job.fold], EPOCHS - 1, f"{whys} {time if whys == 'another' else ''}")

    # -- commits and sessions of the project's other databases --

    @rule(
        data=st.data(),
        fold=FOLDS,
        epochs=st.integers(0, EPOCHS),
        differs_from=st.integers(1, EPOCHS + 1),
        fence=st.integers(1, 5),
        is_within=st.booleans(),
        skip_rest=st.booleans(),
    )
    def adopt(self, data, fold, epochs, differs_from, fence, is_within, skip_rest):
        """Adopt a chain of commits from a different machine, whose results may differ from some epoch on."""
        name = data.draw(st.sampled_from(sorted({key[0] for key in self.model.jobs})))
        jobs = [job for job in self.model.of(name, fold) if job.key[1] is Kind.TRAIN]
        prepare = self.model.jobs[(name, Kind.PREPARE, None, None)]
        if not jobs or prepare.state is not State.COMMITTED:
            return
        history = [
            {**result_of(epoch), **({"other": self.now} if epoch >= differs_from else {})}
            for epoch in range(1, epochs + 1)
        ]
        fields = {"is_within": is_within, "skip_rest": skip_rest, "source": "machine"}
        chain = Trained(experiment=name, fold=fold, history=history, fence=fence, **fields)
        published = []
        is_free = not any(job.state is State.LEASED for job in jobs)
        assert self.queue.adopt(chain, now=self.now, publish=lambda: published.append(1)) == is_free
        assert bool(published) == is_free
        if is_free:
            self.was_adopted(name, fold, jobs, chain)

    def was_adopted(self, name, fold, jobs, chain):
        rows = {job.key: self.rows.get(job.key) for job in jobs}
        agreed = 0
        for job, row in zip(jobs, chain.history, strict=False):
            if job.state is not State.COMMITTED or rows[job.key] != row:
                break
            agreed += 1
        if any(job.state is State.COMMITTED and job.key[3] > agreed for job in jobs):
            self.rewound(name, fold, agreed)
        for job in jobs[agreed:]:
            epoch = job.key[3]
            if epoch > len(chain.history):
                if chain.is_within and epoch == len(chain.history) + 1:
                    job.fence, job.started = max(job.fence, chain.fence), True
                break
            if job.state is State.CANCELLED:
                break
            if job.state is State.FAILED:
                job.failures = 0
            if job.state is not State.SKIPPED:
                is_last = epoch == len(chain.history) and not chain.is_within
                job.state, job.started, job.lost, job.not_before = State.COMMITTED, True, 0, 0.0
                job.rewound.clear()
                job.fence = max(job.fence, chain.fence if is_last else 0)
                self.committed[job.key], self.rows[job.key] = job.fence, chain.history[epoch - 1]
        if chain.skip_rest:
            for job in jobs[len(chain.history) :]:
                if job.state in {State.READY, State.WAITING}:
                    job.state, job.is_pruned = State.SKIPPED, False
        self.model.settle(name)

    @rule(data=st.data(), session=st.sampled_from(["there", "elsewhere"]), seconds=st.sampled_from([LEASE, 600.0]))
    def see_session(self, data, session, seconds):
        name, fold = data.draw(st.sampled_from(sorted({key[0::2][:2] for key in self.model.jobs}, key=str)))
        times = {"started_at": 1.0, "heartbeat_at": self.now, "alive_until": self.now + seconds, "deadline_at": None}
        process = {"host": "elsewhere", "boot_id": "boot", "pid": 1, "pid_started": 1, "device": "L4"}
        folds = [] if fold is None else [(name, fold)]
        self.queue.see_session(SeenSession(id=session, **process, **times), folds=folds, now=self.now)
        self.model.alive_until[session] = self.now + seconds
        if session not in self.sessions:
            self.sessions.append(session)
        for job in self.model.of(name, fold) if folds else ():
            if job.state in {State.WAITING, State.READY}:
                job.affinity = session

    @rule()
    def end_all_sessions(self):
        living = len(self.model.alive_until)
        assert self.queue.end_all_sessions(reason="a copy", now=self.now, by="machine") == living
        self.model.alive_until.clear()
        for job in self.model.jobs.values():
            if job.state is State.LEASED:
                job.drop_lease(State.READY)
                job.affinity = None

    @rule()
    def reopen(self):
        self.queue.close()

    # -- invariants --

    @invariant()
    def the_queue_is_as_the_model_says(self):
        jobs = {key_of(job): job for job in self.queue.jobs()}
        assert set(jobs) == set(self.model.jobs)
        for key, model in self.model.jobs.items():
            job = jobs[key]
            there = (job.state, job.fence, job.session, job.lease_expires_at or 0.0, job.paused, job.priority)
            assert there == (model.state, model.fence, model.session, model.expires, model.paused, model.priority), key
            counts = (job.failures, job.preemptions, job.lost_in_a_row, job.not_before, job.started, job.affinity)
            assert counts == (
                model.failures,
                model.preemptions,
                model.lost,
                model.not_before,
                model.started,
                model.affinity,
            ), key

        assert {key: job.fence for key, job in jobs.items() if job.state is State.COMMITTED} == self.committed, (
            "an acknowledged commit is lost"
        )

    @invariant()
    def no_epoch_is_committed_before_the_one_it_builds_on(self):
        for job in self.model.jobs.values():
            if job.state in {State.COMMITTED, State.LEASED, State.READY}:
                assert all(needed.is_done for needed in job.needs), job.key

    @invariant()
    def no_job_goes_round_in_circles(self):
        """Check in the events that a job is rewound only a few times between commits, and once for each reason."""
        for event in sorted(self.queue.events(after=self.last_event, limit=100_000), key=lambda event: event.id):
            self.last_event = event.id
            key = (event.experiment, event.kind, event.fold, event.epoch)
            if event.to_state == "leased":
                self.holder[key] = event.by
            if event.to_state == "committed" or event.from_state in {"failed", "cancelled"}:
                self.put_back.pop(key, None)
            elif (event.from_state, event.to_state, event.by) == ("leased", "waiting", self.holder.get(key)):
                self.put_back[key].append((event.by, event.why))
        for key, times in self.put_back.items():
            assert len(times) <= MAX_REWINDS, key
            assert len(set(times)) == len(times), key

    @invariant()
    def attempts_are_bounded(self):
        assert all(job.failures <= MAX_FAILURES and job.lost <= MAX_LOST_IN_A_ROW for job in self.model.jobs.values())

    # -- helpers --

    def held(self, lease: Lease) -> Any:
        """The job if the lease is still valid, else None."""
        job = self.model.jobs[key_of(lease.job)]
        return job if job.state is State.LEASED and job.fence == lease.fence else None

    def attempt(self, lease: Lease, write: Callable[[], object]) -> Any:
        """Check that a write under a lease works if the lease is valid, and raises LeaseLost if not."""
        job = self.held(lease)
        if job is None:
            with pytest.raises(LeaseLost):
                write()
        else:
            write()
        return job

    def some_lease(self, data: st.DataObject) -> Lease:
        """Choose any lease so far, usually one that is still valid."""
        good = [lease for lease in self.given if self.held(lease)]
        return data.draw(st.sampled_from(good if good and data.draw(st.integers(0, 3)) else self.given))

    def rewound(self, name: str, fold: int, to_epoch: int) -> None:
        for job in self.model.of(name):
            _, kind, its_fold, epoch = job.key
            is_later = its_fold == fold and (kind is Kind.PREDICT or epoch > to_epoch)
            is_live = job.state in {State.READY, State.LEASED, State.COMMITTED, State.SKIPPED}
            if (is_later or kind is Kind.RECORD) and is_live:
                job.drop_lease(State.WAITING)
                job.not_before = 0.0
                self.committed.pop(job.key, None)
        self.model.settle(name)


def key_of(job: Job) -> Key:
    return (job.experiment, job.kind, job.fold, job.epoch)


def test_any_order_of_commands_agrees_with_the_model(open_queue_in, make_model, tmp_path, request):
    is_slow = request.node.callspec.params["open_queue_in"] == "postgresql"

    class Machine(QueueMachine):
        open_queue = staticmethod(open_queue_in)
        root = tmp_path

    Machine.make_model = staticmethod(make_model)

    run_state_machine_as_test(
        Machine,
        settings=settings(
            max_examples=25 if is_slow and not LONG else 50,
            stateful_step_count=40,
            deadline=None,
            suppress_health_check=[HealthCheck.too_slow],  # the test machine may have a slow disk or a busy CPU
        ),
    )
