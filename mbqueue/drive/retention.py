"""Which superseded files may be removed from a mount that uploads and removes in any order.

A file that was read back is on this machine's disk, and a removal may reach the drive before the upload of the file's
successor. If the machine is lost in between, both files are gone. A file therefore counts as settled only after some
time on the mount, and the files that it supersedes stay until then.
"""

from __future__ import annotations

from collections.abc import Sequence

#: Seconds after which a file on a mount counts as uploaded; drives take seconds to minutes for small files.
SETTLED_SECONDS = 1800.0
#: This many of the newest unsettled files are always kept.
NEWEST = 8
#: At most this many of the other unsettled files are kept, spread over the line.
SPACED = 6


def positions_to_keep(seen_at: Sequence[float], now: float, *, kept: int, steady_since: float) -> set[int]:
    """The positions of the files to keep in a line; at most ``kept`` + `NEWEST` + `SPACED`.

    Args:
        seen_at: when each file was first seen on the mount, the oldest work first; monotonic seconds.
        kept: number of settled files to keep.
        steady_since: since when the mount has not failed; files on a failed mount are not uploaded.
    """
    before = now - SETTLED_SECONDS
    settled = [position for position, at in enumerate(seen_at) if max(at, steady_since) <= before]
    # While no file is settled, the oldest is most likely to be on the drive.
    keep = set(settled[-kept:] or range(min(kept, len(seen_at))))
    newer = range(max(keep, default=-1) + 1, len(seen_at))
    last = seen_at[max(keep)] if keep else now
    # On a mount that keeps failing, no file settles, so the files to keep are spread further apart.
    apart = max(SETTLED_SECONDS, now - last) / SPACED
    for position in newer:
        if seen_at[position] - last >= apart:
            keep.add(position)
            last = seen_at[position]
    return keep | set(newer[-NEWEST:])
