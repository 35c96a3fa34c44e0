"""Two workers on one queue, frozen in turn for longer than their leases."""

from __future__ import annotations

import random
import signal
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path

from small_project import RememberedReport, enqueue, make_project, small_spec
from warm import Warm

from mbqueue.queue.jobs import Job, State
from mbqueue.queue.store import Queue
from mbqueue.session.options import WorkOptions
from mbqueue.session.stop import StopRequest
from mbqueue.session.worker import Ending, work

from .conftest import LONG, SEED, WORK, Lab, tell

FREEZES = 25 if LONG else 2
LEASE_SECONDS = 1.0
EPOCHS = 12 if LONG else 3
ENQUEUE = ("enqueue", "full_finetune", "--dataset", "sample", "--folds", "0,1", "--epochs", str(EPOCHS))
ENQUEUE += ("--set", "data.limit=16", "--set", "train.batch_size=4")


def test_two_workers_frozen_beyond_their_leases_commit_every_epoch_once_and_the_same_bytes(
    warm: Warm, tmp_path: Path
) -> None:
    settings = f"checkpoint_minutes = 1e-6\nlease_seconds = {LEASE_SECONDS}\n"
    straight = Lab(warm, tmp_path / "straight", enqueue=ENQUEUE, settings=settings)
    straight.make()
    assert straight.live(patience=550) == 0, straight.said
    race = replace(straight, folder=tmp_path / "race")
    race.make()
    assert warm.run(race.root, *race.commands[:2], log=race.log) == 0, race.said

    chance = random.Random(SEED)
    workers = [warm.start(race.root, WORK, log=race.log, patience=550) for _ in range(2)]
    processes = {worker.pid: worker for worker in workers}
    taken_over = 0
    with Queue(race.project().queue_db, read_only=True) as queue:
        for freeze in range(10 * FREEZES):
            if freeze >= FREEZES and taken_over:
                break  # on a busy machine, some freezes are shorter than the lease, so more freezes are needed
            time.sleep(chance.uniform(0.0, 0.3))
            leased = queue.jobs(state=State.LEASED)
            if not leased:
                continue
            job = chance.choice(leased)
            frozen = processes[queue.session(str(job.session)).pid]
            frozen.send_signal(signal.SIGSTOP)
            try:
                deadline = time.monotonic() + LEASE_SECONDS + chance.uniform(0.5, 2.0)
                while time.monotonic() < deadline:
                    time.sleep(0.05)
            finally:
                frozen.send_signal(signal.SIGCONT)
            (now,) = (other for other in queue.jobs() if other.id == job.id)
            taken_over += now.fence > job.fence or now.preemptions > job.preemptions
        codes = [worker.wait() for worker in workers]
        where = f"MBQUEUE_TEST_SEED={SEED}, {taken_over} taken over\n{race.said}"
        assert codes == [0, 0], where
        committed = Counter(e.job_id for e in queue.events(limit=10**6) if e.to_state is State.COMMITTED)
        jobs = queue.jobs()
    assert taken_over, where
    assert committed == Counter(job.id for job in jobs), where
    race.check_queue()
    for fold in (0, 1):
        assert race.results(fold) == straight.results(fold), where
    tell(f"{FREEZES} times frozen, {taken_over} jobs taken over, {committed.total()} commits of {len(jobs)} jobs")


def test_a_session_that_lost_its_job_still_stops_when_asked(tmp_path: Path) -> None:
    project = make_project(tmp_path)
    enqueue(project, small_spec(project))
    report, stop = RememberedReport(), StopRequest()

    def lose_the_job_and_stop(job: Job, *_: object) -> None:
        with Queue(project.queue_db) as queue:
            queue.cancel(job.experiment, now=0.0)
        stop.request("SIGTERM")

    report.on_advanced = lose_the_job_and_stop
    outcome = work(project, WorkOptions(device="cpu"), report=report, stop=stop)
    assert (outcome.ending, outcome.reason) == (Ending.STOPPED, "SIGTERM")
    assert any("no longer holds" in line for line in report.lines), report.lines
