"""Who is at work in a folder of the cache: its builders share it, whoever removes it has it alone.

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
    """Within the block, nobody prunes ``folder``; waits while somebody just does."""
    with ExitStack() as stack:
        with suppress(OSError):  # of a cache that cannot be written nothing is pruned, and it can be read all the same
            fcntl.flock(stack.enter_context(_lock_file(folder)), fcntl.LOCK_SH)
        yield


@contextmanager
def removing(folder: Path) -> Iterator[bool]:
    """Whether nobody builds in ``folder``; if so, nobody begins to within the block.

    Raises:
        CacheError: when the file system has no locks, so that nobody can tell.
    """
    with _lock_file(folder) as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
            return
        except OSError as error:
            raise CacheError(
                f"Whether somebody builds in {folder} cannot be told: its file system has no locks ({error}). When no "
                "session is at work, remove the folder by hand."
            ) from error
        yield True


def _lock_file(folder: Path) -> IO[bytes]:
    locks = folder.parent / "locks"
    make_folder(locks)
    return (locks / f"{folder.name}.lock").open("ab")
