"""Settings, environment variables and mounts decide where the parts of a project are."""

from __future__ import annotations

from pathlib import Path

import pytest
from small_project import make_project

from mbqueue import topology
from mbqueue.cli import doctor
from mbqueue.errors import UsageError
from mbqueue.mounts import Mount
from mbqueue.project import ProjectFolder, find_project
from mbqueue.settings import Settings
from mbqueue.topology import LIVE_VARIABLE, QUEUE_VARIABLE, Topology

SERVER, STORE = "postgresql://me@host/db", "s3://bucket/prefix"


@pytest.fixture
def find(tmp_path, monkeypatch):
    """Return a function that finds a project as if it were on the given type of file system."""
    root = make_project(tmp_path / "project").root

    def found(fstype: str, *, queue: str = "sqlite") -> ProjectFolder:
        monkeypatch.setattr(topology, "mount_of", lambda path: Mount(point=path, fstype=fstype, source="x"))
        monkeypatch.setenv(QUEUE_VARIABLE, queue)
        return find_project(root)

    return found


@pytest.mark.parametrize(
    ("fstype", "queue", "has_live_folder", "is_mirrored"),
    [
        ("ext4", "sqlite", False, False),
        ("ext4", SERVER, False, False),
        ("nfs4", "sqlite", True, True),
        ("nfs4", SERVER, False, False),
        ("fuse.drive", "sqlite", True, True),
        ("fuse.drive", SERVER, True, False),
    ],
)
def test_the_topology_follows_from_the_mount_and_the_queue(find, fstype, queue, has_live_folder, is_mirrored):
    found = find(fstype, queue=queue).topology
    assert (found.live is not None, found.is_mirrored) == (has_live_folder, is_mirrored)


def test_with_a_store_nothing_is_published_to_the_drive() -> None:
    assert not Topology(root=Path("p"), live=Path("live"), queue_url="", store=STORE).is_mirrored


def test_the_environment_names_the_live_folder_and_state_itself_means_none(find, tmp_path, monkeypatch):
    monkeypatch.setenv(LIVE_VARIABLE, str(tmp_path / "live"))
    assert find("ext4").live == tmp_path / "live"
    monkeypatch.setenv(LIVE_VARIABLE, "state")
    assert find("fuse.drive").live is None


@pytest.mark.parametrize(
    ("fstype", "queue", "live", "is_safe"),
    [
        ("nfs4", "sqlite", "state", False),
        ("nfs4", "sqlite", "", True),
        ("nfs4", SERVER, "state", True),
        ("ext4", "sqlite", "state", True),
    ],
)
def test_the_doctor_warns_of_a_queue_file_on_a_mount(find, monkeypatch, fstype, queue, live, is_safe):
    monkeypatch.setenv(LIVE_VARIABLE, live)
    monkeypatch.setattr(doctor, "mount_of", lambda path: Mount(point=path, fstype=fstype, source="x"))
    found = doctor._file_system(find(fstype, queue=queue))
    assert found.state == ("ok" if is_safe else "warning")
    assert (LIVE_VARIABLE in found.remedy) is not is_safe


@pytest.mark.parametrize(
    ("live", "queue_url", "store", "why"),
    [
        (Path("live"), SERVER, "", "only this machine can read the checkpoints in live"),
        (Path("live"), SERVER, STORE, None),
        (None, SERVER, "", None),
        (Path("live"), "", "", None),
    ],
)
def test_a_shared_queue_needs_commits_that_all_machines_can_read(live, queue_url, store, why):
    found = Topology(root=Path("p"), live=live, queue_url=queue_url, store=store)
    assert (found.why_not_shared is None) if why is None else (why in (found.why_not_shared or ""))
    if why is not None:
        with pytest.raises(UsageError, match=why):
            found.require_shared()


@pytest.mark.parametrize(
    ("live", "queue_url", "store", "publishes_to", "shared"),
    [
        (None, "", "", "", ""),
        (None, SERVER, "", "", "queue on the server"),
        (None, "", STORE, STORE, "store"),
        (None, SERVER, STORE, STORE, ""),
        (Path("live"), "", "", "p", ""),
        (Path("live"), "", STORE, STORE, ""),
        (Path("live"), SERVER, STORE, STORE, ""),
    ],
)
def test_each_topology_says_where_commits_are_and_what_a_copy_would_share(
    live: Path | None, queue_url: str, store: str, publishes_to: str, shared: str
) -> None:
    found = Topology(root=Path("p"), live=live, queue_url=queue_url, store=store)
    assert found.publishes_to == publishes_to
    assert found.shared_by_copies.startswith(shared)
    assert bool(found.shared_by_copies) == bool(shared)


def test_several_machines_cannot_share_a_queue_file_or_a_local_folder(find, monkeypatch):
    with pytest.raises(UsageError, match="Several machines cannot share"):
        find("nfs4").topology.require_launchable(2)
    with pytest.raises(UsageError, match="is also on a network mount"):
        find("nfs4").topology.require_launchable(1)  # `find` makes every path appear to be on NFS
    assert "is on a local disk" in (find("ext4").topology.require_launchable(2) or "")
    assert find("nfs4", queue=SERVER).topology.require_launchable(2) is None


def test_commands_for_queues_in_a_file_say_what_to_do_with_a_server() -> None:
    on_server = Topology(root=Path("p"), live=None, queue_url=SERVER, store="")
    with pytest.raises(UsageError, match=r"pg_dump.*or so"):
        on_server.require_queue_file("The backup", "or so")
    Topology(root=Path("p"), live=None, queue_url="", store="").require_queue_file("The backup", "or so")


def test_a_wrong_address_in_the_environment_is_refused(monkeypatch) -> None:
    monkeypatch.setenv(QUEUE_VARIABLE, "mysql://host")
    with pytest.raises(UsageError, match=QUEUE_VARIABLE):
        Topology.of(Path("p"), Settings(), live=None)
