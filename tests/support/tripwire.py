"""Count a process's file and database operations, and kill the process or raise an error at a chosen operation.

Below one folder, these operations count: opening a file to write, write(2), fsync, rename, link, unlink, rmdir and
mkdir. SQLite's BEGIN IMMEDIATE, changes and COMMIT also count, but not the file operations within a COMMIT.
"""

# This module replaces functions that pathlib calls, so it must not call them through pathlib.
# ruff: noqa: PTH100, PTH110, PTH112, PTH115, PTH118, PTH120, PTH202

from __future__ import annotations

import builtins
import errno
import io
import os
import shutil
import signal
import sqlite3
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lying_drive import AWAY

#: An errno → the error code that SQLite reports for it.
_SQLITE_CODES = {errno.ENOSPC: sqlite3.SQLITE_FULL, errno.EROFS: sqlite3.SQLITE_READONLY}
_CHANGES = ("BEGIN IMMEDIATE", "INSERT", "UPDATE", "DELETE", "COMMIT", "CREATE")


@dataclass(frozen=True, kw_only=True)
class Fault:
    """A fault to cause at a numbered operation.

    Attributes:
        at: number of the operation, from 1.
        action: "kill" ends the process before the operation. "lose" also ends the process, and discards bytes and names
            that were not synced, as a power loss may do. "fail" raises an error. "doubt" does the operation and then
            raises an error. "short" writes only half of the bytes. "end" sends SIGTERM and continues. "unmount" makes
            ``mount`` an empty folder, and sends SIGTERM ``later`` operations afterwards.
        number: the errno of the error.
        for_good: whether later operations fail too.
        only: the kinds of operation that count; all if empty.
        about: only operations on paths that contain this text count. This text helps to identify an operation, because
            the number of operations before it differs from run to run.
    """

    at: int
    action: str = "kill"
    number: int = errno.EIO
    for_good: bool = False
    only: Sequence[str] = ()
    about: str = ""
    mount: str = ""
    later: int = 0


class Tripwire:
    """Counts the operations below ``root``, writes each to ``trace``, and causes ``fault`` at its operation."""

    def __init__(self, root: Path, fault: Fault | None, trace: Path | None) -> None:
        self.root, self.fault = os.fspath(root), fault
        self.count = 0
        self._trace = None if trace is None else os.open(trace, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        self._lock = threading.RLock()
        self._unsynced: dict[str, int] = {}
        self._unsynced_names: list[tuple[str, str, bool]] = []
        self._unsynced_folders: list[str] = []

    def covers(self, path: object) -> bool:
        """Whether operations on ``path`` are counted."""
        return isinstance(path, str | os.PathLike) and os.path.abspath(os.fspath(path)).startswith(self.root)

    def step(self, kind: str, about: object) -> str:
        """Count an operation that is about to happen; return "short" or "doubt" if that is the fault's action."""
        fault = self.fault
        if fault is not None and ((fault.only and kind not in fault.only) or fault.about not in str(about)):
            return ""
        with self._lock:
            self.count += 1
            if self._trace is not None:
                os.write(self._trace, f"{self.count} {kind} {os.path.relpath(str(about), self.root)}\n".encode())
            return "" if fault is None or self.count < fault.at else self._happen(fault, kind, about)

    def _happen(self, fault: Fault, kind: str, about: object) -> str:
        is_first = self.count == fault.at
        if fault.action == "unmount":
            self._unmount(fault)
        elif not is_first and not fault.for_good:
            return ""
        elif fault.action == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        elif fault.action == "end":
            os.kill(os.getpid(), signal.SIGTERM)
        elif fault.action == "lose":
            self._lose()
            os.kill(os.getpid(), signal.SIGKILL)
        elif fault.action == "short" and is_first and kind == "write":
            return "short"
        elif fault.action == "doubt" and kind in {"write", "fsync", "rename", "unlink", "commit"}:
            return "doubt"
        else:
            self.fail(about)
        return ""

    def tell(self, what: str) -> None:
        """Write ``what`` and the time to the trace, without counting an operation."""
        if self._trace is not None:
            os.write(self._trace, f"- {what} {time.monotonic():.4f}\n".encode())

    def _unmount(self, fault: Fault) -> None:
        if self.count == fault.at:
            _real_rename(fault.mount, fault.mount + AWAY)
            _real_mkdir(fault.mount)
        elif self.count == fault.at + fault.later:
            os.kill(os.getpid(), signal.SIGTERM)

    def fail(self, about: object) -> None:
        """Raise the fault's error."""
        assert self.fault is not None
        raise OSError(self.fault.number, os.strerror(self.fault.number), str(about))

    # -- power loss --------------------------------------------------------------------------------------------------

    def wrote(self, path: str, size_before: int) -> None:
        """Record that the bytes of ``path`` beyond ``size_before`` have not been synced."""
        self._unsynced.setdefault(path, size_before)

    def synced(self, fd: int) -> None:
        """Record that a file's content or, if ``fd`` is a folder, the names in the folder have been synced."""
        path = os.readlink(f"/proc/self/fd/{fd}")
        self._unsynced.pop(path, None)
        self._unsynced_names = [entry for entry in self._unsynced_names if os.path.dirname(entry[1]) != path]
        self._unsynced_folders = [folder for folder in self._unsynced_folders if os.path.dirname(folder) != path]

    def renamed(self, source: str, target: str, replaced: bool) -> None:
        """Mark the new name as not synced."""
        if source in self._unsynced:
            self._unsynced[target] = self._unsynced.pop(source)
        self._unsynced_names.append((source, target, replaced))

    def made(self, folder: str) -> None:
        """Record that the name of a new folder has not been synced."""
        self._unsynced_folders.append(folder)

    def _lose(self) -> None:
        for path, size in self._unsynced.items():
            if os.path.exists(path):
                _real_truncate(path, size + (os.path.getsize(path) - size) // 2)
        for source, target, replaced in reversed(self._unsynced_names):
            # A rename that replaced a file cannot be undone, because the replaced content is gone.
            if not replaced and os.path.exists(target) and os.path.isdir(os.path.dirname(source)):
                _real_rename(target, source)
        for folder in self._unsynced_folders:
            shutil.rmtree(folder, ignore_errors=True)


_real_truncate, _real_rename, _real_mkdir = os.truncate, os.rename, os.mkdir


def install(wire: Tripwire) -> None:
    """Install the tripwire in this process, permanently; call this function only in a short-lived process."""
    import numpy as np

    np.lib.format.isfileobj = lambda _stream: False  # make NumPy write through Python's streams
    _install_steps(wire)
    _install_streams(wire)
    _install_names(wire)
    _install_database(wire)


def _install_steps(wire: Tripwire) -> None:
    from mbqueue.train import stepper

    real_step = stepper.begin_step

    def begin_step(*arguments: Any, **named: Any) -> Any:
        wire.tell("step")
        return real_step(*arguments, **named)

    stepper.begin_step = begin_step

    from mbqueue.drive.publishing import Publisher

    real_round = Publisher.round

    def publishing_round(*arguments: Any, **named: Any) -> bool:
        began = time.monotonic()
        done = real_round(*arguments, **named)
        wire.tell(f"published {time.monotonic() - began:.4f}")
        return done

    Publisher.round = publishing_round  # type: ignore[method-assign]


def _install_streams(wire: Tripwire) -> None:
    real_open = io.open

    class Raw(io.FileIO):
        def write(self, content: Any) -> int:
            what = wire.step("write", self.name)
            before = os.fstat(self.fileno()).st_size
            view = memoryview(content).cast("B")
            done = super().write(view[: len(view) // 2] if what == "short" and len(view) > 1 else view)
            wire.wrote(os.path.abspath(self.name), before)
            if what == "doubt":
                wire.fail(self.name)
            return done

    def opened(file: Any, mode: str = "r", buffering: int = -1, *arguments: Any, **named: Any) -> Any:
        if not (set(mode) & set("wax+") and wire.covers(file)):
            return real_open(file, mode, buffering, *arguments, **named)
        wire.step("open", file)
        raw = Raw(os.fspath(file), mode.replace("b", "").replace("t", ""))
        stream = io.BufferedRandom(raw) if "+" in mode else io.BufferedWriter(raw)
        return stream if "b" in mode else io.TextIOWrapper(stream, *arguments, **named)

    io.open = builtins.open = opened

    real_fsync = os.fsync

    def fsync(fd: int) -> None:
        path = os.readlink(f"/proc/self/fd/{fd}")
        what = wire.step("fsync", path) if wire.covers(path) else ""
        real_fsync(fd)
        wire.synced(fd)
        if what == "doubt":
            wire.fail(path)

    os.fsync = fsync


def _install_names(wire: Tripwire) -> None:
    def counted(kind: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(path: Any, *arguments: Any, **named: Any) -> Any:
            # `shutil.rmtree` passes names relative to an open folder, so the full path is unknown here.
            if named.get("dir_fd") is None and wire.covers(path):
                what = wire.step(kind, path)
                if kind == "mkdir":
                    real(path, *arguments, **named)
                    wire.made(os.path.abspath(path))
                    return None
                if kind == "rename":
                    replaced = os.path.exists(arguments[0])
                    real(path, *arguments, **named)
                    wire.renamed(os.path.abspath(path), os.path.abspath(arguments[0]), replaced)
                else:
                    real(path, *arguments, **named)
                if what == "doubt":
                    wire.fail(path)
                return None
            return real(path, *arguments, **named)

        return call

    for kind, names in {
        "rename": ("replace", "rename", "link"),
        "unlink": ("unlink", "remove"),
        "rmdir": ("rmdir",),
    }.items():
        for name in names:
            setattr(os, name, counted(kind, getattr(os, name)))
    os.mkdir = counted("mkdir", os.mkdir)


def _install_database(wire: Tripwire) -> None:
    def counted(statement: str, real: Callable[[], Any]) -> Any:
        word = statement.lstrip().upper()
        if not word.startswith(_CHANGES):
            return real()
        about = os.path.join(wire.root, " ".join(statement.split())[:60].replace("/", "|"))
        try:
            what = wire.step("commit" if word.startswith("COMMIT") else "sql", about)
            done = real()
            if what == "doubt":
                wire.fail(about)
        except OSError as error:
            failed = sqlite3.OperationalError(
                "database or disk is full" if error.errno == errno.ENOSPC else "disk I/O error"
            )
            failed.sqlite_errorcode = _SQLITE_CODES.get(error.errno or 0, sqlite3.SQLITE_IOERR)
            raise failed from None
        return done

    class Connection(sqlite3.Connection):
        def execute(self, statement: str, *arguments: Any) -> Any:
            return counted(statement, lambda: super(Connection, self).execute(statement, *arguments))

        def executemany(self, statement: str, *arguments: Any) -> Any:
            return counted(statement, lambda: super(Connection, self).executemany(statement, *arguments))

    real_connect = sqlite3.connect
    sqlite3.connect = lambda *arguments, **named: real_connect(*arguments, **{"factory": Connection, **named})
