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
from mbqueue.errors import DeviceTooSmall, NonFiniteLoss
from mbqueue.experiment import TrainSpec
from mbqueue.train.feeds import Feed, Rows, host_batches, pack
from mbqueue.train.memory import DeviceMemory
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


class OutOfMemory(Exception):
    """The device ran out of memory with so many crystals at once."""

    def __init__(self, crystals: Sequence[int]) -> None:
        super().__init__(f"{len(crystals)} crystals")
        self.crystals = list(crystals)


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
    for batch in batches:
        try:
            on_device = batch.to(device, non_blocking=True)
            predicted = feed.predict(model, on_device)
            loss = loss_sum(spec, predicted, on_device.targets)
            (loss / structures).backward()  # type: ignore[no-untyped-call]
            abs_error = (predicted.detach() - on_device.targets).abs().sum()
            totals += torch.stack([loss.detach(), abs_error])
        except torch.OutOfMemoryError as error:
            optimizer.zero_grad(set_to_none=True)
            raise OutOfMemory(batch.rows.tolist()) from error
    for parameter in parameters:
        # A parameter that this batch does not reach (no angles in it) must still decay and keep its momentum,
        # or the result would depend on how crystals are batched.
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
    # Clipping by infinity only measures.
    norm = nn.utils.clip_grad_norm_(parameters, spec.clip_norm or math.inf)
    loss_total, error_total, grad_norm = torch.cat([totals, norm[None].double()]).tolist()  # the step's one device sync
    if not math.isfinite(loss_total + grad_norm):
        optimizer.zero_grad(set_to_none=True)
        names = [ids[row] for batch in batches for row in batch.rows.tolist()]
        more = f" and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
        raise NonFiniteLoss(
            f"The loss ({loss_total}) or the gradient norm ({grad_norm}) is not finite; the weights are as before the "
            f"step. The batch: {', '.join(names[:_LISTED])}{more}. Look at these crystals' targets and distances, or "
            "lower train.lr, then retry."
        )
    set_learning_rate(optimizer, rate)
    optimizer.step()
    return StepResult(loss=loss_total, abs_error=error_total, grad_norm=grad_norm, structures=structures)


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
        DeviceTooSmall: when a single crystal does not fit the device.
    """
    found: list[list[NDArray[np.float32]]] = []
    done = 0
    while done < len(rows):
        limit = min(batch_size, memory.limit)
        parts = pack(rows[done:], feed.costs, largest_count=limit, largest_cost=max_bonds)
        batches = host_batches(feed, [[part] for part in parts], pinned=device.type == "cuda", distortion=distortion)
        with contextlib.closing(batches), torch.inference_mode():
            try:
                for [batch] in batches:
                    if should_stop():
                        return None
                    try:
                        out = compute(batch.to(device, non_blocking=True))
                    except torch.OutOfMemoryError as error:
                        raise OutOfMemory(batch.rows.tolist()) from error
                    found.append([tensor.float().cpu().numpy() for tensor in out])
                    done += len(batch)
            except OutOfMemory as full:
                make_room(full, memory, device, ids)
    return [np.concatenate(columns) for columns in zip(*found, strict=True)]


def make_room(full: OutOfMemory, memory: DeviceMemory, device: torch.device, ids: Sequence[str]) -> None:
    """Halve the micro-batch after the device ran out of memory.

    Raises:
        DeviceTooSmall: naming the crystal, when it was alone.
    """
    if device.type == "cuda":
        torch.cuda.empty_cache()
    if len(full.crystals) == 1:
        raise DeviceTooSmall(
            f"The crystal {ids[full.crystals[0]]} alone does not fit the memory of {device}. Use a device with more "
            "memory, or leave the crystal out of the dataset."
        ) from full
    memory.halve(len(full.crystals))
