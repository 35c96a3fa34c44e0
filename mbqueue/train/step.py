"""Run an optimizer step over several micro-batches, or inference over many crystals."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from mbqueue.data.batches import Distortion
from mbqueue.errors import ONLY_UNDER_A_NEW_NAME, NonFiniteLoss
from mbqueue.train.arrivals import Arrived, Fetch, arriving
from mbqueue.train.feeds import Feed, Rows, host_batches, pack
from mbqueue.train.gated import gradient_scale
from mbqueue.train.memory import DeviceMemory, OutOfMemory, Shortage, is_out_of_memory
from mbqueue.train.objective import Objective
from mbqueue.train.optim import set_learning_rate

_LISTED = 70


@dataclass(frozen=True, kw_only=True)
class StepResult:
    """The result of one optimizer step.

    Attributes:
        loss: sum of the loss over the step's structures.
        abs_error: sum of the absolute errors, in the unit of the target.
        grad_norm: norm of the gradient before clipping.
        structures: number of structures in the step.
    """

    loss: float
    abs_error: float
    grad_norm: float
    structures: int


class Guard:
    """A flag on the device that keeps a non-finite step, and all later steps, from changing the weights.

    AdamW reads the flag (``found_inf``) on the device, so the host does not wait. If the flag is set, AdamW updates
    neither weights nor moments.

    Args:
        optimizer: a fused optimizer, which obeys the flag from now on.
        device: the device that holds the flag.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, device: torch.device) -> None:
        self._is_raised = torch.zeros((), dtype=torch.float32, device=device)
        optimizer.found_inf = self._is_raised  # type: ignore[attr-defined]

    def see(self, figures: Tensor) -> None:
        """Set the flag permanently if a value in ``figures`` is not finite."""
        # Zero times the sum is NaN if a value is not finite. Testing only the sum saves kernel launches.
        torch.maximum(self._is_raised, (figures.sum() * 0).ne(0), out=self._is_raised)


class Step:
    """An optimizer step that the device may still be computing.

    Args:
        figures: sum of the loss, sum of the absolute errors and norm of the gradient, float64 [3], on the device.
        rows: rows of the step's crystals.
    """

    def __init__(self, figures: Tensor, rows: list[int]) -> None:
        self._rows = rows
        self._figures = Fetch([figures])

    def result(self, ids: Sequence[str]) -> StepResult:
        """Wait for the step's result.

        Args:
            ids: id of every crystal of the dataset, for errors.

        Raises:
            NonFiniteLoss: if the loss or gradient is not finite; the error names the crystals, and the weights are
                unchanged.
        """
        [figures] = self._figures.wait()
        loss, error, norm = figures.tolist()
        if not math.isfinite(loss + norm):
            raise NonFiniteLoss(
                f"The loss ({loss}) or the gradient norm ({norm}) is not finite; the weights are unchanged. "
                f"The batch contains: {', '.join(ids[row] for row in self._rows)}. Check these crystals' targets and "
                f"interatomic distances, or lower train.lr. {ONLY_UNDER_A_NEW_NAME}"
            )
        return StepResult(loss=loss, abs_error=error, grad_norm=norm, structures=len(self._rows))


def begin_step(
    model: nn.Module,
    feed: Feed,
    batches: Sequence[Arrived],
    *,
    objective: Objective,
    optimizer: torch.optim.Optimizer,
    guard: Guard,
    parameters: Sequence[nn.Parameter],
    rate: float,
) -> Step:
    """Begin one optimizer step over the crystals of all ``batches`` together, without waiting for a GPU.

    Args:
        batches: the micro-batches, whose gradients add up to the gradient of the whole batch.

    Raises:
        OutOfMemory: if a batch does not fit in the device's memory, in which case no weight changes.
    """
    rows = [row for arrived in batches for row in arrived.rows]
    optimizer.zero_grad(set_to_none=True)
    totals = torch.zeros(2, dtype=torch.float64, device=parameters[0].device)
    arrived = batches[0]
    try:
        for arrived in batches:
            _add_gradient(model, feed, arrived.batch, objective=objective, structures=len(rows), totals=totals)
        for parameter in parameters:
            # In a batch without angles, bond and angle layers get no gradient. Parameters without a gradient must still
            # decay and keep their momentum, or the result would depend on how crystals are batched.
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        scale = gradient_scale(len(rows))
        if scale != 1:
            torch._foreach_mul_([parameter.grad for parameter in parameters if parameter.grad is not None], 1 / scale)
        # Without a clip_norm, clip_grad_norm_ only measures the norm.
        norm = nn.utils.clip_grad_norm_(parameters, objective.spec.clip_norm or math.inf)
        figures = torch.cat([totals, norm[None].double()])
        guard.see(figures)
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        optimizer.zero_grad(set_to_none=True)
        raise OutOfMemory(Shortage(arrived.rows, str(error))) from error
    set_learning_rate(optimizer, rate)
    # Running out of memory here is unlikely, because the backward pass has released its memory. An error here could
    # leave only some weights changed, so do not catch errors: the job then ends and resumes from its last commit.
    optimizer.step()
    return Step(figures, rows)


def _add_gradient(
    model: nn.Module, feed: Feed, batch: Any, *, objective: Objective, structures: int, totals: Tensor
) -> None:
    """Add one micro-batch's gradient to the step's gradient, and its loss and absolute error to ``totals``.

    When this function returns or fails, its locals and their device memory are freed.
    """
    output = feed.predict(model, batch)
    loss = objective.loss_sum(output, batch.targets)
    scale = gradient_scale(structures)
    (loss / structures if scale == 1 else loss * (scale / structures)).backward()  # type: ignore[no-untyped-call]
    totals += torch.stack([loss.detach(), objective.abs_error_sum(output.detach(), batch.targets)])


def listed(ids: Sequence[str]) -> str:
    """Join crystal ids for an error message; after the first 70, say only how many more there are."""
    more = f" and {len(ids) - _LISTED} more" if len(ids) > _LISTED else ""
    return ", ".join(ids[:_LISTED]) + more


def infer(
    feed: Feed,
    rows: Rows,
    compute: Callable[[Any], Sequence[Tensor]],
    *,
    batch_size: int,
    max_bonds: int,
    device: torch.device,
    memory: DeviceMemory,
    ids: Sequence[str],
    distortion: Distortion | None = None,
    should_stop: Callable[[], bool] = lambda: False,
    on_part: Callable[[list[Tensor]], None] = lambda _part: None,
) -> list[NDArray[np.float32]] | None:
    """Run ``compute`` on batches of all ``rows``, in order and without autograd; return None if stopped.

    Args:
        compute: a function of a batch on the device that returns tensors whose first dimension is crystals or atoms.
            `infer` concatenates the tensors of all batches.
        on_part: called with the outputs of each batch, in order.

    Raises:
        DeviceTooSmall, DeviceBusy: if a single crystal does not fit on the device.
    """
    found: list[list[Tensor]] = []
    done = 0

    def keep(part: list[Tensor]) -> None:
        found.append(part)
        on_part(part)

    while done < len(rows):
        limit = min(batch_size, memory.limit)
        parts = pack(rows[done:], feed.costs, largest_count=limit, largest_cost=max_bonds)
        batches = host_batches(feed, [[part] for part in parts], pinned=device.type == "cuda", distortion=distortion)
        shortage, running = None, None
        with contextlib.closing(batches), torch.inference_mode():
            for [arrived] in arriving(batches, device):
                if should_stop():
                    return None
                try:
                    begun = Fetch([tensor.float() for tensor in compute(arrived.batch)])
                except RuntimeError as error:
                    if not is_out_of_memory(error):
                        raise
                    shortage = Shortage(arrived.rows, str(error))
                    break
                # A GPU computes this batch while the host reads the results of the previous batch.
                if running is not None:
                    keep(running.wait())
                running = begun
                done += len(arrived.rows)
            if running is not None:
                keep(running.wait())
        if shortage is not None:
            memory.make_room(shortage, device, ids)
    return [np.concatenate([tensor.numpy() for tensor in column]) for column in zip(*found, strict=True)]
