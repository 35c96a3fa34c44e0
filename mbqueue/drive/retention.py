"""What of a line of files may be removed from a mount that uploads and removes in any order.

A file that was read back lies on this machine's disk, and a removal may reach the drive before the upload of what was
to take the removed file's place. If the machine is lost then, both are gone. So a file counts as settled only when it
has been on the mount for a while, and what it supersedes stays until then.
"""

from __future__ import annotations

from collections.abc import Sequence

#: A file that has been on a mount for this long is uploaded; drives take seconds to minutes for small files.
SETTLED_SECONDS = 1800.0
#: Of those that are not settled yet, the newest are kept in any case …
NEWEST = 8
#: … and of the others, where short epochs make many, so many.
SPACED = 6


def places_to_keep(seen_at: Sequence[float], now: float, *, kept: int, steady_since: float) -> set[int]:
    """Which files of a line to keep, as places in it; never more than ``kept`` + `NEWEST` + `SPACED`.

    Args:
        seen_at: when each was seen on the mount for the first time, the oldest work first; monotonic seconds.
        kept: so many of those that are settled are kept.
        steady_since: since when the mount has not failed; nothing is uploaded by one that is gone.
    """
    before = now - SETTLED_SECONDS
    settled = [place for place, at in enumerate(seen_at) if max(at, steady_since) <= before]
    # While none is settled, the drive has the oldest most likely.
    keep = set(settled[-kept:] or range(min(kept, len(seen_at))))
    newer = range(max(keep, default=-1) + 1, len(seen_at))
    last = seen_at[max(keep)] if keep else now
    # On a mount that fails again and again nothing settles, and they reach back further.
    apart = max(SETTLED_SECONDS, now - last) / SPACED
    for place in newer:
        if seen_at[place] - last >= apart:
            keep.add(place)
            last = seen_at[place]
    return keep | set(newer[-NEWEST:])
