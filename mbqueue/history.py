"""Find the best epoch in a fold's history, and decide whether training stops early.

A history is the list of rows in ``history_fold_i.csv``, one per epoch, as read by `mbqueue.results.tables`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any


def best_epoch(history: Sequence[Mapping[str, Any]]) -> tuple[int, float] | None:
    """Find the epoch with the lowest validation MAE.

    Returns:
        The epoch (in a tie, the earliest) and its MAE; None if the history is empty.
    """
    if not history:
        return None
    best = min(history, key=lambda row: (row["val_mae"], row["epoch"]))
    return best["epoch"], best["val_mae"]


def is_out_of_patience(patience: int, *, epoch: int, best: int) -> bool:
    """Whether to stop training after ``epoch``: yes, if the ``best`` epoch was at least ``patience`` epochs earlier.

    A patience of 0 turns early stopping off.
    """
    return 0 < patience <= epoch - best
