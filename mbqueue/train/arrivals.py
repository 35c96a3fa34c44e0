"""Copy batches to a device, and results back, while the device is computing."""

from __future__ import annotations

from collections.abc import Generator, Iterable, Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from mbqueue.train.memory import OutOfMemory, Shortage, is_out_of_memory


@dataclass(frozen=True)
class Arrived:
    """A batch that has been copied to its device.

    Attributes:
        rows: the dataset row of each crystal in the batch, in host memory.
        batch: the batch, ready for work enqueued on the device's current stream.
    """

    rows: list[int]
    batch: Any


def arriving(steps: Iterable[Sequence[Any]], device: torch.device) -> Generator[list[Arrived], None, None]:
    """Yield the batches of each step, copied to ``device``.

    Copies to a GPU use a separate stream and page-locked memory, so they overlap with the previous step.

    Raises:
        OutOfMemory: if a batch does not fit in the device's memory.
    """
    if device.type != "cuda":
        for batches in steps:
            yield [Arrived(batch.rows.tolist(), batch) for batch in batches]
        return
    copying = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
    for batches in steps:
        rows = [batch.rows.tolist() for batch in batches]
        try:
            with torch.cuda.stream(copying):
                there = [batch.to(device, non_blocking=True) for batch in batches]
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            raise OutOfMemory(Shortage(max(rows, key=len), str(error))) from error
        computing = torch.cuda.current_stream(device)
        computing.wait_stream(copying)
        for batch in there:
            # Without record_stream, the copying stream could reuse this memory while the device still computes with it.
            for field in fields(batch):
                getattr(batch, field.name).record_stream(computing)
        yield [Arrived(*pair) for pair in zip(rows, there, strict=True)]


class Fetch:
    """Tensors being copied to host memory; only `wait` blocks until the copies arrive."""

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self._tensors, self._are_there = list(tensors), None
        if tensors[0].device.type == "cuda":
            self._tensors = [torch.empty_like(tensor, device="cpu", pin_memory=True) for tensor in tensors]
            for here, there in zip(self._tensors, tensors, strict=True):
                here.copy_(there, non_blocking=True)
            self._are_there = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._are_there.record(torch.cuda.current_stream(tensors[0].device))

    def wait(self) -> list[Tensor]:
        if self._are_there is not None:
            self._are_there.synchronize()
        return self._tensors
