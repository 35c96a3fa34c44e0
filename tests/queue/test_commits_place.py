"""The queue's record of where its commits are, on every backend."""

from __future__ import annotations

from pathlib import Path

import pytest
from processes import holding_open

from mbqueue.errors import QueueError
from mbqueue.queue.commits_place import CommitsPlace
from mbqueue.queue.processes import identity_of

STORE = CommitsPlace(id="11", kind="store", address="s3://bucket/one")
OTHER = CommitsPlace(id="22", kind="store", address="s3://bucket/two")
FOLDER = CommitsPlace(id="33", kind="folder", address="host:/project/state")


def test_a_new_queue_has_no_place_until_one_is_recorded(world, open_queue):
    assert world.queue.commits_place() is None
    world.queue.bind_commits(STORE, instead_of=None, by="a", now=world.now)
    assert open_queue().commits_place() == STORE
    (event,) = world.queue.events()
    assert (event.by, event.why) == ("a", "commits are in s3://bucket/one (id 11)")


def test_of_two_places_recorded_at_once_the_first_is_kept(world):
    """Both sessions see that no location is recorded, before the first session records one."""
    world.queue.bind_commits(STORE, instead_of=None, by="a", now=world.now)
    with pytest.raises(QueueError, match=r"s3://bucket/one \(id 11\)"):
        world.queue.bind_commits(OTHER, instead_of=None, by="b", now=world.now)
    world.session()
    same = CommitsPlace(id="11", kind="store", address="file:///mounted/elsewhere")
    world.queue.bind_commits(same, instead_of=None, by="b", now=world.now)  # the same store at a different address
    assert world.queue.commits_place() == STORE


def test_the_place_does_not_change_while_a_session_works(world):
    world.queue.bind_commits(FOLDER, instead_of=None, by="a", now=world.now)
    session = world.session()
    with pytest.raises(QueueError, match=f"Session {session} .*mbqueue stop"):
        world.queue.bind_commits(STORE, instead_of=FOLDER, by="b", now=world.now)
    world.queue.end_session(session, reason="test", now=world.now)
    world.queue.bind_commits(STORE, instead_of=FOLDER, by="b", now=world.now)
    assert world.queue.commits_place() == STORE
    assert "no longer in host:/project/state" in world.queue.events()[-1].why


def test_the_place_does_not_change_while_a_session_is_silent_but_its_process_lives(world):
    world.queue.bind_commits(FOLDER, instead_of=None, by="a", now=world.now)
    with holding_open(world.queue.database.file or Path(__file__)) as pid:
        session = world.queue.start_session(device="cpu", now=world.now, alive_seconds=0.0, identity=identity_of(pid))
        with pytest.raises(QueueError, match=f"Session {session} .*mbqueue stop"):
            world.queue.bind_commits(STORE, instead_of=FOLDER, by="b", now=world.now)
    assert world.queue.commits_place() == FOLDER
