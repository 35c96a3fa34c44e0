"""A SQLite queue whose disk is full, whose folder is read-only, or whose file was replaced."""

from __future__ import annotations

import shutil
import sqlite3
import subprocess
import sys
from collections import namedtuple
from pathlib import Path

import pytest

from mbqueue.errors import QueueDamaged, QueueDiskFull, QueueReplaced
from mbqueue.queue.sqlite import settle
from mbqueue.queue.store import Queue

Usage = namedtuple("Usage", ["total", "used", "free"])


def test_no_thread_writes_to_a_queue_whose_file_was_replaced(
    tmp_path: Path,
) -> None:
    path = tmp_path / "queue.db"
    with Queue(path) as queue:
        session = queue.start_session(device="cpu", now=1.0, alive_seconds=60)
        for suffix in ("-wal", "-shm", ""):
            (tmp_path / f"queue.db{suffix}").rename(tmp_path / f"queue.db.replaced{suffix}")
        with Queue(path) as newer:
            assert newer.sessions() == ()
        for _ in range(2):
            with pytest.raises(QueueReplaced, match=r"was replaced.*mbqueue work"):
                queue.heartbeat(session, now=2.0, alive_seconds=60)
            queue.database._local.__dict__.clear()  # forget this thread's connection
    with Queue(path, read_only=True) as newer:
        assert newer.sessions() == ()
    with Queue(tmp_path / "queue.db.replaced", read_only=True) as before:
        assert before.session(session).heartbeat_at == 1.0


def test_a_queue_whose_file_is_gone_refuses_writes(tmp_path: Path) -> None:
    with Queue(tmp_path / "queue.db") as queue:
        queue.start_session(device="cpu", now=1.0, alive_seconds=60)
        (tmp_path / "queue.db").unlink()
        with pytest.raises(QueueReplaced):
            queue.start_session(device="cpu", now=1.0, alive_seconds=60)


@pytest.mark.parametrize("code", [sqlite3.SQLITE_IOERR, sqlite3.SQLITE_CANTOPEN])
@pytest.mark.parametrize("free", [0, 10**9])
def test_an_io_error_on_a_full_disk_is_reported_as_the_full_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int, free: int
) -> None:
    with Queue(tmp_path / "queue.db") as queue:
        monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(10**9, 10**9 - free, free))
        error = sqlite3.OperationalError("disk I/O error")
        error.sqlite_errorcode = code
        explained = queue.database._explained(error)  # type: ignore[attr-defined]
        assert isinstance(explained, QueueDiskFull) is (free == 0)
        assert ("cache prune" in str(explained)) is (free == 0)


def test_a_file_format_that_no_sqlite_knows_is_reported_as_damage(tmp_path: Path) -> None:
    path = tmp_path / "queue.db"
    Queue(path).close()
    settle(path)
    content = bytearray(path.read_bytes())
    content[47] ^= 1
    path.write_bytes(content)
    with pytest.raises(QueueDamaged, match="mbqueue recover"):
        Queue(path)


_READ_ON_A_MOUNT = """
import errno, os, sys
from ctypes import CDLL, c_char_p, c_ulong, get_errno
from pathlib import Path
from mbqueue.errors import MbqueueError
from mbqueue.queue.store import Queue

folder = os.fsencode(sys.argv[1])
libc = CDLL(None, use_errno=True)
CLONE_NEWUSER, CLONE_NEWNS, MS_RDONLY, MS_BIND, MS_REMOUNT, MS_PRIVATE = 1 << 28, 1 << 17, 1, 4096, 32, 1 << 18
REC = 16384
if libc.unshare(CLONE_NEWNS if os.geteuid() == 0 else CLONE_NEWUSER | CLONE_NEWNS):
    sys.exit(77)
libc.mount(b"none", b"/", None, c_ulong(REC | MS_PRIVATE), None)
if libc.mount(folder, folder, None, c_ulong(MS_BIND), None):
    sys.exit(77)
if libc.mount(folder, folder, None, c_ulong(MS_BIND | MS_REMOUNT | MS_RDONLY), None):
    sys.exit(77)
try:
    with Queue(Path(sys.argv[1]) / "queue.db", read_only=True) as queue:
        print([row.id for row in queue.sessions()])
except MbqueueError as error:
    print(error)
"""


@pytest.mark.parametrize("is_settled", [True, False])
def test_a_queue_on_a_read_only_mount_is_read_when_its_file_has_everything(tmp_path: Path, is_settled: bool) -> None:
    path = tmp_path / "queue.db"
    with Queue(path) as queue:
        session = queue.start_session(device="cpu", now=1.0, alive_seconds=60)
        if not is_settled:
            shutil.copytree(tmp_path, tmp_path / "copy", ignore=shutil.ignore_patterns("copy", "*-shm"))
    settle(path)
    folder = tmp_path if is_settled else tmp_path / "copy"
    done = subprocess.run(
        [sys.executable, "-c", _READ_ON_A_MOUNT, str(folder)], capture_output=True, text=True, check=False
    )
    if done.returncode == 77:
        pytest.skip("needs the right to mount, which root has: root could write to a folder without write bits")
    if is_settled:
        assert done.stdout.strip() == str([session]), done.stderr
    else:  # rows that are only in the write-ahead log must not be ignored silently
        assert "cannot be opened" in done.stdout, done.stderr
