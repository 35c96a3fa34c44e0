"""Decide which superseded files to keep on a mount that uploads and removes files in any order.

A mount may delete a superseded file from the drive before it uploads the successor. If the machine is lost between
deletion and upload, both files are gone. mbqueue therefore keeps a superseded file until its successor has been on the
mount long enough to count as uploaded ("settled").
"""

from __future__ import annotations

from collections.abc import Sequence

#: Seconds after which a file on a mount counts as uploaded. Uploading a small file takes seconds to minutes.
SETTLED_SECONDS = 1800.0
#: Among files that may not have been uploaded yet, keep this many of the newest.
NEWEST = 8
#: Among files that may not have been uploaded yet, keep at most this many older ones, spread over time.
SPACED = 6


def positions_to_keep(seen_at: Sequence[float], now: float, *, kept: int, steady_since: float) -> set[int]:
    """Return the positions in ``seen_at`` of the files to keep, at most ``kept`` + `NEWEST` + `SPACED`.

    Args:
        seen_at: when each file was first seen on the mount, in monotonic seconds, sorted from the oldest work to the
            newest.
        kept: number of settled files to keep.
        steady_since: monotonic time of the mount's last failure, or of the publisher's start. While the mount is
            failing, it uploads nothing.
    """
    before = now - SETTLED_SECONDS
    settled = [position for position, at in enumerate(seen_at) if max(at, steady_since) <= before]
    # While no file counts as uploaded, keep the oldest files, because they are the most likely to have been uploaded.
    keep = set(settled[-kept:] or range(min(kept, len(seen_at))))
    newer = range(max(keep, default=-1) + 1, len(seen_at))
    last = seen_at[max(keep)] if keep else now
    # While a mount keeps failing, no file counts as uploaded, so spread the kept files further apart.
    apart = max(SETTLED_SECONDS, now - last) / SPACED
    for position in newer:
        if seen_at[position] - last >= apart:
            keep.add(position)
            last = seen_at[position]
    return keep | set(newer[-NEWEST:])
