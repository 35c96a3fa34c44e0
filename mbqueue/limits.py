"""Limits of the machine or the shell: errors that say nothing about a job or a file."""

from __future__ import annotations

import errno
import resource

from mbqueue.errors import LimitReached, causes


def why_limited(error: BaseException) -> LimitReached | None:
    """The limit that an error comes from, memory or the size of a file; None for any other error."""
    for one in (error, *causes(error, hidden=True)):
        number = one.errno if isinstance(one, OSError) else None
        if number == errno.EFBIG:
            named = f"{one.filename} " if isinstance(one, OSError) and one.filename else "A file "
            return LimitReached(
                f"{named}cannot grow beyond the limit of {size_of_files() or 'its file system'} on the size of a file "
                "(ulimit -f). Raise it (ulimit -f unlimited), then run the command again."
            )
        soft, _hard = resource.getrlimit(resource.RLIMIT_AS)
        # A library that finds no room in the address space is said to be missing.
        is_library = isinstance(one, ImportError | OSError) and "shared object" in str(one)
        # A GPU without memory says so in other words; PyTorch's allocator of the host in these.
        is_memory = isinstance(one, MemoryError) or number == errno.ENOMEM or "can't allocate memory" in str(one)
        if is_memory or (is_library and soft != resource.RLIM_INFINITY):
            told = "all of the machine's" if soft == resource.RLIM_INFINITY else _bytes(soft)
            return LimitReached(
                f"There is no memory left ({_first_line(one)}). This process may have {told} (ulimit -v). End other "
                "programs, raise the limit, or use a machine with more memory, then run the command again."
            )
    return None


def size_of_files() -> str:
    """The limit on the size of a file that this process writes, in words; empty if there is none."""
    soft, _hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    return "" if soft == resource.RLIM_INFINITY else _bytes(soft)


def _bytes(number: int) -> str:
    return f"{number / 1e6:,.0f} MB" if number >= 10**7 else f"{number / 1e3:,.0f} kB"


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
