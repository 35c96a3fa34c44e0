"""Locks of a folder of the cache: builders share it, and a process that removes it has it alone.

The lock is a file beside the folder, in ``locks/``, so that it outlives the folder. The system frees it with the
process.
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
    """Keep ``folder`` from being pruned within the block; waits while a process prunes it."""
    with ExitStack() as stack:
        with suppress(OSError):  # of a cache that cannot be written nothing is pruned, and it can be read all the same
            fcntl.flock(stack.enter_context(_lock_file(folder)), fcntl.LOCK_SH)
        yield


@contextmanager
def removing(folder: Path) -> Iterator[bool]:
    """Whether no process builds in ``folder``; if so, none begins to within the block.

    Raises:
        CacheError: if the file system has no locks, so that it is unknown.
    """
    with _lock_file(folder) as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
            return
        except OSError as error:
            raise CacheError(
                f"It is unknown whether a session builds in {folder}: its file system has no locks ({error}). When no "
                "session runs, remove the folder by hand."
            ) from error
        yield True


def _lock_file(folder: Path) -> IO[bytes]:
    locks = folder.parent / "locks"
    make_folder(locks)
    return (locks / f"{folder.name}.lock").open("ab")
