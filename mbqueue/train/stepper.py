"""Run an epoch's steps; on a GPU, each step begins before the result of the previous step is read."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence

import torch

from mbqueue.clock import Clock
from mbqueue.train.arrivals import Arrived
from mbqueue.train.feeds import Feed
from mbqueue.train.learner import Learner
from mbqueue.train.objective import Objective
from mbqueue.train.outcome import StepReport
from mbqueue.train.step import Guard, Step, begin_step


def steps_in_flight(device: torch.device) -> int:
    """Return the maximum number of uncounted steps in flight; 0 on the CPU, where steps cannot overlap."""
    return 1 if device.type == "cuda" else 0


class Stepper:
    """Begins a learner's steps, and counts each step once its result is known.

    The learner's state includes only counted steps, so call `settle` before copying the state.

    Args:
        ids: id of every crystal of the dataset, for errors.
        on_step: called after every counted step.
    """

    def __init__(
        self,
        learner: Learner,
        feed: Feed,
        objective: Objective,
        *,
        device: torch.device,
        ids: Sequence[str],
        clock: Clock,
        on_step: Callable[[StepReport], None],
    ) -> None:
        self._learner, self._feed, self._objective, self._ids = learner, feed, objective, ids
        self._clock, self._on_step = clock, on_step
        self._lead = steps_in_flight(device)
        self._parameters = [parameter for parameter in learner.trained.values() if parameter.requires_grad]
        self._guard = Guard(learner.optimizer, device)
        self._begun: deque[Step] = deque()
        self._counted_at = clock.monotonic()

    def step(self, batches: Sequence[Arrived]) -> None:
        """Begin one step over all ``batches`` together, then count the earlier steps and, on the CPU, this step.

        Raises:
            NonFiniteLoss: if a step's loss or gradient is not finite; the error names the step's crystals, and neither
                that step nor a later one changes the weights.
            OutOfMemory: if a batch does not fit in the device's memory; the step does not begin.
        """
        learner = self._learner
        step = begin_step(
            learner.model,
            self._feed,
            batches,
            objective=self._objective,
            optimizer=learner.optimizer,
            guard=self._guard,
            parameters=self._parameters,
            rate=learner.rate,
        )
        learner.begin()
        self._begun.append(step)
        self.settle(leave=self._lead)

    def settle(self, *, leave: int = 0) -> None:
        """Finish and count the steps in flight, except the last ``leave`` steps.

        Raises:
            NonFiniteLoss: for the same reasons as in `step`.
        """
        while len(self._begun) > leave:
            step = self._begun.popleft()
            result = step.result(self._ids)
            now = self._clock.monotonic()
            seconds, self._counted_at = now - self._counted_at, now
            self._learner.count(result, seconds)
            self._on_step(
                StepReport(
                    step=self._learner.step,
                    steps_per_epoch=self._learner.steps_per_epoch,
                    loss=result.loss / result.structures,
                    mae=result.abs_error / result.structures,
                    structures=result.structures,
                    seconds=seconds,
                )
            )
