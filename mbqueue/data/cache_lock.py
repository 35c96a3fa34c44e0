"""Locks of a cache folder: shared between builders, exclusive for a process that removes the folder.

The lock is a file in ``locks/``, beside the folder, so that it outlives the folder. The system frees the lock when the
process ends.
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
    """Prevent pruning of ``folder`` within the block; if a process is pruning the folder, first wait for it."""
    with ExitStack() as stack:
        with suppress(OSError):  # a read-only cache is never pruned, and can still be read
            fcntl.flock(stack.enter_context(_lock_file(folder)), fcntl.LOCK_SH)
        yield


@contextmanager
def removing(folder: Path) -> Iterator[bool]:
    """Whether no process is building in ``folder``; if none is, none can start within the block.

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
                f"Cannot tell whether a session is building in {folder}: its file system has no locks ({error}). If no "
                "session is running, remove the folder by hand."
            ) from error
        yield True


def _lock_file(folder: Path) -> IO[bytes]:
    locks = folder.parent / "locks"
    make_folder(locks)
    return (locks / f"{folder.name}.lock").open("ab")
