"""Choose a fold's precision and micro-batch size, and record everything that affects the last bits of its results."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from mbqueue.errors import counted
from mbqueue.experiment import Spec
from mbqueue.train.arithmetic import device_name, fingerprint, usable_precision
from mbqueue.train.gpu_path import described
from mbqueue.train.memory import DeviceMemory


class Conditions:
    """The precision, memory limits and fingerprint of a fold's computations on one device.

    Args:
        memory_file: a JSON file that records how many crystals fit on each device; None for no file.
        extra: additional entries of the fingerprint.
        on_note: called with a sentence when the conditions differ from what the experiment requests.

    Attributes:
        precision: precision of matrix products in training.
        training, inference: limits on the number of crystals that the device processes at once.
    """

    def __init__(
        self,
        spec: Spec,
        device: torch.device,
        *,
        memory_file: Path | None,
        extra: Mapping[str, Any],
        on_note: Callable[[str], None],
    ) -> None:
        train, name = spec.train, device_name(device)
        self._device, self._extra, self._batch_size = device, dict(extra), train.batch_size
        self.precision = usable_precision(device, train.precision)
        if self.precision != train.precision:
            on_note(
                f"{name} does not support {train.precision}, so it computes matrix products in float32, which is "
                "more accurate and not slower."
                if device.type == "cuda"
                else f"{train.precision} is only for GPUs, so {name} computes matrix products in float32."
            )
        kind = f"{name}|{spec.model.trainable}|{self.precision}"
        self.training = DeviceMemory(memory_file, f"{kind}|train", on_note=on_note)
        self.inference = DeviceMemory(memory_file, f"{kind}|infer", on_note=on_note)
        for memory, work in ((self.training, "training"), (self.inference, "validation and predictions")):
            if memory.limit < train.batch_size:
                on_note(
                    f"{name} fits at most {counted(memory.limit, 'crystal')} at once in {work}, so a batch of "
                    f"{train.batch_size} is split into micro-batches. To make mbqueue try larger batches again, delete "
                    f"{memory.path}."
                )

    def begin(self) -> None:
        """Start a job. Retry larger batches if they failed only because other processes were using the memory."""
        self.training.begin()
        self.inference.begin()

    def fingerprint(self) -> dict[str, Any]:
        """Collect everything that affects the bytes of a result, except the experiment itself."""
        return {
            **fingerprint(self._device, self.precision),
            **described(self._device),
            "micro_batch": min(self.training.limit, self._batch_size),
            "infer_batch": min(self.inference.limit, self._batch_size),
            **self._extra,
        }
