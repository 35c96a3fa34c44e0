"""One optimizer step, and inference over many crystals: the two things that are done with batches."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from chgnet.model import CHGNet
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from mbqueue.data.batches import Distortion
from mbqueue.errors import NonFiniteLoss
from mbqueue.experiment import TrainSpec
from mbqueue.train.feeds import Feed, Rows, host_batches, pack
from mbqueue.train.memory import DeviceMemory, OutOfMemory, Shortage, is_out_of_memory
from mbqueue.train.optim import set_learning_rate

_LISTED = 70


@dataclass(frozen=True, kw_only=True)
class StepResult:
    """What one optimizer step gave.

    Attributes:
        loss: sum of the loss over the step's structures.
        abs_error: sum of the absolute errors, eV/atom.
        grad_norm: norm of the gradient before clipping.
        structures: how many.
    """

    loss: float
    abs_error: float
    grad_norm: float
    structures: int


def loss_sum(spec: TrainSpec, predicted: Tensor, target: Tensor) -> Tensor:
    """Sum of the loss over a batch, eV/atom (or its square)."""
    if spec.loss == "l1":
        return functional.l1_loss(predicted, target, reduction="sum")
    if spec.loss == "l2":
        return functional.mse_loss(predicted, target, reduction="sum")
    return functional.huber_loss(predicted, target, reduction="sum", delta=spec.huber_delta)


def optimizer_step(
    model: CHGNet,
    feed: Feed,
    batches: Sequence[Any],
    *,
    spec: TrainSpec,
    optimizer: torch.optim.Optimizer,
    parameters: Sequence[nn.Parameter],
    rate: float,
    device: torch.device,
    ids: Sequence[str],
) -> StepResult:
    """One step of the optimizer over the crystals of all ``batches`` together.

    Args:
        batches: the micro-batches, in host memory; their gradients add up to that of one batch.
        parameters: what is trained in this step.
        ids: id of every crystal of the dataset, for errors.

    Raises:
        NonFiniteLoss: before the weights are touched, with the ids of the crystals.
        OutOfMemory: before the weights are touched.
    """
    structures = sum(len(batch) for batch in batches)
    optimizer.zero_grad(set_to_none=True)
    totals = torch.zeros(2, dtype=torch.float64, device=device)
    batch = batches[0]
    try:
        for batch in batches:
            _add_gradient(model, feed, batch, spec=spec, structures=structures, totals=totals, device=device)
        for parameter in parameters:
            # A parameter that this batch does not reach (no angles in it) must still decay and keep its momentum,
            # or the result would depend on how crystals are batched.
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        # Clipping by infinity only measures.
        norm = nn.utils.clip_grad_norm_(parameters, spec.clip_norm or math.inf)
        loss_total, error_total, grad_norm = torch.cat([totals, norm[None].double()]).tolist()  # the one device sync
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        optimizer.zero_grad(set_to_none=True)
        raise OutOfMemory(Shortage(batch.rows.tolist(), str(error))) from error
    if not math.isfinite(loss_total + grad_norm):
        optimizer.zero_grad(set_to_none=True)
        names = [ids[row] for batch in batches for row in batch.rows.tolist()]
        raise NonFiniteLoss(
            f"The loss ({loss_total}) or the gradient norm ({grad_norm}) is not finite; the weights are as before the "
            f"step. The batch: {', '.join(names)}. Look at these crystals' targets and distances, or "
            "lower train.lr, then retry."
        )
    set_learning_rate(optimizer, rate)
    # Out of memory in here would leave some weights changed and others not. It is not caught, so that the job ends and
    # goes on from its last commit; there is hardly a way to it, since what the gradient took is free again.
    optimizer.step()
    return StepResult(loss=loss_total, abs_error=error_total, grad_norm=grad_norm, structures=structures)


def _add_gradient(
    model: CHGNet, feed: Feed, batch: Any, *, spec: TrainSpec, structures: int, totals: Tensor, device: torch.device
) -> None:
    """Add one micro-batch's gradient to that of the step, and its loss and absolute error to ``totals``.

    What it takes on the device is gone when it returns or fails, as its locals are.
    """
    on_device = batch.to(device, non_blocking=True)
    predicted = feed.predict(model, on_device)
    loss = loss_sum(spec, predicted, on_device.targets)
    (loss / structures).backward()  # type: ignore[no-untyped-call]
    totals += torch.stack([loss.detach(), (predicted.detach() - on_device.targets).abs().sum()])


def listed(ids: Sequence[str]) -> str:
    """Ids of crystals for an error: all, or the first 70 and how many more."""
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
) -> list[NDArray[np.float32]] | None:
    """What ``compute`` gives for all ``rows``, in their order, without autograd; None when stopped.

    Args:
        compute: for a batch on the device, tensors whose first dimension is crystals or atoms; they are concatenated.

    Raises:
        DeviceTooSmall, DeviceBusy: when a single crystal does not fit the device.
    """
    found: list[list[NDArray[np.float32]]] = []
    done = 0
    while done < len(rows):
        limit = min(batch_size, memory.limit)
        parts = pack(rows[done:], feed.costs, largest_count=limit, largest_cost=max_bonds)
        batches = host_batches(feed, [[part] for part in parts], pinned=device.type == "cuda", distortion=distortion)
        shortage = None
        with contextlib.closing(batches), torch.inference_mode():
            for [batch] in batches:
                if should_stop():
                    return None
                try:
                    out = [tensor.float().cpu() for tensor in compute(batch.to(device, non_blocking=True))]
                except RuntimeError as error:
                    if not is_out_of_memory(error):
                        raise
                    shortage = Shortage(batch.rows.tolist(), str(error))
                    break
                found.append([tensor.numpy() for tensor in out])
                done += len(batch)
        if shortage is not None:
            memory.make_room(shortage, device, ids)
    return [np.concatenate(columns) for columns in zip(*found, strict=True)]
