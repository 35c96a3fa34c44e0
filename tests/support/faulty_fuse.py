"""A file system in user space that forwards everything to a folder, and fails on request.

    python faulty_fuse.py FOLDER MOUNTPOINT CONTROL

CONTROL is a file that says what fails: nothing if the file is empty, every write if it contains the name of an errno
(EIO, ENOSPC, EROFS), and every operation if it contains "ALL EIO". After SIGKILL, the mount answers ENOTCONN, like a
lost drive.

This script needs /dev/fuse, the package mfusepy, and libfuse (set FUSE_LIBRARY_PATH if libfuse is not installed).
"""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Any

import mfusepy as fuse

WRITING = {"create", "write", "fsync", "mkdir", "rename", "unlink", "rmdir", "truncate", "chmod", "utimens"}


def operation(method: Callable[..., Any]) -> Callable[..., Any]:
    """Make an operation use the folder's path instead of the mount's, and fail if the control file says so."""

    @wraps(method)
    def call(self: Passthrough, path: str, *arguments: Any) -> Any:
        words = self.control.read_text().split()
        if words and (words[0] == "ALL" or method.__name__ in WRITING):
            raise fuse.FuseOSError(getattr(errno, words[-1]))
        return method(self, self.root + path, *arguments)

    return call


class Passthrough(fuse.Operations):
    """Does every operation on ``root``, unless the control file makes it fail."""

    use_ns = True

    def __init__(self, root: str, control: str) -> None:
        self.root, self.control = root, Path(control)

    @operation
    def getattr(self, path: str, fh: int | None = None) -> dict[str, Any]:
        found = os.lstat(path)
        names = ("st_mode", "st_nlink", "st_uid", "st_gid", "st_size", "st_ino")
        times = {name: getattr(found, f"{name}_ns") for name in ("st_atime", "st_mtime", "st_ctime")}
        return {name: getattr(found, name) for name in names} | times

    @operation
    def readdir(self, path: str, fh: int) -> list[str]:
        return [".", "..", *os.listdir(path)]  # noqa: PTH208 - paths are text here

    @operation
    def open(self, path: str, flags: int) -> int:
        return os.open(path, flags)

    @operation
    def create(self, path: str, mode: int, fi: Any = None) -> int:
        return os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, mode)

    @operation
    def read(self, path: str, size: int, offset: int, fh: int) -> bytes:
        return os.pread(fh, size, offset)

    @operation
    def write(self, path: str, data: bytes, offset: int, fh: int) -> int:
        return os.pwrite(fh, data, offset)

    @operation
    def fsync(self, path: str, datasync: int, fh: int) -> None:
        os.fsync(fh)

    @operation
    def release(self, path: str, fh: int) -> None:
        os.close(fh)

    @operation
    def truncate(self, path: str, length: int, fh: int | None = None) -> None:
        os.truncate(path, length)

    @operation
    def mkdir(self, path: str, mode: int) -> None:
        os.mkdir(path, mode)  # noqa: PTH102

    @operation
    def rmdir(self, path: str) -> None:
        os.rmdir(path)  # noqa: PTH106

    @operation
    def unlink(self, path: str) -> None:
        os.unlink(path)  # noqa: PTH108

    @operation
    def rename(self, old: str, new: str) -> None:
        os.rename(old, self.root + new)  # noqa: PTH104

    @operation
    def chmod(self, path: str, mode: int) -> None:
        os.chmod(path, mode)  # noqa: PTH101

    @operation
    def utimens(self, path: str, times: tuple[int, int] | None = None) -> None:
        os.utime(path, ns=times)


if __name__ == "__main__":
    folder, mountpoint, control = sys.argv[1:]
    fuse.FUSE(Passthrough(folder, control), mountpoint, foreground=True, nothreads=True, fsname="faulty")
