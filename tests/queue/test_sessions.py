"""How the queue registers sessions, notices dead ones, and records events."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from mbqueue.errors import QueueError
from mbqueue.queue import processes, sessions
from mbqueue.queue.claiming import MAX_LOST_IN_A_ROW
from mbqueue.queue.processes import ProcessIdentity, boot_id, is_known_dead, this_process


def test_session_ids_differ(world):
    assert len({world.session() for _ in range(20)}) == 20


def test_a_session_row_identifies_the_session(world):
    session = world.queue.start_session(device="cuda: L4", now=world.now, alive_seconds=60, deadline_at=world.now + 9)
    row = world.queue.session(session)
    assert (row.pid, row.device, row.deadline_at, row.ended_at) == (os.getpid(), "cuda: L4", world.now + 9, None)
    assert row.is_live(world.now + 59)
    assert not row.is_live(world.now + 61)


def test_a_heartbeat_keeps_a_session_alive_and_keeps_what_it_does_not_mention(world):
    session = world.session()
    world.queue.heartbeat(session, now=world.now + 50, alive_seconds=60, structures_per_second=240.0)
    world.queue.heartbeat(session, now=world.now + 100, alive_seconds=60)
    row = world.queue.session(session)
    assert row.is_live(world.now + 159)
    assert row.structures_per_second == 240.0


def test_an_ended_session_has_no_heartbeat(world):
    session = world.session()
    world.queue.end_session(session, reason="deadline", now=world.now)
    with pytest.raises(QueueError, match="has ended"):
        world.queue.heartbeat(session, now=world.now, alive_seconds=60)


def test_ending_a_session_releases_its_job_once(world):
    session = world.session()
    world.enqueue()
    lease = world.take(session)
    world.queue.end_session(session, reason="deadline", now=world.now)
    world.queue.end_session(session, reason="again", now=world.now + 1)
    job = world.queue.job(lease.job.id)
    assert (job.state, job.preemptions, job.failures) == ("ready", 1, 0)
    row = world.queue.session(session)
    assert (row.end_reason, row.ended_at) == ("deadline", world.now)


def test_a_dead_process_of_this_machine_loses_its_lease_at_once(world):
    process = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    started = ProcessIdentity(this_process().host, boot_id(), process.pid, None)
    doomed = world.queue.start_session(device="cpu", now=world.now, alive_seconds=1e6, identity=started)
    world.enqueue()
    lease = world.take(doomed, seconds=10_000)
    me = world.session()
    assert world.queue.reap_dead(by=me, now=world.now) == ()
    process.kill()
    process.communicate()
    assert [row.id for row in world.queue.reap_dead(by=me, now=world.now)] == [doomed]
    assert world.take(me).job.id == lease.job.id
    assert world.queue.session(doomed).end_reason == f"process {process.pid} is gone"


def test_a_killed_process_that_is_still_a_zombie_counts_as_dead():
    process = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    identity = ProcessIdentity("here", boot_id(), process.pid, None)
    assert not is_known_dead(identity)
    process.kill()
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)  # from here on, the process is a zombie
    assert is_known_dead(identity)
    process.communicate()


def test_a_later_process_with_the_same_pid_is_another_one():
    me = this_process()
    assert not is_known_dead(me)
    assert is_known_dead(ProcessIdentity(me.host, me.boot_id, me.pid, (me.pid_started or 0) + 1))


@pytest.mark.parametrize("boot", [None, "another-boot/pid:[1]"])
def test_processes_of_other_machines_are_never_known_to_be_dead(boot):
    assert not is_known_dead(ProcessIdentity(this_process().host, boot, 2**22 + 1, 1))


@pytest.fixture
def hidden_processes(monkeypatch):
    """Hide processes, as /proc does to other users when mounted with hidepid."""
    monkeypatch.setattr(processes, "_stat", lambda _pid: None)


@pytest.mark.usefixtures("hidden_processes")
def test_a_process_that_proc_does_not_show_is_dead_only_when_the_kernel_knows_no_such_pid():
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as process:
        identity = ProcessIdentity("here", boot_id(), process.pid, 1)
        assert not is_known_dead(identity)
    assert is_known_dead(identity)


@pytest.mark.usefixtures("hidden_processes")
def test_a_process_that_another_user_owns_is_alive(monkeypatch):
    def refuse(_pid: int, _signal: int) -> None:
        raise PermissionError

    monkeypatch.setattr(os, "kill", refuse)
    assert not is_known_dead(ProcessIdentity("here", boot_id(), 2**22 + 1, 1))


def test_sessions_of_other_machines_are_never_reaped_as_dead(world, monkeypatch):
    elsewhere = ProcessIdentity("elsewhere", "another-boot/pid:[1]", 2**22 + 1, 1)
    world.queue.start_session(device="cpu", now=world.now, alive_seconds=60, identity=elsewhere)
    assert not is_known_dead(elsewhere), "the same pid here says nothing about a process there"
    monkeypatch.setattr(sessions, "is_gone", lambda *_: True)
    assert world.queue.reap_dead(by="me", now=world.now) == (), "the queue leaves out other machines' sessions"


def test_a_job_whose_process_dies_each_time_fails_in_the_end(world):
    world.enqueue()
    me = world.session()
    for _ in range(MAX_LOST_IN_A_ROW):
        dead = ProcessIdentity("here", boot_id(), 2**22 + 1, 1)
        world.take(world.queue.start_session(device="cpu", now=world.now, alive_seconds=60, identity=dead))
        world.queue.reap_dead(by=me, now=world.now)
    assert world.find("full prepare").state == "failed"


def test_the_sessions_of_an_experiment_are_those_that_worked_on_it(world):
    one, two, three = world.session(), world.session(), world.session()
    world.enqueue("a")
    world.take(one)
    world.enqueue("b")
    world.take(two)
    assert [row.id for row in world.queue.sessions(experiment="b")] == [two]
    assert {row.id for row in world.queue.sessions()} == {one, two, three}


def test_an_unknown_session_is_an_error(world):
    with pytest.raises(QueueError, match="no session nobody"):
        world.queue.session("nobody")


def test_events_record_every_change_of_state_with_session_time_and_reason(world):
    world.enqueue(folds=(0,), epochs=1)
    session = world.session()
    world.now += 5
    world.finish(session)
    told = {}
    for event in world.queue.events(limit=1000):
        if event.job_id is not None:
            assert event.from_state == told.get(event.job_id)
            told[event.job_id] = event.to_state
    assert told == {job.id: job.state for job in world.queue.jobs()}
    claim = next(event for event in world.queue.events(by=session) if event.to_state == "leased")
    assert (claim.at, claim.experiment, claim.kind, claim.from_state, claim.why) == (
        world.now,
        "full",
        "prepare",
        "ready",
        "claimed",
    )


def test_events_can_be_narrowed_and_followed(world):
    world.enqueue("a", folds=(0, 1))
    world.now += 10
    world.enqueue("b")
    assert {event.experiment for event in world.queue.events(experiment="b")} == {"b"}
    assert {event.experiment for event in world.queue.events(since=world.now)} == {"b"}
    last = world.queue.events()[-1].id
    assert world.queue.events(after=last) == ()
    world.queue.note("the mount is gone", by="me", now=world.now, experiment_id=1)
    (note,) = world.queue.events(after=last)
    assert (note.why, note.by, note.experiment, note.job_id, note.to_state) == (
        "the mount is gone",
        "me",
        "a",
        None,
        None,
    )
    assert [event.why for event in world.queue.events(limit=1)] == ["the mount is gone"]
