"""Real sessions with the queue on PostgreSQL."""

from __future__ import annotations

import json

from postgres_server import PostgresServer
from processes import outcome, run, start, until
from small_project import RememberedReport, enqueue, make_project, small_spec

from mbqueue import Project
from mbqueue.queue import Kind
from mbqueue.queue.opening import open_queue
from mbqueue.session.options import WorkOptions
from mbqueue.session.stop import StopRequest
from mbqueue.session.worker import work


def test_a_session_on_a_crashing_server_gives_the_same_as_one_on_a_file(tmp_path, postgres_server: PostgresServer):
    on_file = make_project(tmp_path / "on_file")
    there = enqueue(on_file, small_spec(on_file, train__epochs=1, data__limit=16))
    beside = start(on_file.root, "work")
    root = make_project(tmp_path / "on_server").root
    with (root / "mbqueue.toml").open("a") as settings:
        settings.write(f'queue = "{postgres_server.url()}"\n')
    project = Project(root).folder
    here = enqueue(project, small_spec(project, train__epochs=1, data__limit=16))
    log = tmp_path / "log"
    session = start(root, "work", log=log)
    with open_queue(project, read_only=True) as queue:
        until(lambda: any(job.fence for job in queue.jobs() if job.kind is Kind.TRAIN), session)
        postgres_server.restart()
        assert session.wait(timeout=180) == 0, log.read_text()
        states = {job.label: (job.state.value, job.fence) for job in queue.jobs()}
    assert set(states.values()) == {("committed", 1)}  # no job ran twice
    assert beside.wait(timeout=180) == 0
    assert outcome(here, 0) == outcome(there, 0)
    assert not project.queue_db.exists()
    told = json.loads(run(root, "status", "--json").stdout)
    assert told["experiments"][0]["state"] == "done"


def test_a_session_that_starts_while_the_server_is_down_waits(tmp_path, postgres_server: PostgresServer):
    class StartsTheServer(StopRequest):
        waits = 0

        def wait(self, seconds: float) -> bool:
            if not self.waits:
                postgres_server.start()
            self.waits += 1
            return False

    root = make_project(tmp_path / "project").root
    with (root / "mbqueue.toml").open("a") as settings:
        settings.write(f'queue = "{postgres_server.url()}"\n')
    project = Project(root).folder
    enqueue(project, small_spec(project, "pretrained_infer"))
    postgres_server.stop()
    stop = StartsTheServer()
    outcome = work(project, WorkOptions(device="cpu", max_jobs=0), report=RememberedReport(), stop=stop)
    assert (outcome.reason, stop.waits > 0) == ("reached the limit of 0 jobs", True)


def test_a_session_waiting_on_a_server_claims_new_jobs_at_once(tmp_path, postgres_server: PostgresServer):
    root = make_project(tmp_path / "project").root
    with (root / "mbqueue.toml").open("a") as settings:
        settings.write(f'queue = "{postgres_server.url()}"\n')
    project = Project(root).folder
    enqueue(project, small_spec(project, "pretrained_infer", name="first"))
    with open_queue(project) as queue:
        queue.pause("first", now=0.0)
        session = start(root, "work", "--forever", "--session", "none", log=tmp_path / "log")
        until(lambda: any(row.ended_at is None for row in queue.sessions()), session)
        queue.resume("first", now=0.0)
        until(lambda: queue.jobs(experiment="first")[0].fence == 1, session)
        session.terminate()
        assert session.wait(timeout=60) in {0, 75}
        (row,) = queue.sessions()
        assert row.end_reason == "SIGTERM"
