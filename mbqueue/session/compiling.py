"""Compile the GPU kernels while a session reads its data."""

from __future__ import annotations

import tempfile
import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from chgnet.model import CHGNet

from mbqueue.data.batch import Batch
from mbqueue.data.datasets import load
from mbqueue.data.graph_cache import GraphCache
from mbqueue.data.machine_code import keep_gpu_code
from mbqueue.experiment import SAMPLE_DATASET
from mbqueue.train import chgnet, gpu_path
from mbqueue.train.arithmetic import calculating, usable_precision
from mbqueue.train.feeds import GraphFeed
from mbqueue.train.kernel_check import told


class Compiling:
    """Compiles a GPU's float32 kernels in a background thread. Does nothing on the CPU.

    Once an experiment's precision is known, call `also` to compile the kernels for it. If a kernel does not compile,
    the device uses plain PyTorch, and the user gets one note. If no sample batch can be made, the kernels are compiled
    at the first training batch, and the user gets a note.

    Args:
        device: the session's device.
        note: called with a sentence when kernels are compiled for the first time, or when compiling failed.
    """

    def __init__(self, device: torch.device, note: Callable[[str], None]) -> None:
        self._device, self._note = device, note
        self._threads: dict[str, threading.Thread] = {}
        self._tried: tuple[CHGNet, Batch] | None = None
        self.also("float32")

    def also(self, precision: str) -> None:
        """Compile the kernels for another precision, after those that are already being compiled."""
        precision = usable_precision(self._device, precision)
        if self._device.type != "cuda" or precision in self._threads:
            return
        # Not a daemon thread: a process that exits while a compiler or a driver runs crashes.
        thread = threading.Thread(
            target=self._compile,
            args=(precision, list(self._threads.values())),
            name=f"mbqueue-gpu-kernels-{precision}",
            daemon=False,
        )
        self._threads[precision] = thread
        thread.start()

    def wait(self) -> None:
        """Wait until all kernels are compiled, or their compilation has failed."""
        for thread in self._threads.values():
            thread.join()

    def _compile(self, precision: str, before: list[threading.Thread]) -> None:
        for thread in before:
            thread.join()
        if not before:
            self._tried = self._prepared()
        if self._tried is None:
            return  # a note has already said that the first batch compiles the kernels
        model, batch = self._tried
        try:
            with calculating(self._device, precision), gpu_path.using(kernels=True):
                chgnet.predict(model, batch).sum().backward()  # type: ignore[no-untyped-call]
        except Exception as error:  # noqa: BLE001  whatever Triton, its compiler or the driver raise
            gpu_path.leave_out(self._device, told(error), self._note)

    def _prepared(self) -> tuple[CHGNet, Batch] | None:
        """Return a model and a sample batch for trying the kernels; None, with a note, if that fails."""
        try:
            kept = keep_gpu_code()
            if kept is None or not (kept.is_dir() and any(kept.iterdir())):
                self._note(
                    "Compiling the GPU kernels while the data load. Compiling takes up to a minute"
                    + ("." if kept is None else ", once per machine.")
                )
            return self._tried_on()
        except Exception as error:  # noqa: BLE001  files, memory or the driver failed: the session continues without it
            self._note(
                f"The GPU kernels could not be compiled while the data loaded ({told(error)}). mbqueue compiles them "
                "at the first batch, which takes up to a minute."
            )
            return None

    def _tried_on(self) -> tuple[CHGNet, Batch]:
        """Return a pretrained model and a batch of two crystals, on the device."""
        with tempfile.TemporaryDirectory() as folder:
            cache = GraphCache.build(load(SAMPLE_DATASET, limit=2).crystals, Path(folder), workers=1)
            assert cache is not None
            batch = GraphFeed(chgnet, cache).load(np.arange(2))
        return chgnet.load_pretrained("0.3.0").to(self._device), batch.to(self._device)
