"""What training reports to its caller after a step and after an epoch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, kw_only=True)
class StepReport:
    """A report on a finished optimizer step.

    Attributes:
        step: number of steps done in the epoch, from 1.
        steps_per_epoch: total number of steps in the epoch.
        loss: mean over the step's structures.
        mae: mean absolute error of the step's structures, in the unit of the target.
        structures: number of structures in the step.
        seconds: duration of the step, including the wait for data.
    """

    step: int
    steps_per_epoch: int
    loss: float
    mae: float
    structures: int
    seconds: float


@dataclass(frozen=True, kw_only=True)
class EpochOutcome:
    """The outcome of an epoch's training, either finished or stopped.

    Attributes:
        finished: whether the epoch has been trained, validated and committed.
        history_row: the epoch's row in the history; None if the epoch is unfinished.
        best: epoch, val_mae and commit of the best finished epoch; None if no epoch has finished.
        improved: whether this epoch is the best so far.
    """

    finished: bool
    history_row: dict[str, Any] | None
    best: dict[str, Any] | None
    improved: bool
