from __future__ import annotations

from typing import Any

import pytest
from small_project import ManualClock, enqueue, small_spec

from mbqueue.project import ProjectFolder
from mbqueue.queue.jobs import Lease
from mbqueue.queue.store import Queue
from mbqueue.session.heartbeat import Heartbeat

LEASE_SECONDS = 100.0


@pytest.fixture
def held(project: ProjectFolder, clock: ManualClock) -> tuple[Queue, Lease, Heartbeat, list[str]]:
    """A queue, a lease, the heartbeat that renews the lease when a test calls `beat`, and the heartbeat's messages."""
    enqueue(project, small_spec(project))
    queue = Queue(project.queue_db)
    session = queue.start_session(device="cpu", now=clock.now(), alive_seconds=LEASE_SECONDS)
    lease = queue.claim(session, now=clock.now(), lease_seconds=LEASE_SECONDS)
    assert lease is not None
    troubles: list[str] = []
    heartbeat = Heartbeat(queue, session, lease_seconds=LEASE_SECONDS, clock=clock, on_trouble=troubles.append)
    heartbeat.hold(lease)
    return queue, lease, heartbeat, troubles


def lease_of_another(queue: Queue, project: ProjectFolder, clock: ManualClock) -> Lease:
    """Enqueue a second experiment, and lease its job to a second session."""
    enqueue(project, small_spec(project, "pretrained_infer"))
    session = queue.start_session(device="cpu", now=clock.now(), alive_seconds=LEASE_SECONDS)
    lease = queue.claim(session, now=clock.now(), lease_seconds=LEASE_SECONDS)
    assert lease is not None
    return lease


def test_heartbeats_keep_a_lease_beyond_its_length(
    held: tuple[Queue, Lease, Heartbeat, list[str]], clock: ManualClock
) -> None:
    queue, lease, heartbeat, _ = held
    for _beat in range(10):
        clock.advance(LEASE_SECONDS * 0.9)
        heartbeat.beat()
    assert queue.reap_expired(by="test", now=clock.now()) == 0
    assert queue.job(lease.job.id).session == lease.session


def test_a_lease_that_was_taken_back_is_withdrawn(
    held: tuple[Queue, Lease, Heartbeat, list[str]], clock: ManualClock
) -> None:
    queue, _, heartbeat, _ = held
    clock.advance(LEASE_SECONDS * 2)
    assert queue.reap_expired(by="test", now=clock.now()) == 1
    assert heartbeat.withdrawn is None
    heartbeat.beat()
    assert heartbeat.withdrawn is not None
    assert "no longer holds" in heartbeat.withdrawn


def test_a_beat_takes_over_expired_leases_of_others_and_keeps_its_own(
    held: tuple[Queue, Lease, Heartbeat, list[str]], project: ProjectFolder, clock: ManualClock
) -> None:
    queue, lease, heartbeat, _ = held
    other = lease_of_another(queue, project, clock)
    for state in ("leased", "ready"):
        clock.advance(LEASE_SECONDS * 0.6)
        heartbeat.beat()
        assert heartbeat.withdrawn is None
        assert queue.job(lease.job.id).session == lease.session
        assert queue.job(other.job.id).state == state


def test_the_first_session_to_wake_on_a_machine_takes_no_lease_from_the_other(
    held: tuple[Queue, Lease, Heartbeat, list[str]], project: ProjectFolder, clock: ManualClock
) -> None:
    queue, _, heartbeat, troubles = held
    lease = lease_of_another(queue, project, clock)
    other = Heartbeat(queue, lease.session, lease_seconds=LEASE_SECONDS, clock=clock, on_trouble=troubles.append)
    other.hold(lease)
    clock.advance(LEASE_SECONDS * 5)
    heartbeat.beat()
    other.beat()
    assert (other.withdrawn, heartbeat.withdrawn, troubles) == (None, None, [])
    for state in ("leased", "ready"):  # from here on, the other session does not send heartbeats
        clock.advance(LEASE_SECONDS * 0.6)
        heartbeat.beat()
        assert queue.job(lease.job.id).state == state


def test_a_heartbeat_that_waited_long_for_its_server_reaps_no_lease(
    held: tuple[Queue, Lease, Heartbeat, list[str]], project: ProjectFolder, clock: ManualClock
) -> None:
    queue, _, heartbeat, _ = held
    lease = lease_of_another(queue, project, clock)
    renew = queue.renew

    def cut_off(*arguments: Any, **options: Any) -> Lease:
        clock.advance(LEASE_SECONDS * 2)
        return renew(*arguments, **{**options, "now": clock.now()})

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(queue, "renew", cut_off)
        heartbeat.beat()
    assert queue.job(lease.job.id).state == "leased"


def test_after_a_clock_is_set_back_expired_leases_are_soon_taken_over(
    held: tuple[Queue, Lease, Heartbeat, list[str]], clock: ManualClock
) -> None:
    *_, heartbeat, _ = held
    assert heartbeat.may_reap()
    clock.advance(-1e6)
    assert not heartbeat.may_reap()
    for allowed in (False, False, False, True):
        clock.advance(LEASE_SECONDS * 0.4)
        heartbeat.beat()
        assert heartbeat.may_reap() is allowed


def test_a_paused_job_is_withdrawn_and_a_new_lease_starts_clean(
    held: tuple[Queue, Lease, Heartbeat, list[str]], clock: ManualClock
) -> None:
    queue, lease, heartbeat, _ = held
    queue.pause(lease.job.experiment, now=clock.now())
    heartbeat.beat()
    assert heartbeat.withdrawn == "paused"
    heartbeat.hold(lease)
    assert heartbeat.withdrawn is None


def test_progress_reaches_the_queue_with_the_next_beat(
    held: tuple[Queue, Lease, Heartbeat, list[str]], clock: ManualClock
) -> None:
    queue, lease, heartbeat, _ = held
    clock.advance(40.0)
    heartbeat.show({"what": "step", "done": 3, "total": 9}, 12.5)
    heartbeat.beat()
    assert queue.job(lease.job.id).progress == {"what": "step", "done": 3, "total": 9, "seconds": 40.0}
    assert queue.session(lease.session).structures_per_second == 12.5


def test_a_failed_beat_is_reported_and_withdraws_nothing(
    held: tuple[Queue, Lease, Heartbeat, list[str]], clock: ManualClock
) -> None:
    queue, lease, heartbeat, troubles = held
    queue.end_session(lease.session, reason="ended by another", now=clock.now())
    heartbeat.beat()
    assert len(troubles) == 1
    assert heartbeat.withdrawn is None
