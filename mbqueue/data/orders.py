"""Sort rows by counting, and find the segments of equal rows, for sums over a batch."""

from __future__ import annotations

from typing import Any

import numpy as np

from mbqueue.data.machine_code import compiled


@compiled
def offsets_of(rows: Any, n: int) -> Any:
    """The position in sorted ``rows`` at which the entries of each number from 0 to n begin, int32 [n + 1]."""
    offsets = np.zeros(n + 1, np.int32)
    for row in rows:
        offsets[row + 1] += 1
    for row in range(n):
        offsets[row + 1] += offsets[row]
    return offsets


@compiled
def sorted_by(rows: Any, offsets: Any) -> Any:
    """The positions that sort ``rows`` (stably), int32 [len(rows)]; ``offsets`` comes from ``offsets_of``."""
    free = offsets.copy()
    order = np.empty(len(rows), np.int32)
    for position in range(len(rows)):
        order[free[rows[position]]] = position
        free[rows[position]] += 1
    return order


@compiled
def first_places(rows: Any, n: int) -> Any:
    """The first position in ``rows`` of each number from 0 to n − 1, int32 [n]; all these numbers must occur."""
    first = np.empty(n, np.int32)
    for position in range(len(rows) - 1, -1, -1):
        first[rows[position]] = position
    return first
