"""Counting sorts and segment offsets, for summing a batch's rows."""

from __future__ import annotations

from typing import Any

import numpy as np

from mbqueue.data.machine_code import compiled


@compiled
def offsets_of(rows: Any, n: int) -> Any:
    """The start of the segment of each of ``n`` rows in sorted ``rows``, followed by the end; int32 [n + 1]."""
    offsets = np.zeros(n + 1, np.int32)
    for row in rows:
        offsets[row + 1] += 1
    for row in range(n):
        offsets[row + 1] += offsets[row]
    return offsets


@compiled
def sorted_by(rows: Any, offsets: Any) -> Any:
    """The stable order that sorts ``rows``, int32 [len(rows)], given the result of ``offsets_of`` for them."""
    free = offsets.copy()
    order = np.empty(len(rows), np.int32)
    for position in range(len(rows)):
        order[free[rows[position]]] = position
        free[rows[position]] += 1
    return order


@compiled
def first_places(rows: Any, n: int) -> Any:
    """The first position of each number below ``n`` in ``rows``, which must contain all of them, int32 [n]."""
    first = np.empty(n, np.int32)
    for position in range(len(rows) - 1, -1, -1):
        first[rows[position]] = position
    return first
