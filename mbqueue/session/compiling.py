"""The GPU kernels are compiled while a session reads its data."""

from __future__ import annotations

import contextlib
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from mbqueue.data.datasets import load
from mbqueue.data.graph_cache import GraphCache
from mbqueue.data.machine_code import keep_gpu_code
from mbqueue.experiment import SAMPLE_DATASET
from mbqueue.train import chgnet, gpu_path
from mbqueue.train.feeds import GraphFeed


class Compiling:
    """Compiles the kernels of a GPU in a thread of its own; nothing to do on the CPU.

    What goes wrong here goes wrong again, and is told, when the kernels are checked on the first batch.

    Args:
        device: the session's.
        note: told that kernels are compiled, when none were kept before.
    """

    def __init__(self, device: torch.device, note: Callable[[str], None]) -> None:
        self._device, self._note = device, note
        self._thread: threading.Thread | None = None
        if device.type == "cuda":
            self._thread = threading.Thread(target=self._compile, name="mbqueue-gpu-kernels", daemon=True)
            self._thread.start()

    def wait(self) -> None:
        """Return once all that can be compiled is."""
        if self._thread is not None:
            self._thread.join()

    def _compile(self) -> None:
        kept = keep_gpu_code()
        if kept is None or not any(kept.iterdir()):
            self._note(
                "Compiling the GPU kernels for this machine beside the loading of data, which takes up to a minute"
                + ("." if kept is None else ", once per machine.")
            )
        with contextlib.suppress(Exception), tempfile.TemporaryDirectory() as folder:
            cache = GraphCache.build(load(SAMPLE_DATASET, limit=2).crystals, Path(folder), workers=1)
            assert cache is not None
            model = chgnet.load_pretrained("0.3.0").to(self._device)
            batch = GraphFeed(chgnet, cache).load(np.arange(2)).to(self._device)
            with gpu_path.using(kernels=True):
                chgnet.predict(model, batch).sum().backward()  # type: ignore[no-untyped-call]
