"""Compile the GPU kernels while a session reads its data."""

from __future__ import annotations

import tempfile
import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import nn

from mbqueue.data.batch import Batch
from mbqueue.data.datasets import load
from mbqueue.data.graph_cache import GraphCache
from mbqueue.data.machine_code import keep_gpu_code
from mbqueue.experiment import SAMPLE_DATASET
from mbqueue.families import Family, family_with, pretrained_names
from mbqueue.train import gpu_path
from mbqueue.train.arithmetic import calculating, usable_precision
from mbqueue.train.family import implementation
from mbqueue.train.feeds import GraphFeed
from mbqueue.train.kernel_check import told


class Compiling:
    """Compiles GPU kernels in a background thread; does nothing on the CPU.

    The constructor starts compiling the float32 kernels of the default model family.

    Once an experiment's precision and weights are known, call `also` to compile the experiment's kernels. If a kernel
    does not compile, the device uses plain PyTorch, and the user sees one note. If no sample batch can be made, the
    kernels are compiled at the first training batch, and the user sees a note.

    Args:
        note: called with a sentence when kernels are compiled for the first time, or when compiling failed.
    """

    def __init__(self, device: torch.device, note: Callable[[str], None]) -> None:
        self._device, self._note = device, note
        self._threads: dict[tuple[str, str], threading.Thread] = {}
        self._tried: dict[str, tuple[nn.Module, Batch] | None] = {}
        self.also("float32", pretrained_names()[0])

    def also(self, precision: str, pretrained: str) -> None:
        """Compile the kernels for a different precision or family, after those already being compiled."""
        family, precision = family_with(pretrained), usable_precision(self._device, precision)
        if self._device.type != "cuda" or (family.name, precision) in self._threads:
            return
        # Do not use a daemon thread, because a process crashes if it exits while a compiler or a driver is running.
        thread = threading.Thread(
            target=self._compile,
            args=(family, precision, list(self._threads.values())),
            name=f"mbqueue-gpu-kernels-{precision}",
            daemon=False,
        )
        self._threads[family.name, precision] = thread
        thread.start()

    def wait(self) -> None:
        for thread in self._threads.values():
            thread.join()

    def _compile(self, family: Family, precision: str, before: list[threading.Thread]) -> None:
        for thread in before:
            thread.join()
        if family.name not in self._tried:
            self._tried[family.name] = self._prepared(family)
        tried = self._tried[family.name]
        if tried is None:
            return  # a note has already said that the first batch compiles the kernels
        model, batch = tried
        try:
            with calculating(self._device, precision), gpu_path.using(kernels=True):
                implementation(family).predict(model, batch).sum().backward()  # type: ignore[no-untyped-call]
        except Exception as error:  # noqa: BLE001  whatever Triton, its compiler or the driver raise
            gpu_path.leave_out(self._device, told(error), self._note)

    def _prepared(self, family: Family) -> tuple[nn.Module, Batch] | None:
        """Return a model and a sample batch for trying the kernels; if that fails, report a note and return None."""
        try:
            kept = keep_gpu_code()
            if kept is None or not (kept.is_dir() and any(kept.iterdir())):
                self._note(
                    "Compiling the GPU kernels while the data loads. Compiling can take a minute."
                    + ("" if kept is None else " mbqueue keeps the kernels for later sessions on this machine.")
                )
            return self._tried_on(family)
        except Exception as error:  # noqa: BLE001  files, memory or the driver failed: the session continues without it
            self._note(
                f"The GPU kernels could not be compiled while the data loaded ({told(error)}). mbqueue compiles them "
                "at the first batch, which can take a minute."
            )
            return None

    def _tried_on(self, family: Family) -> tuple[nn.Module, Batch]:
        made_by = implementation(family)
        with tempfile.TemporaryDirectory() as folder:
            cache = GraphCache.build(load(SAMPLE_DATASET, limit=2).crystals, Path(folder), workers=1)
            assert cache is not None
            batch = GraphFeed(made_by, cache).load(np.arange(2))
        return made_by.load_pretrained(next(iter(family.pretrained))).to(self._device), batch.to(self._device)
