"""Lock a cache folder: builders take a shared lock, and a process that removes the folder takes an exclusive lock.

The lock file is in ``locks/``, next to the cache folder, so removing the folder leaves the lock file in place. The
system releases a process's lock when the process ends.
"""

from __future__ import annotations

import fcntl
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import IO

from mbqueue.errors import CacheError
from mbqueue.files import make_folder


@contextmanager
def building(folder: Path) -> Iterator[None]:
    """Protect ``folder`` from removal within a ``with`` block; if a process is already removing it, wait first."""
    with ExitStack() as stack:
        with suppress(OSError):  # a read-only cache cannot be removed, so it needs no lock
            fcntl.flock(stack.enter_context(_lock_file(folder)), fcntl.LOCK_SH)
        yield


@contextmanager
def removing(folder: Path) -> Iterator[bool]:
    """Yield whether ``folder`` is locked for removal; False means that a process is building the cache.

    Raises:
        CacheError: if the file system does not support locks.
    """
    with _lock_file(folder) as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
            return
        except OSError as error:
            raise CacheError(
                f"Cannot tell whether a session is building {folder}, because the file system does not support locks "
                f"({error}). If no session is running, remove the folder by hand."
            ) from error
        yield True


def _lock_file(folder: Path) -> IO[bytes]:
    locks = folder.parent / "locks"
    make_folder(locks)
    return (locks / f"{folder.name}.lock").open("ab")
