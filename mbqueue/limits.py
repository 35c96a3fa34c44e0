"""Identify errors caused by a limit of the machine or the shell, not by a job or a file."""

from __future__ import annotations

import errno
import resource

from mbqueue.errors import LimitReached, causes, first_line


def why_limited(error: BaseException) -> LimitReached | None:
    """Find out whether a limit on memory or file size caused an error.

    Returns:
        An error that names the limit and what to do; None if no limit caused ``error``.
    """
    for one in (error, *causes(error, hidden=True)):
        number = one.errno if isinstance(one, OSError) else None
        if number == errno.EFBIG:
            named = f"{one.filename} " if isinstance(one, OSError) and one.filename else "A file "
            return LimitReached(
                f"{named}cannot grow beyond the file size limit of {size_of_files() or 'its file system'} (ulimit -f). "
                "Raise the limit (ulimit -f unlimited), then run the command again."
            )
        soft, _hard = resource.getrlimit(resource.RLIMIT_AS)
        # If the process has no address space left, the dynamic loader reports a library as missing.
        is_library = isinstance(one, ImportError | OSError) and "shared object" in str(one)
        # PyTorch's CPU allocator reports "can't allocate memory"; its GPU errors are worded differently.
        is_memory = isinstance(one, MemoryError) or number == errno.ENOMEM or "can't allocate memory" in str(one)
        if is_memory or (is_library and soft != resource.RLIM_INFINITY):
            told = "the machine's memory" if soft == resource.RLIM_INFINITY else _bytes(soft)
            return LimitReached(
                f"There is no memory left ({first_line(one)}). The limit of this process is {told} (ulimit -v). End "
                "other programs, raise the limit, or use a machine with more memory, then run the command again."
            )
    return None


def size_of_files() -> str:
    """This process's limit on the size of a file, for example ``500 MB``; empty if there is none."""
    soft, _hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    return "" if soft == resource.RLIM_INFINITY else _bytes(soft)


def _bytes(number: int) -> str:
    return f"{number / 1e6:,.0f} MB" if number >= 10**7 else f"{number / 1e3:,.0f} kB"
