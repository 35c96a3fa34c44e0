"""Use a queue through a real PgBouncer in transaction mode, as hosted databases often require.

pytest does not collect this file, because pip cannot install PgBouncer. The other tests use an imitation
(`tests/support/transaction_pooler.py`). Install `pgbouncer` with the system's package manager, then run:

    pytest tests/queue/pgbouncer_check.py
"""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from children import claimed, drained, start_draining
from postgres_server import PostgresServer, free_port
from processes import until

from mbqueue.queue import State
from mbqueue.queue.opening import open_on_server
from mbqueue.queue.postgresql import listening
from mbqueue.queue.postgresql import server as server_module

_SETTINGS = """
[databases]
* = host=127.0.0.1 port={server}
[pgbouncer]
listen_addr = 127.0.0.1
listen_port = {port}
unix_socket_dir =
auth_type = trust
auth_file = {folder}/users
logfile = {folder}/log
pool_mode = transaction
default_pool_size = 2
max_client_conn = 200
"""


@pytest.fixture
def through(postgres_server: PostgresServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The URL of a queue behind a PgBouncer with two connections to the server."""
    program = shutil.which("pgbouncer", path=f"{os.environ['PATH']}:/usr/sbin")
    assert program, "Install PgBouncer with the system's packages (apt-get install pgbouncer)."
    folder, port = tmp_path_factory.mktemp("pgbouncer"), free_port()
    for readable in (folder, *folder.parents[:2]):
        readable.chmod(0o755)
    folder.chmod(0o777)
    (folder / "users").write_text('"postgres" ""\n')
    (folder / "settings").write_text(_SETTINGS.format(server=postgres_server.port, port=port, folder=folder))
    user = "nobody" if os.geteuid() == 0 else None  # pgbouncer refuses to run as root
    with subprocess.Popen([program, "-q", str(folder / "settings")], user=user) as process:
        until(lambda: "process up" in _text(folder / "log"), process)
        yield postgres_server.url(port=port)
        process.terminate()


def _text(path: Path) -> str:
    return path.read_text() if path.exists() else ""


@pytest.fixture(autouse=True)
def _no_grace(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let leases expire as soon as the server has started."""
    monkeypatch.setattr(server_module, "GRACE_SECONDS", 0.0)


def test_three_processes_do_all_jobs_and_a_waiting_worker_polls(through, make_spec, tmp_path, monkeypatch):
    monkeypatch.setattr(listening, "_PROOF_SECONDS", 0.3)
    with open_on_server(through) as queue:
        queue.enqueue(make_spec(folds=(0, 1, 2, 3, 4), epochs=9), results_dir="r", now=0.0)
        waited: list[float] = []
        queue.database.wait(2.0, lambda seconds: bool(waited.append(seconds)))
        assert waited == [2.0]
        drained(queue, start_draining(through, tmp_path, n=3))
        queue.verify()
        assert queue.overview(now=0.0)["jobs"]["committed"] == len(queue.jobs())


def test_a_server_that_restarts_during_a_commit_costs_nothing(through, make_spec, postgres_server):
    with open_on_server(through) as queue:
        _, lease = claimed(queue, make_spec)
        published = []

        def publish() -> None:
            published.append(lease.job.epoch)
            postgres_server.restart()

        following = queue.commit_and_claim(lease, result={}, now=0.0, lease_seconds=60, publish=publish)
        assert published == [1]
        assert following.job.epoch == 2
        assert [job.label for job in queue.jobs(state=State.LEASED)] == ["full fold 0 epoch 2"]
